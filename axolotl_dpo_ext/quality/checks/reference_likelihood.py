"""Answers that the reference model finds far less likely than the rest of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import PairBatch, ReadTexts, Scores, SetCheck

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import QualitySettings

_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is its σ / 1.4826


class ReferenceLikelihood(SetCheck):
    """Finds outliers of the log-likelihood per token under the reference model, where the data holds it.

    The columns are TRL's ``ref_chosen_logps`` and ``ref_rejected_logps``: sums over the answer, in nats. The scale is
    that of the data: where outliers are dropped, another audit of the rest can find new ones.
    """

    name = "reference_likelihood"
    summary = "the reference model finds an answer far less likely than the others"
    setting = "max_likelihood_deviation"
    needs = "columns `ref_chosen_logps` and `ref_rejected_logps`"

    def threshold(self, settings: QualitySettings) -> float:
        """Returns ``max_likelihood_deviation``."""
        return settings.max_likelihood_deviation

    def sketch(self, batch: PairBatch, settings: QualitySettings) -> NDArray[np.float64]:
        """Returns log-likelihoods per token of both answers, nats, shape ``(n, 2)``."""
        return log_likelihoods(batch)

    def compare(self, sketches: NDArray[np.float64], settings: QualitySettings, read: ReadTexts) -> Scores:
        """Returns how far the less likely answer lies below the median of all, in robust standard deviations.

        The deviation is 1.4826 times the median absolute one, so that outliers do not hide themselves.
        """
        nothing = np.full(len(sketches), -1, dtype=np.int64)
        known = sketches[np.isfinite(sketches)]
        if not len(known):
            return Scores(np.full(len(sketches), np.nan), nothing)
        centre = np.median(known)
        spread = max(_TO_SIGMA * float(np.median(np.abs(known - centre))), 1e-6)
        below = np.maximum((centre - sketches) / spread, 0.0)
        return Scores(np.fmax(below[:, 0], below[:, 1]), nothing)


def log_likelihoods(batch: PairBatch) -> NDArray[np.float64]:
    """Returns the mean log-probability of the tokens of both answers, nats, shape ``(n, 2)``, NaN where unknown."""
    sums = [batch.figures.get(name, np.full(len(batch), np.nan)) for name in ("chosen_logp", "rejected_logp")]
    lengths = np.column_stack([batch.chosen_tokens, batch.rejected_tokens])
    per_token: NDArray[np.float64] = np.column_stack(sums) / np.maximum(lengths, 1)
    return per_token
