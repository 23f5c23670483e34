"""Sequences with a second BOS token: a chat template wrote one, the tokenizer adds another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck
from axolotl_dpo_ext.quality.tokens import TokenIds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import QualitySettings


class DoubledBos(PairCheck):
    """Finds sequences that begin with BOS more than once, or have one again where an answer begins."""

    name = "doubled_bos"
    summary = "BOS stands twice at the beginning, or again in front of an answer"
    on_singles = True
    needs = "a tokenizer with a BOS token"

    def threshold(self, settings: QualitySettings) -> float:
        """Returns 0: one BOS too many is flagged."""
        return 0.0

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns the number of BOS tokens too many; NaN without a BOS token."""
        if batch.bos is None:
            return np.full(len(batch), np.nan)
        prompt = _leading(batch.prompt_ids, batch.bos)
        # Without a prompt the answer's first BOS is the one that the sequence needs.
        allowed = (batch.prompt_ids.lengths == 0).astype(np.int64)
        answers = [np.maximum(_leading(answer, batch.bos) - allowed, 0) for answer in batch.answers]
        extra: NDArray[np.float64] = np.maximum(prompt - 1, 0) + np.max(answers, axis=0).astype(np.float64)
        return extra


def _leading(texts: TokenIds, bos: int) -> NDArray[np.int64]:
    """Returns how many BOS each text begins with."""
    counts = np.zeros(len(texts), dtype=np.int64)
    begin = texts.starts[:-1]
    open_rows = np.flatnonzero(texts.lengths > 0)
    while len(open_rows):
        open_rows = open_rows[texts.ids[begin[open_rows] + counts[open_rows]] == bos]
        counts[open_rows] += 1
        open_rows = open_rows[counts[open_rows] < texts.lengths[open_rows]]
    return counts
