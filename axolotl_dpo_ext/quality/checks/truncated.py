"""Answers that the run would cut off: the model then learns to stop nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import QualitySettings


class Truncated(PairCheck):
    """Finds answers whose end is behind the run's maximal length, be it only the end-of-sequence token."""

    name = "truncated"
    summary = "an answer is cut off at the run's maximal length"
    on_singles = True
    needs = "the run's maximal length"

    def threshold(self, settings: QualitySettings) -> float:
        """Returns 0: any token cut off is flagged."""
        return 0.0

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns the share of the answer that is cut off, 0 to 1, of the answer that loses most."""
        if batch.max_length is None:
            return np.full(len(batch), np.nan)
        # TRL cuts the end of prompt and answer together (trl: DataCollatorForPreference, `keep_start`).
        shares = []
        for answer in batch.answers:
            beyond = batch.prompt_ids.lengths + answer.lengths - batch.max_length
            shares.append(np.clip(beyond, 0, answer.lengths) / np.maximum(answer.lengths, 1))
        most: NDArray[np.float64] = np.max(shares, axis=0)
        return most
