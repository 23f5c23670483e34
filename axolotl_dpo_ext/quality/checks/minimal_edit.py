"""Pairs that differ in a few tokens only: DPO can then lower the likelihood of both answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality import edit_distance
from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import QualitySettings


class MinimalEdit(PairCheck):
    """Finds answers that few insertions, deletions and replacements of tokens turn into one another.

    Such pairs are legitimate where one token decides, as in code and mathematics, but they are the ones on which DPO
    lowers the likelihood of the chosen answer too (Pal et al., 2024, arXiv:2402.13228).
    """

    name = "minimal_edit"
    summary = "few tokens differ between chosen and rejected"
    setting = "min_edit_distance"

    def threshold(self, settings: QualitySettings) -> float:
        """Returns the largest share of equal tokens, 1 − ``min_edit_distance``."""
        return 1.0 - settings.min_edit_distance

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns 1 − edit distance : longer length, 0 to 1; see ``edit_distance.similarity``."""
        return edit_distance.similarity(batch.chosen_ids, batch.rejected_ids)
