"""The report's section on the training itself, from the log that the run left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from axolotl_dpo_ext.report.diagnoses import LN_2, diagnose, has_ln_2_start, is_tie
from axolotl_dpo_ext.report.training_log import (
    ACCURACY,
    CHOSEN,
    LOSS,
    MARGIN,
    REJECTED,
    Change,
    Record,
    TrainingLog,
    read_training_log,
)
from axolotl_dpo_ext.vocabulary import Chart, Section, Series

_KIND = "training"


def is_training(section: Section) -> bool:
    """Whether `training_section` made this section."""
    return section.data.get("kind") == _KIND


def training_section(log_file: Path) -> Section | None:
    """Builds the section from a ``preference_log.jsonl``, also from that of a killed run.

    Margins and rewards are divided by beta (in nats): TRL's contain beta, so that theirs do not compare
    across runs.

    Args:
        log_file: The log.

    Returns:
        The section, or ``None`` if the file is missing or holds no measurement. Its ``data`` has ``kind``,
        ``steps``, ``max_steps``, ``beta``, ``loss_type``, ``ended``, ``train`` (last loss and accuracy) and
        ``heldout``: ``accuracy`` and ``margin_per_beta``, each with ``before``, ``before_step``, ``after``,
        ``after_step`` or ``None``, ``before_is_tie`` (see `diagnoses.is_tie`), and ``datasets`` with the same
        for every named evaluation set. ``heldout`` is ``None`` without an evaluation.

    Raises:
        OSError: If the file exists and cannot be read.
    """
    log = read_training_log(Path(log_file))
    if not log.has_records:
        return None
    return Section(
        title="Training",
        summary=_summary(log),
        facts=tuple(_facts(log)),
        charts=tuple(_charts(log)),
        notes=diagnose(log),
        data=_data(log),
    )


def _data(log: TrainingLog) -> dict[str, Any]:
    named = {name: _heldout(log, records) for name, records in log.heldout.items() if name}
    heldout = _heldout(log, log.first_heldout) | {"datasets": named} if log.heldout else None
    return {
        "kind": _KIND,
        "steps": log.last_step,
        "max_steps": log.max_steps,
        "beta": log.beta,
        "loss_type": log.loss_types,
        "ended": log.ended,
        "train": {"loss": _last(log.train, LOSS), "accuracy": _last(log.train, ACCURACY)},
        "heldout": heldout,
    }


def _heldout(log: TrainingLog, records: Sequence[Record]) -> dict[str, Any]:
    accuracy = log.change(records, ACCURACY)
    margin = log.change(records, MARGIN, log.scale) if log.beta else None
    return {
        "accuracy": asdict(accuracy) if accuracy else None,
        "margin_per_beta": asdict(margin) if margin else None,
        "before_is_tie": log.has_reference and is_tie(records[0]),
    }


def _last(records: Sequence[Record], metric: str) -> float | None:
    return next((r.metrics[metric] for r in reversed(records) if metric in r.metrics), None)


def _summary(log: TrainingLog) -> str:
    loss = f" with the {' + '.join(log.loss_types)} loss" if log.loss_types else ""
    beta = f" at beta {log.beta:g}" if log.beta is not None else ""
    made = f"{log.last_step} of {log.max_steps} steps" if log.max_steps else f"{log.last_step} steps"
    opening = f"{made}{loss}{beta}."
    accuracy = log.change(log.first_heldout, ACCURACY)
    if accuracy is None or (log.has_reference and is_tie(log.first_heldout[-1])):
        return f"{opening} No held-out figures after training."
    margin = log.change(log.first_heldout, MARGIN, log.scale)
    closing = f" at a margin of {margin.after:.2f} nats" if margin and log.beta else ""
    return (
        f"{opening} At step {accuracy.after_step} the model ranks the chosen answer above the rejected one "
        f"in {accuracy.after:.1%} of held-out pairs{closing}."
    )


def _facts(log: TrainingLog) -> Iterable[tuple[str, Any]]:
    yield "steps", f"{log.last_step} of {log.max_steps}" if log.max_steps else log.last_step
    if log.beta is not None:
        yield "beta", log.beta
    if log.loss_types:
        yield "loss", " + ".join(log.loss_types)
    for name, records in log.heldout.items():
        place = f"held-out {name}".strip() if name else "held-out"
        if accuracy := log.change(records, ACCURACY):
            yield f"{place} accuracy", _arrow(accuracy, 3)
        if log.beta and (margin := log.change(records, MARGIN, log.scale)):
            yield f"{place} margin ÷ beta", f"{_arrow(margin, 2)} nats"
    if log.best_step is not None:
        yield "kept model", f"best checkpoint, step {log.best_step}"
    if log.resumed_at:
        yield "resumed at step", ", ".join(map(str, log.resumed_at))
    if log.started is not None:
        yield "started", f"{datetime.fromtimestamp(log.started, UTC):%Y-%m-%d %H:%M} UTC"
        yield "duration", _duration(log.seconds)


def _arrow(change: Change, digits: int) -> str:
    after = f"{change.after:.{digits}f} (step {change.after_step})"
    if change.before is None:
        return after
    before = round(change.before, digits) + 0.0  # no -0.00
    return f"{before:.{digits}f} (step {change.before_step}) → {after}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _charts(log: TrainingLog) -> Iterable[Chart]:
    per_beta = " ÷ beta" if log.beta else ""
    unit = "nats" if log.beta else "reward"
    yield from _chart(f"Margin{per_beta}", _both(log, MARGIN, log.scale), unit, 0.0)
    yield from _chart("Reward accuracy", _both(log, ACCURACY), "fraction of pairs", 0.5)
    for where, records in (("training", log.train), *((_place(n), r) for n, r in log.heldout.items())):
        sides = (("chosen", CHOSEN), ("rejected", REJECTED))
        series = [_series(name, records, metric, log.scale) for name, metric in sides]
        yield from _chart(f"Rewards{per_beta}, {where}", series, unit, 0.0)
    yield from _chart("Loss", _both(log, LOSS), "loss", LN_2 if has_ln_2_start(log) else None)


def _place(name: str) -> str:
    return f"held-out {name}".strip()


def _both(log: TrainingLog, metric: str, scale: float = 1.0) -> list[Series]:
    series = [_series("training", log.train, metric, scale)]
    return series + [_series(_place(name), records, metric, scale) for name, records in log.heldout.items()]


def _series(name: str, records: Sequence[Record], metric: str, scale: float = 1.0) -> Series:
    points = ((float(r.step), r.metrics[metric] / scale) for r in records if metric in r.metrics)
    return Series(name, tuple(sorted(points, key=lambda point: point[0])))


def _chart(title: str, series: Sequence[Series], y_label: str, baseline: float | None) -> Iterable[Chart]:
    drawn = tuple(one for one in series if one.points)
    if drawn:
        yield Chart(title=title, series=drawn, x_label="step", y_label=y_label, baseline=baseline)
