"""Pairs that are in the data twice, or nearly: they count double, and can be in both splits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality import near_duplicates
from axolotl_dpo_ext.quality.base import PairBatch, ReadTexts, Scores, SetCheck
from axolotl_dpo_ext.quality.text import stable_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import Policy, QualitySettings


class Duplicate(SetCheck):
    """Finds pairs whose prompt and answers are each nearly those of another pair.

    Of each two, the one with the smaller hash of its text is not flagged, so that it does not depend on row order. What
    other checks say of that one plays no part: it can be dropped for a reason of its own. Rows with other tools, and
    unpaired answers with another label, are no duplicates.
    """

    name = "duplicate"
    summary = "nearly the same prompt and answers as in another pair"
    default_policy: Policy = "drop"
    setting = "max_duplicate_similarity"
    on_singles = True

    def threshold(self, settings: QualitySettings) -> float:
        """Returns ``max_duplicate_similarity``."""
        return settings.max_duplicate_similarity

    def sketch(self, batch: PairBatch, settings: QualitySettings) -> NDArray[np.uint32]:
        """Returns MinHashes, a hash of the texts, and one of tools and label, shape ``(n, 39)``."""
        labels = np.zeros(len(batch), dtype=np.uint32) if batch.desirable is None else batch.desirable.astype(np.uint32)
        if batch.tools:
            labels = labels | np.array([stable_hash(text) & 0xFFFFFFFE for text in batch.tools], dtype=np.uint32)
        hashes = [_content(*texts) for texts in zip(batch.prompts, batch.chosen, batch.rejected, strict=True)]
        return np.column_stack(
            [
                near_duplicates.sketch([batch.prompts, batch.chosen, batch.rejected]).reshape(len(batch), -1),
                np.array(hashes, dtype=np.uint64).view(np.uint32).reshape(-1, 2),
                labels,
            ]
        )

    def compare(self, sketches: NDArray[np.uint32], settings: QualitySettings, read: ReadTexts) -> Scores:
        """Returns the similarity to the most similar pair with a smaller hash, 0 if none is near."""
        minima = sketches[:, :-3].reshape(len(sketches), -1, 3)
        ranks = np.ascontiguousarray(sketches[:, -3:-1]).view(np.uint64).ravel()
        labels, sizes = np.unique(sketches[:, -1], return_counts=True)
        if len(labels) == 1:  # as of pairs without tools: without a copy of all sketches
            return Scores(*near_duplicates.nearest_before(minima, ranks, read))
        values, matched = np.zeros(len(sketches)), np.full(len(sketches), -1, dtype=np.int64)
        groups = np.split(np.argsort(sketches[:, -1], kind="stable"), np.cumsum(sizes)[:-1])
        for places in (group for group in groups if len(group) > 1):
            found = near_duplicates.nearest_before(minima[places], ranks[places], _reader_at(places, read))
            values[places] = found[0]
            matched[places] = np.where(found[1] >= 0, places[found[1]], -1)
        return Scores(values, matched)


def _reader_at(places: NDArray[np.int64], read: ReadTexts) -> ReadTexts:
    return lambda rows: read(places[np.asarray(rows)])


def _content(prompt: str, chosen: str, rejected: str) -> int:
    # Of the texts as they are: of two that differ in case only, the same one has to be spared in any row order.
    return stable_hash("\0".join((prompt, chosen, rejected)))
