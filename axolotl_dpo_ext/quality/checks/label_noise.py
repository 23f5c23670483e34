"""Pairs whose scores say the opposite of their labels, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import QualitySettings

_NEEDS = "a score of each answer, or a column `margin`"


class LabelNoise(PairCheck):
    """Finds pairs whose chosen answer is scored below the rejected one."""

    name = "label_noise"
    summary = "chosen is scored below rejected"
    needs = _NEEDS

    def threshold(self, settings: QualitySettings) -> float:
        """Returns 0: any lower score is flagged."""
        return 0.0

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns the rejected answer's score minus the chosen one's, in the data's own units."""
        return -_margin(batch)


class Tie(PairCheck):
    """Finds pairs whose two answers have the same score."""

    name = "tie"
    summary = "chosen and rejected have the same score"
    needs = _NEEDS

    def threshold(self, settings: QualitySettings) -> float:
        """Returns 0.5, between different scores (0) and equal ones (1)."""
        return 0.5

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns 1 where both scores are equal, else 0."""
        margin = _margin(batch)
        return np.where(np.isnan(margin), np.nan, margin == 0)


def _margin(batch: PairBatch) -> NDArray[np.float64]:
    return batch.figures.get("margin", np.full(len(batch), np.nan))
