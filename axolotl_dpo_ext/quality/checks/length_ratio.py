"""Pairs whose answers differ greatly in length: the model learns the length, not the quality."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import Policy, QualitySettings


class LengthRatio(PairCheck):
    """Finds answers of which one is many times as long as the other, in tokens."""

    name = "length_ratio"
    summary = "one answer is much longer than the other"
    default_policy: Policy = "drop"
    setting = "max_length_ratio"

    def threshold(self, settings: QualitySettings) -> float:
        """Returns ``max_length_ratio``."""
        return settings.max_length_ratio

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns longer : shorter, 1 or more; an answer without any token counts as one token."""
        longer = np.maximum(np.maximum(batch.chosen_tokens, batch.rejected_tokens), 1)
        shorter = np.maximum(np.minimum(batch.chosen_tokens, batch.rejected_tokens), 1)
        ratio: NDArray[np.float64] = longer / shorter
        return ratio
