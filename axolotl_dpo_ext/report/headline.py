"""The few lines that a run prints when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from axolotl_dpo_ext.report.document import HTML_NAME, RunReport
from axolotl_dpo_ext.report.training import is_training
from axolotl_dpo_ext.vocabulary import Section


def headline(report: RunReport | Section) -> str:
    """Returns the two or three lines a run ends with: held-out accuracy and margin, and where the report is.

    They are ASCII: a log may pass through a terminal or a collector that shows nothing else.

    Args:
        report: A report, or its training section alone; then the place of the report is left out.
    """
    section = report if isinstance(report, Section) else next(filter(is_training, report.sections), None)
    lines = _figures(section.data) if section else ["no training figures: the log holds no record"]
    if isinstance(report, RunReport):
        lines.append(_row("report", str(report.output_dir / HTML_NAME)))
    return "\n".join(lines)


def _figures(data: Mapping[str, Any]) -> list[str]:
    heldout = data.get("heldout")
    if not heldout:
        train = data.get("train") or {}
        figures = (f"{name} {_number(train.get(name), 3)}" for name in ("accuracy", "loss"))
        return [_row("training", f"{', '.join(figures)} at step {data.get('steps')}; no held-out evaluation")]
    tie = " (step 0: all ties up to rounding; chance is 0.5)" if heldout.get("before_is_tie") else ""
    lines = [_row("held-out accuracy", _change(heldout.get("accuracy"), 3) + tie)]
    if heldout.get("margin_per_beta"):
        lines.append(_row("held-out margin/beta", _change(heldout["margin_per_beta"], 2, " nats")))
    return lines


def _change(change: Mapping[str, Any] | None, digits: int, unit: str = "") -> str:
    if not change:
        return "not measured"
    after = f"{_number(change['after'], digits)}{unit} at step {change['after_step']}"
    if change.get("before") is None:
        return after
    return f"{_number(change['before'], digits)}{unit} at step {change['before_step']} -> {after}"


def _number(value: Any, digits: int) -> str:
    if value is None:
        return "unknown"
    number = float(value)  # also reads "nan" and "inf", as the report's JSON has them
    return f"{round(number, digits) + 0.0:.{digits}f}" if math.isfinite(number) else str(number)  # no -0.00


def _row(name: str, text: str) -> str:
    return f"{name + ':':<22}{text}"
