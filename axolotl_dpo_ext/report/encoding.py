"""Sections and values to and from plain JSON types."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Set
from enum import Enum
from typing import Any

from axolotl_dpo_ext.vocabulary import Chart, Decision, Example, ExampleGroup, Histogram, Section, Series, Table

_SECRET_KEY = re.compile(
    r"((^|[_.-])(hub|hf|huggingface|auth|access|bearer|api|session|github|gitlab)_?token|^token|api_?keys?|password|passwd"
    r"|secret|credentials?|webhook(_url)?|^key|(secret|access|account|private)_?key(_id)?)$",
    re.IGNORECASE,
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_URL_SECRET = re.compile(r"(?<=[?&])((?:[\w-]*_)?(?:token|key|secret|signature|sig|password)=)[^&\s#]+", re.IGNORECASE)
_HIDDEN = "(hidden)"


def plain(value: Any) -> Any:
    """Returns a value made of JSON types only, such that writing and reading it changes nothing.

    Mappings get string keys, other collections become lists, NumPy scalars numbers, non-finite floats the
    strings ``"nan"``, ``"inf"`` and ``"-inf"``, and everything unknown its ``str``: a report that comes after
    hours of training must not fail on an odd value.
    """
    if value is None or (isinstance(value, (bool, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Set):
        return sorted((plain(item) for item in value), key=str)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return plain(value.item())
    return str(value)


def without_secrets(config: Any) -> Any:
    """Returns plain JSON values with tokens, keys, passwords and credentials in URLs replaced.

    A report is made to be passed on, and ``hub_token`` or ``wandb_api_key`` is a legal part of a
    configuration.
    """
    if isinstance(config, dict):
        return {
            key: _HIDDEN if isinstance(item, (str, list)) and _SECRET_KEY.search(key) else without_secrets(item)
            for key, item in config.items()
        }
    if isinstance(config, list):
        return [without_secrets(item) for item in config]
    if not isinstance(config, str):
        return config
    return _URL_SECRET.sub(rf"\1{_HIDDEN}", _URL_CREDENTIALS.sub("", config))


def section_to_json(section: Section) -> dict[str, Any]:
    """Returns a section as plain JSON values; `section_from_json` is its inverse."""
    return {
        "title": str(section.title),
        "summary": str(section.summary),
        "facts": [[str(name), plain(value)] for name, value in section.facts],
        "tables": [
            {"columns": [str(c) for c in t.columns], "rows": plain(list(t.rows)), "caption": str(t.caption)}
            for t in section.tables
        ],
        "charts": [_chart_to_json(chart) for chart in section.charts],
        "histograms": [_histogram_to_json(histogram) for histogram in section.histograms],
        "examples": [_examples_to_json(group) for group in section.examples],
        "notes": [str(note) for note in section.notes],
        "data": plain(section.data),
    }


def section_from_json(value: Mapping[str, Any]) -> Section:
    """Returns the section that `section_to_json` wrote, with tuples for sequences.

    Raises:
        KeyError: If a part without which there is nothing to show is missing.
        ValueError: If a histogram cannot be drawn.
    """
    return Section(
        title=value["title"],
        summary=value.get("summary", ""),
        facts=tuple((name, fact) for name, fact in value.get("facts", ())),
        tables=tuple(
            Table(tuple(t["columns"]), tuple(tuple(row) for row in t["rows"]), t.get("caption", ""))
            for t in value.get("tables", ())
        ),
        charts=tuple(_chart_from_json(chart) for chart in value.get("charts", ())),
        histograms=tuple(_histogram_from_json(histogram) for histogram in value.get("histograms", ())),
        examples=tuple(_examples_from_json(group) for group in value.get("examples", ())),
        notes=tuple(value.get("notes", ())),
        data=value.get("data", {}),
    )


def decision_from_json(value: Mapping[str, Any]) -> Decision:
    """Returns a decision from its JSON object."""
    return Decision(about=value["about"], choice=value["choice"], reason=value["reason"])


def _chart_to_json(chart: Chart) -> dict[str, Any]:
    return {
        "title": str(chart.title),
        "series": [{"name": str(one.name), "points": [plain([x, y]) for x, y in one.points]} for one in chart.series],
        "x_label": str(chart.x_label),
        "y_label": str(chart.y_label),
        "baseline": plain(chart.baseline),
    }


def _chart_from_json(value: Mapping[str, Any]) -> Chart:
    baseline = value.get("baseline")
    return Chart(
        title=value["title"],
        series=tuple(
            # float() also reads the words that stand for non-finite numbers
            Series(one["name"], tuple((float(x), float(y)) for x, y in one["points"]))
            for one in value["series"]
        ),
        x_label=value.get("x_label", "step"),
        y_label=value.get("y_label", ""),
        baseline=None if baseline is None else float(baseline),
    )


def _histogram_to_json(histogram: Histogram) -> dict[str, Any]:
    return {
        "title": str(histogram.title),
        "edges": [float(edge) for edge in histogram.edges],
        "counts": {str(name): [int(count) for count in counts] for name, counts in histogram.counts.items()},
        "x_label": str(histogram.x_label),
        "y_label": str(histogram.y_label),
        "marker": None if histogram.marker is None else float(histogram.marker),
        "marker_label": str(histogram.marker_label),
        "log_x": bool(histogram.log_x),
    }


def _histogram_from_json(value: Mapping[str, Any]) -> Histogram:
    return Histogram(
        title=value["title"],
        edges=tuple(value["edges"]),
        counts={name: tuple(counts) for name, counts in value["counts"].items()},
        x_label=value["x_label"],
        y_label=value["y_label"],
        marker=value["marker"],
        marker_label=value["marker_label"],
        log_x=value["log_x"],
    )


def _examples_to_json(group: ExampleGroup) -> dict[str, Any]:
    return {
        "title": str(group.title),
        "examples": [
            {
                "title": str(example.title),
                "prompt": str(example.prompt),
                "answers": [[str(name), str(text)] for name, text in example.answers],
            }
            for example in group.examples
        ],
    }


def _examples_from_json(value: Mapping[str, Any]) -> ExampleGroup:
    return ExampleGroup(
        title=value["title"],
        examples=tuple(
            Example(one["title"], one["prompt"], tuple((name, text) for name, text in one["answers"]))
            for one in value["examples"]
        ),
    )
