"""Pairs whose answers say nearly the same: little to learn, and DPO then lowers both likelihoods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import Policy, QualitySettings


class Similarity(PairCheck):
    """Finds answers whose vectors, by the embedder of the settings, point the same way."""

    name = "similarity"
    summary = "chosen and rejected say nearly the same"
    default_policy: Policy = "drop"
    setting = "max_similarity"

    def threshold(self, settings: QualitySettings) -> float:
        """Returns ``max_similarity``."""
        return settings.max_similarity

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns the cosine of chosen and rejected, -1 to 1; NaN where a vector has no length.

        Raises:
            ValueError: If the embedder does not return one row per text.
        """
        n = len(batch)
        vectors = embedder.encode([*batch.chosen, *batch.rejected])
        if not hasattr(vectors, "multiply"):  # not a scipy sparse matrix
            vectors = np.asarray(vectors, dtype=np.float64)
        if vectors.ndim != 2 or vectors.shape[0] != 2 * n:
            raise ValueError(f"embedder {embedder.name!r} returned shape {vectors.shape} for {2 * n} texts")
        chosen, rejected = vectors[:n], vectors[n:]
        lengths = np.sqrt(_row_dot(chosen, chosen) * _row_dot(rejected, rejected))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = _row_dot(chosen, rejected) / lengths
        # Rounding can give 1 + 1e-16, which would be above a threshold of 1.
        return np.where(lengths > 0, np.clip(cosine, -1.0, 1.0), np.nan)


def _row_dot(a: Any, b: Any) -> NDArray[np.float64]:
    products = a.multiply(b) if hasattr(a, "multiply") else a * b
    return np.asarray(products.sum(axis=1), dtype=np.float64).ravel()
