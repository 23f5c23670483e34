"""Pairs whose prompt is also in the test data: what is measured there would be memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck, Scores

if TYPE_CHECKING:
    from axolotl_dpo_ext.settings import QualitySettings


class Leakage(PairCheck):
    """Finds pairs whose normalised prompt is in the test data that was given; the matched row is the one there."""

    name = "leakage"
    summary = "the prompt is also in the test data"
    on_singles = True
    needs = "test data"
    matches_test_data = True

    def threshold(self, settings: QualitySettings) -> float:
        """Returns 0.5, between absent (0) and present (1)."""
        return 0.5

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> Scores:
        """Returns 1 where the prompt is in the test data, else 0."""
        if batch.in_test is None:
            nothing = np.full(len(batch), -1, dtype=np.int64)
            return Scores(np.full(len(batch), np.nan), nothing)
        return Scores((batch.in_test >= 0).astype(np.float64), batch.in_test)
