"""Reads the ``preference_log.jsonl`` of a run, whole or cut short."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACCURACY = "rewards/accuracies"
MARGIN = "rewards/margins"
CHOSEN = "rewards/chosen"
REJECTED = "rewards/rejected"
LOSS = "loss"

_NON_FINITE = {"nan", "inf", "-inf"}
_NOT_METRICS = {"event", "step", "epoch", "time", "dataset"}


@dataclass(frozen=True)
class Record:
    """The metrics of one logged step. Rewards are as TRL logs them, beta included."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Change:
    """A held-out metric at the first evaluation and for the model that was kept.

    Attributes:
        before: Value at the first evaluation, or ``None`` where only one evaluation was made.
        before_step: Its step; 0 only where the run evaluated before the first update.
        after: Value for the kept model.
        after_step: Its step.
    """

    before: float | None
    before_step: int | None
    after: float
    after_step: int


@dataclass
class TrainingLog:
    """A run as its log tells it.

    Attributes:
        beta: The beta of the run, or ``None`` where its loss has none.
        loss_types: TRL's names of the losses.
        has_reference: Whether the rewards are log-ratios to a reference model (DPO, KTO) or plain
            log-probabilities (ORPO, CPO and SimPO).
        max_steps: Optimiser steps the run was to make.
        train: Training records, by step.
        heldout: Held-out records, by step, for each evaluation set; the only set of a run is named ``""``.
        ended: Why the run ended, or ``None`` if the log has no end.
        best_step: Step of the checkpoint that was loaded back at the end, if one was.
        started: Unix time of the first start, in seconds.
        seconds: Time the run took, without the pauses between being stopped and being resumed.
        resumed_at: Steps at which it was resumed.
        unreadable: Lines that are not valid records, other than a truncated last one.
        truncated: Whether the last line is cut short.
    """

    beta: float | None = None
    loss_types: list[str] = field(default_factory=list)
    has_reference: bool = True
    max_steps: int | None = None
    train: list[Record] = field(default_factory=list)
    heldout: dict[str, list[Record]] = field(default_factory=dict)
    ended: str | None = None
    best_step: int | None = None
    started: float | None = None
    seconds: float = 0.0
    resumed_at: list[int] = field(default_factory=list)
    unreadable: int = 0
    truncated: bool = False
    _clock: float | None = None

    @property
    def last_step(self) -> int:
        """Last step with a record."""
        return max((r.step for r in (*self.train, *self.all_heldout)), default=0)

    @property
    def all_heldout(self) -> list[Record]:
        """The records of all evaluation sets, set by set."""
        return [record for records in self.heldout.values() for record in records]

    @property
    def first_heldout(self) -> list[Record]:
        """The records of the first evaluation set, on which the headline figures are measured."""
        return next(iter(self.heldout.values()), [])

    @property
    def has_records(self) -> bool:
        """Whether anything was measured."""
        return bool(self.train or self.all_heldout)

    @property
    def scale(self) -> float:
        """What rewards are divided by: beta where there is one, else 1."""
        return self.beta or 1.0

    def change(self, records: Sequence[Record], metric: str, scale: float = 1.0) -> Change | None:
        """Returns a metric before and after training, divided by ``scale``; ``None`` if never measured."""
        measured = [record for record in records if metric in record.metrics]
        if not measured:
            return None
        first = measured[0]
        last = next((r for r in measured if r.step == self.best_step), measured[-1])
        if len(measured) == 1:
            return Change(None, None, last.metrics[metric] / scale, last.step)
        return Change(first.metrics[metric] / scale, first.step, last.metrics[metric] / scale, last.step)


_YEAR_9999 = 253_000_000_000.0  # seconds since the epoch; beyond it there is no date to show


def read_training_log(path: Path) -> TrainingLog:
    """Reads a log, skipping what is not valid. A file that does not exist reads as an empty log.

    Raises:
        OSError: If the file exists and cannot be read.
    """
    log = TrainingLog()
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line for line in text.split("\n") if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            _take(log, record)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            if number == len(lines) and not text.endswith("\n"):
                log.truncated = True
            else:
                log.unreadable += 1
    return log


def _take(log: TrainingLog, record: Mapping[str, Any]) -> None:
    event = record["event"]
    if event == "start":
        _take_start(log, record)
        return
    _tick(log, record.get("time"))
    if event == "end":
        log.ended = str(record.get("reason", "finished"))
        log.best_step = record.get("best_step")
    elif event in ("train", "eval"):
        measured = Record(int(record["step"]), _metrics(record))
        records = log.train if event == "train" else log.heldout.setdefault(record.get("dataset") or "", [])
        records.append(measured)


def _take_start(log: TrainingLog, record: Mapping[str, Any]) -> None:
    beta = record.get("beta")
    log.beta = None if beta is None else float(beta)
    log.loss_types = [str(one) for one in record.get("loss_type") or ()]
    log.has_reference = bool(record.get("has_reference", True))
    log.max_steps = record.get("max_steps")
    log.ended = log.best_step = None
    if record.get("resumed_at"):
        log.resumed_at.append(int(record["resumed_at"]))
    log._clock = _time(record.get("time"))
    log.started = log._clock if log.started is None else log.started


def _time(value: Any) -> float | None:
    """Returns a time in seconds since the epoch; ``None`` for what is no time that a calendar has."""
    sound = isinstance(value, (int, float)) and 0 <= value < _YEAR_9999
    return float(value) if sound else None


def _tick(log: TrainingLog, time: Any) -> None:
    now = _time(time)
    if now is None:
        return
    if log._clock is not None:
        log.seconds += max(0.0, now - log._clock)
    log._clock = now


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    metrics = {}
    for name, value in record.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name not in _NOT_METRICS and (number or value in _NON_FINITE):
            metrics[name] = float(value)
    return metrics
