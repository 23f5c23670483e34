"""The page of the run report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from axolotl_dpo_ext.report.histogram import histogram_chart
from axolotl_dpo_ext.report.svg import line_chart
from axolotl_dpo_ext.report.training import is_training
from axolotl_dpo_ext.vocabulary import Chart, Histogram, Table

if TYPE_CHECKING:
    from axolotl_dpo_ext.report.document import RunReport

_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Tile:
    """A headline figure: its name, its value, and a line below that says what to compare it with."""

    name: str
    value: str
    beside: str


def render(report: RunReport) -> str:
    """Returns the page: complete HTML, its style and charts inside, with no reference to anything outside."""
    colours = _colours(report)

    def draw(chart: Chart | Histogram) -> Markup:
        # Safe to mark as such: ElementTree has escaped every text and attribute of the drawing.
        return Markup(histogram_chart(chart) if isinstance(chart, Histogram) else line_chart(chart, colours))

    tiles, config = list(_tiles(report)), list(_flat(report.config))
    return _template().render(report=report, tiles=tiles, config=config, draw=draw, figure_columns=_figure_columns)


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["cell"] = _cell
    environment.tests["figure"] = _is_figure
    source = files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source)


def _colours(report: RunReport) -> dict[str, int]:
    charts = [chart for section in report.sections for chart in section.charts]
    names = dict.fromkeys(series.name for chart in charts for series in chart.series)
    return {name: number for number, name in enumerate(names)}


def _tiles(report: RunReport) -> Iterator[Tile]:
    section = next(filter(is_training, report.sections), None)
    if section is None:
        return
    heldout = section.data["heldout"] or {}
    tie = " (all ties)" if heldout.get("before_is_tie") else ""
    yield from _change_tile("held-out accuracy", heldout.get("accuracy"), 3, remark=tie)
    yield from _change_tile("held-out margin ÷ beta", heldout.get("margin_per_beta"), 2, unit="nats, ")
    train = section.data.get("train") or {}
    for name in ("accuracy", "loss"):
        if train.get(name) is not None:
            yield Tile(f"training {name}", f"{float(train[name]):.3f}", "last logged")
    planned = section.data.get("max_steps")
    yield Tile("steps", str(section.data["steps"]), f"of {planned}" if planned else "")


def _change_tile(
    name: str, change: Mapping[str, Any] | None, digits: int, *, unit: str = "", remark: str = ""
) -> Iterator[Tile]:
    if not change:
        return
    value = f"{float(change['after']):.{digits}f}"
    if change["before"] is None:
        yield Tile(name, value, f"{unit}at step {change['after_step']}")
    else:
        before = f"{round(float(change['before']), digits) + 0.0:.{digits}f}"  # no -0.00
        yield Tile(name, value, f"{unit}from {before} at step {change['before_step']}{remark}")


_FIGURE = re.compile(r"[<>≤≥]? ?[-+−]?\d[\d.,]* ?%?")  # a number, also as a percentage or a threshold


def _is_figure(value: Any) -> bool:
    if type(value) in (int, float) or value in ("nan", "inf", "-inf", "–"):
        return True
    return isinstance(value, str) and _FIGURE.fullmatch(value) is not None


def _figure_columns(table: Table) -> set[int]:
    """Returns the numbers of the columns that hold nothing but figures."""
    return {
        number
        for number in range(len(table.columns))
        if table.rows and all(_is_figure(row[number]) for row in table.rows if number < len(row))
    }


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"  # 0.1 + 0.2 is 0.3 to a reader
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields a nested configuration as dotted names, in its own order."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name}[{number}]")
    elif name:
        yield name, value if value not in ({}, []) else "(empty)"
