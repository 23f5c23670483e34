"""What an audit found: the data, the scores, the reasons. Decided from scores, so it can be decided again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.quality import page, render
from axolotl_dpo_ext.quality.bias import LengthBias
from axolotl_dpo_ext.quality.policies import check_policies, check_serving
from axolotl_dpo_ext.quality.reading import read_pairs
from axolotl_dpo_ext.quality.records import write_records
from axolotl_dpo_ext.quality.scoring import Scored
from axolotl_dpo_ext.quality.text import excerpt
from axolotl_dpo_ext.vocabulary import ConfigurationError, RunStopped, Section

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

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
        scored: Number of pairs that the check applied to.
        matches_test_data: Whether matched rows are those of the test data.
        needs: What the check could not do without, if it applied to none.
        example: The flagged pair with the highest score, on one line; ``""`` if there is none.
    """

    check: str
    summary: str
    policy: Policy
    threshold: float
    setting: str
    flagged: int
    share: float
    scored: int
    matches_test_data: bool
    needs: str
    example: str


@dataclass(frozen=True, eq=False)
class AuditResult:
    """The outcome of an audit.

    Attributes:
        train: The pairs to train on, in their original order and with all their columns.
        heldout: The pairs held out, or ``None``. No normalised prompt is in both.
        reasons: What each check found, in the order in which the checks ran.
        length_bias_before: The length bias of all pairs.
        length_bias_after: The length bias of the pairs kept (train and held out).
        dropped_rows: Rows of the original data that were dropped, shape ``(d,)``, ascending.
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
    dropped_rows: NDArray[np.intp]
    heldout_rows: NDArray[np.intp]
    settings: QualitySettings
    holdout: float
    scored: Scored

    @property
    def pairs(self) -> int:
        """Number of pairs audited."""
        return len(self.scored.dataset)

    @cached_property
    def dropped(self) -> Dataset:
        """The pairs that were dropped, in their original order and with all their columns."""
        return self.scored.dataset.select(self.dropped_rows)

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

        A record has ``row``; where sources are known ``source`` and ``source_row``, the row counted within its
        source; ``check``, ``score``, ``threshold``, ``matched_row`` (another pair that it was found against, or
        ``None``), ``action`` (``drop`` or ``flag``), ``reason``, and excerpts, of at most 120 characters, of
        ``prompt``, ``chosen`` and ``rejected``.
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
        """Writes the records as Parquet or, under any other name than ``.parquet``, as JSON lines.

        The file is replaced in one step, so it is never half written.
        """
        write_records(self.iter_records(), Path(path))

    def rethreshold(self, settings: QualitySettings, *, holdout: float | None = None) -> AuditResult:
        """Decides again with other thresholds and policies, from the scores already computed.

        Args:
            settings: The new settings.
            holdout: The new size of the held-out split. Default: ``settings.holdout``, else the previous one.

        Raises:
            ConfigurationError: If a policy names an unknown check or the held-out split cannot be made.
            ValueError: If the settings need scores that were not computed: another embedder, or a check that
                was switched off. Run the audit again for those.
            QualityStop: As ``audit``.
        """
        from axolotl_dpo_ext.quality.decisions import decide

        if settings.embedder != self.scored.embedder:
            raise ValueError(
                f"the scores are of embedder {self.scored.embedder!r}, not {settings.embedder!r}; audit again"
            )
        if settings.group_similar_prompts != self.scored.similar_prompts:
            raise ValueError("prompts were grouped with another `group_similar_prompts`; audit again")
        problems = check_policies(settings, self.scored.checks)
        problems += check_serving(settings, self.scored.checks, self.scored.serving)
        if problems:
            raise ConfigurationError(problems)
        wanted = next(size for size in (holdout, settings.holdout, self.holdout) if size is not None)
        return decide(self.scored, settings, wanted)

    def summary_table(self) -> str:
        """Returns the outcome as plain text for a terminal."""
        return render.summary(self)

    def section(self) -> Section:
        """Returns the outcome as a section of the run report."""
        return page.section(self)

    def what_if(self, check: str) -> list[tuple[float, int]]:
        """Returns how many pairs a check would flag at other thresholds, as ``(threshold, flagged)``.

        Args:
            check: Name of a check that was run.
        """
        scores, threshold = self.scores[check], next(r.threshold for r in self.reasons if r.check == check)
        known = np.sort(scores[~np.isnan(scores)])
        return [(t, len(known) - int(np.searchsorted(known, t, side="right"))) for t in _alternatives(threshold)]

    @cached_property
    def source_rows(self) -> NDArray[np.int64] | None:
        """For each row its number within its source, shape ``(n,)``; ``None`` where sources are not known."""
        if self.scored.sources is None:
            return None
        seen: dict[str, int] = {}
        rows = np.empty(self.pairs, dtype=np.int64)
        for row, source in enumerate(self.scored.sources):
            rows[row] = seen[source] = seen.get(source, -1) + 1
        return rows

    def _finding(self, row: int, reason: Reason) -> dict[str, Any]:
        score = float(self.scores[reason.check][row])
        sources, source_rows = self.scored.sources, self.source_rows
        matched = self.scored.matched.get(reason.check)
        fault = self.scored.faults.get(row) if reason.check == "malformed" else ""
        return {
            "row": row,
            **({"source": sources[row]} if sources is not None else {}),
            **({"source_row": int(source_rows[row])} if source_rows is not None else {}),
            "check": reason.check,
            "score": score if np.isfinite(score) else None,  # JSON has no infinity
            "threshold": reason.threshold,
            "matched_row": int(matched[row]) if matched is not None and matched[row] >= 0 else None,
            "action": "drop" if fault and row in self.scored.unreadable else reason.policy,
            "reason": fault or f"{reason.summary}: {score:.4g} > {reason.threshold:.4g}",
        }


def _alternatives(threshold: float) -> list[float]:
    """Returns thresholds around one: distances to 1 halved and doubled, for similarities as for ratios."""
    if 0 < threshold < 1:
        return sorted({1 - (1 - threshold) * factor for factor in (0.25, 0.5, 1, 2, 4) if (1 - threshold) * factor < 1})
    if threshold > 1:
        return [1 + (threshold - 1) * factor for factor in (0.25, 0.5, 1, 2, 4, 8)]
    return [threshold]
