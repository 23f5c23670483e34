"""Pairs whose answers are the same text: there is nothing to prefer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck
from axolotl_dpo_ext.quality.text import collapse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import Policy, QualitySettings


class Identical(PairCheck):
    """Finds answers that are equal after Unicode NFC and whitespace normalisation."""

    name = "identical"
    summary = "chosen and rejected are the same text"
    default_policy: Policy = "drop"

    def threshold(self, settings: QualitySettings) -> float:
        """Returns 0.5, between different (0) and identical (1)."""
        return 0.5

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns 1 for identical answers, else 0."""
        sides = zip(batch.chosen, batch.rejected, strict=True)
        return np.array([a == b or collapse(a) == collapse(b) for a, b in sides], dtype=np.float64)
