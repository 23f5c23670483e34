"""Pairs whose answers become the same tokens on their way to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck
from axolotl_dpo_ext.quality.text import collapse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import Policy, QualitySettings


class SameTokens(PairCheck):
    """Finds answers that differ as texts, but not after the chat template and truncation to the maximal length."""

    name = "same_tokens"
    summary = "chosen and rejected are equal after template and truncation"
    default_policy: Policy = "drop"

    def threshold(self, settings: QualitySettings) -> float:
        """Returns 0.5, between different (0) and equal (1)."""
        return 0.5

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns 1 where what is left of two different answers is equal, else 0."""
        chosen, rejected = batch.chosen_ids, batch.rejected_ids
        longest = np.maximum(chosen.lengths, rejected.lengths)
        room = longest if batch.max_length is None else np.maximum(batch.max_length - batch.prompt_ids.lengths, 0)
        same = [np.array_equal(chosen[row][:most], rejected[row][:most]) for row, most in enumerate(room.tolist())]
        # What is identical as text is `identical`'s: each policy then decides on pairs of its own.
        texts = zip(same, batch.chosen, batch.rejected, strict=True)
        return np.array([equal and collapse(a) != collapse(b) for equal, a, b in texts], dtype=np.float64)
