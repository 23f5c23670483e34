"""What an audit found: the data, the scores, the reasons. Decided from scores, so it can be decided again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.quality import holdout as _holdout
from axolotl_dpo_ext.quality import render
from axolotl_dpo_ext.quality.pairs import read_pairs
from axolotl_dpo_ext.quality.scoring import Scored, check_policies, policy_of, threshold_of
from axolotl_dpo_ext.quality.text import excerpt
from axolotl_dpo_ext.vocabulary import ConfigurationError, RunStopped, Section

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from axolotl_dpo_ext.quality.base import PairCheck
    from axolotl_dpo_ext.settings import Policy, QualitySettings

_RECORD_BATCH = 1000


class QualityStop(RunStopped, RuntimeError):  # noqa: N818 - a stop that was asked for, not an error
    """The run must not train on what is left of the data. The message says why and what to change.

    Attributes:
        reasons: What each check found.
    """

    def __init__(self, message: str, reasons: tuple[Reason, ...] = ()) -> None:
        self.reasons = reasons
        super().__init__(message)


@dataclass(frozen=True)
class Reason:
    """What one check found.

    Attributes:
        check: Name of the check.
        summary: What a flagged pair is.
        policy: What happened to flagged pairs, ``drop`` or ``flag``.
        threshold: Pairs with a score above it are flagged.
        setting: Key of the setting that holds the threshold, or ``""``.
        flagged: Number of flagged pairs; a pair may be flagged by several checks.
        share: ``flagged`` as a share of all pairs, 0 to 1.
        example: The flagged pair with the highest score, on one line; ``""`` if there is none.
    """

    check: str
    summary: str
    policy: Policy
    threshold: float
    setting: str
    flagged: int
    share: float
    example: str


@dataclass(frozen=True)
class LengthBias:
    """Whether "chosen" just means "longer". Shares are 0 to 1 and NaN without pairs.

    Attributes:
        pairs: Number of well-formed pairs.
        chosen_longer: Share of pairs whose chosen answer is the longer one.
        rejected_longer: Share of pairs whose rejected answer is the longer one; the rest are equally long.
        mean_log_ratio: Mean of the natural logarithm of chosen : rejected length; 0 is no bias.
    """

    pairs: int
    chosen_longer: float
    rejected_longer: float
    mean_log_ratio: float

    @classmethod
    def of(cls, log_ratio: NDArray[np.float64]) -> LengthBias:
        """Measures the bias of pairs with these log-ratios of lengths; NaN entries are left out."""
        known = log_ratio[~np.isnan(log_ratio)]
        if not len(known):
            return cls(0, float("nan"), float("nan"), float("nan"))
        return cls(len(known), float((known > 0).mean()), float((known < 0).mean()), float(known.mean()))


@dataclass(frozen=True, eq=False)
class AuditResult:
    """The outcome of an audit.

    Attributes:
        train: The pairs to train on, in their original order and with all their columns.
        heldout: The pairs held out, or ``None``. No normalised prompt is in both.
        reasons: What each check found, in the order in which the checks ran.
        length_bias_before: The length bias of all pairs.
        length_bias_after: The length bias of the pairs kept (train and held out).
        dropped: Rows of the original data that were dropped, shape ``(d,)``, ascending.
        heldout_rows: Rows of the original data that are held out, shape ``(h,)``, ascending.
        settings: The settings that were applied.
        holdout: The size of the held-out split that was asked for.
        scored: The scores and all else that the decisions were made from.
    """

    train: Dataset
    heldout: Dataset | None
    reasons: tuple[Reason, ...]
    length_bias_before: LengthBias
    length_bias_after: LengthBias
    dropped: NDArray[np.intp]
    heldout_rows: NDArray[np.intp]
    settings: QualitySettings
    holdout: float
    scored: Scored

    @property
    def pairs(self) -> int:
        """Number of pairs audited."""
        return len(self.scored.dataset)

    @property
    def counts(self) -> dict[str, int]:
        """Number of flagged pairs by check; checks that were not run are absent."""
        return {reason.check: reason.flagged for reason in self.reasons}

    @property
    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Scores by check, shape ``(n,)``, NaN where a check does not apply."""
        return self.scored.scores

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """One record per flagged pair and check; see ``iter_records``."""
        return list(self.iter_records())

    def iter_records(self) -> Iterator[dict[str, Any]]:
        """Yields one record per flagged pair and check, by row and then by check.

        A record has ``row``, ``source`` (if known), ``check``, ``score``, ``threshold``, ``action`` (``drop``
        or ``flag``), ``reason``, and excerpts, of at most 120 characters, of ``prompt``, ``chosen`` and
        ``rejected``.
        """
        flags = {reason.check: self.scores[reason.check] > reason.threshold for reason in self.reasons}
        rows = np.flatnonzero(np.any(list(flags.values()), axis=0)) if flags else np.array([], dtype=np.intp)
        for start in range(0, len(rows), _RECORD_BATCH):
            some = rows[start : start + _RECORD_BATCH].tolist()
            for row, pair in zip(some, read_pairs(self.scored.dataset, some), strict=True):
                texts = {side: excerpt(getattr(pair, side)) for side in ("prompt", "chosen", "rejected")}
                for reason in self.reasons:
                    if flags[reason.check][row]:
                        yield {**self._finding(row, reason), **texts}

    def write_records(self, path: str | os.PathLike[str]) -> None:
        """Writes the records as JSON lines; the file is replaced in one step, so it is never half written."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for record in self.iter_records():
                    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def rethreshold(self, settings: QualitySettings, *, holdout: float | None = None) -> AuditResult:
        """Decides again with other thresholds and policies, from the scores already computed.

        Args:
            settings: The new settings.
            holdout: The new size of the held-out split; the previous one by default.

        Raises:
            ConfigurationError: If a policy names an unknown check or the held-out split cannot be made.
            ValueError: If the settings need scores that were not computed: another embedder, or a check that
                was switched off. Run the audit again for those.
            QualityStop: As ``audit``.
        """
        if settings.embedder != self.scored.embedder:
            raise ValueError(
                f"the scores are of embedder {self.scored.embedder!r}, not {settings.embedder!r}; audit again"
            )
        problems = check_policies(settings, self.scored.checks)
        if problems:
            raise ConfigurationError(problems)
        return decide(self.scored, settings, self.holdout if holdout is None else holdout)

    def summary_table(self) -> str:
        """Returns the outcome as plain text for a terminal."""
        return render.summary(self)

    def section(self) -> Section:
        """Returns the outcome as a section of the run report."""
        return render.section(self)

    def _finding(self, row: int, reason: Reason) -> dict[str, Any]:
        score = float(self.scores[reason.check][row])
        sources = self.scored.sources
        return {
            "row": row,
            **({"source": sources[row]} if sources is not None else {}),
            "check": reason.check,
            "score": score if np.isfinite(score) else None,  # JSON has no infinity
            "threshold": reason.threshold,
            "action": reason.policy,
            "reason": self.scored.faults.get(row) or f"{reason.summary}: {score:.4g} > {reason.threshold:.4g}",
        }


def decide(scored: Scored, settings: QualitySettings, holdout: float) -> AuditResult:
    """Applies thresholds and policies to scores, and splits what is kept.

    Raises:
        ValueError: If a check that has to run has no scores.
        QualityStop: If too many pairs would be dropped or none is left.
        ConfigurationError: If the held-out split cannot be made.
    """
    active = [check for check in scored.checks if policy_of(check, settings) != "keep"]
    absent = [check.name for check in active if check.name not in scored.scores]
    if absent:
        raise ValueError(f"no scores of {', '.join(absent)}: the audit was run without; audit again")
    drop = np.zeros(len(scored.dataset), dtype=np.bool_)
    for check in active:
        if policy_of(check, settings) == "drop":
            drop |= scored.scores[check.name] > threshold_of(check, settings)
    reasons = tuple(_reason(check, scored, settings) for check in active)
    dropped, kept = np.flatnonzero(drop), np.flatnonzero(~drop)
    _stop_if_little_is_left(len(dropped), len(kept), reasons, settings)
    held_out = _holdout.split(scored.keys[kept], holdout)
    return AuditResult(
        train=scored.dataset.select(kept[~held_out]),
        heldout=scored.dataset.select(kept[held_out]) if held_out.any() else None,
        reasons=reasons,
        length_bias_before=LengthBias.of(scored.log_ratio),
        length_bias_after=LengthBias.of(scored.log_ratio[kept]),
        dropped=dropped,
        heldout_rows=kept[held_out],
        settings=settings,
        holdout=holdout,
        scored=scored,
    )


def _reason(check: PairCheck, scored: Scored, settings: QualitySettings) -> Reason:
    scores, threshold = scored.scores[check.name], threshold_of(check, settings)
    flagged = np.flatnonzero(scores > threshold)
    return Reason(
        check=check.name,
        summary=check.summary,
        policy=policy_of(check, settings),
        threshold=float(threshold),
        setting=check.setting,
        flagged=len(flagged),
        share=len(flagged) / len(scores),
        example=_example(int(flagged[np.argmax(scores[flagged])]), scores, scored) if len(flagged) else "",
    )


def _example(row: int, scores: NDArray[np.float64], scored: Scored) -> str:
    pair = read_pairs(scored.dataset, [row])[0]
    found = scored.faults.get(row) or f"{scores[row]:.4g}"
    return f"row {row} ({found}): chosen {excerpt(pair.chosen, 60)!r}, rejected {excerpt(pair.rejected, 60)!r}"


def _stop_if_little_is_left(dropped: int, kept: int, reasons: tuple[Reason, ...], settings: QualitySettings) -> None:
    n = dropped + kept
    if kept and dropped / n <= settings.max_drop_fraction:
        return
    if kept:
        limit = f"more than `max_drop_fraction: {settings.max_drop_fraction:g}` allows"
        head = f"The audit would drop {dropped} of {n} pairs ({dropped / n:.1%}), {limit}."
    else:
        head = f"The audit would drop all {n} pairs: nothing is left to train on."
    raise QualityStop(f"{head}\n\n{render.reasons_text(reasons)}\n\n{render.advice(reasons)}", reasons)
