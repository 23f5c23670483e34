"""Decides from scores what is dropped, kept and held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality import holdout as _holdout
from axolotl_dpo_ext.quality import render
from axolotl_dpo_ext.quality.bias import LengthBias
from axolotl_dpo_ext.quality.policies import policy_of, threshold_of
from axolotl_dpo_ext.quality.reading import read_pairs
from axolotl_dpo_ext.quality.result import AuditResult, QualityStop, Reason
from axolotl_dpo_ext.quality.text import excerpt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.quality.base import Check
    from axolotl_dpo_ext.quality.scoring import Scored
    from axolotl_dpo_ext.settings import QualitySettings


def decide(scored: Scored, settings: QualitySettings, holdout: float) -> AuditResult:
    """Applies thresholds and policies to scores, and splits what is kept.

    Raises:
        ValueError: If a check that has to run has no scores.
        QualityStop: If too many pairs would be dropped or none is left.
        ConfigurationError: If the held-out split cannot be made.
    """
    active = [check for check in scored.serving if policy_of(check, settings) != "keep"]
    absent = [check.name for check in active if check.name not in scored.scores]
    if absent:
        raise ValueError(f"no scores of {', '.join(absent)}: the audit was run without; audit again")
    drop = np.zeros(len(scored.dataset), dtype=np.bool_)
    for check in active:
        if policy_of(check, settings) == "drop":
            drop |= scored.scores[check.name] > threshold_of(check, settings)
    # A row that could not be read has nothing to train on, whatever the policy.
    drop[list(scored.unreadable)] = True
    reasons = tuple(_reason(check, scored, settings) for check in active)
    dropped, kept = np.flatnonzero(drop), np.flatnonzero(~drop)
    _stop_if_little_is_left(len(dropped), len(kept), reasons, settings)
    held_out = _holdout.split(scored.keys[kept], holdout, _strata(scored, kept))
    return AuditResult(
        train=scored.dataset.select(kept[~held_out]),
        heldout=scored.dataset.select(kept[held_out]) if held_out.any() else None,
        reasons=reasons,
        length_bias_before=LengthBias.of(scored.log_ratio),
        length_bias_after=LengthBias.of(scored.log_ratio[kept]),
        dropped_rows=dropped,
        heldout_rows=kept[held_out],
        settings=settings,
        holdout=holdout,
        scored=scored,
    )


def _strata(scored: Scored, kept: NDArray[np.intp]) -> NDArray[np.intp] | None:
    """Returns the source of each kept row as a number."""
    if scored.sources is None:
        return None
    return scored.source_numbers[1][kept].astype(np.intp)


def _reason(check: Check, scored: Scored, settings: QualitySettings) -> Reason:
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
        scored=int(np.count_nonzero(~np.isnan(scores))),
        matches_test_data=check.matches_test_data,
        needs=check.needs,
        example=_example(check, int(flagged[np.argmax(scores[flagged])]), scores, scored) if len(flagged) else "",
    )


def _example(check: Check, row: int, scores: NDArray[np.float64], scored: Scored) -> str:
    pair = read_pairs(scored.dataset, [row])[0]
    found = (scored.faults.get(row) if check.name == "malformed" else "") or f"{scores[row]:.4g}"
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
