"""Answers that the reference model finds far less likely than the rest of the data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import PairBatch, ReadTexts, Scores, SetCheck

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import QualitySettings

# Text that a model was trained on or is fluent in costs it 1 to 3 nats a token; 4 is a perplexity of 55.
_FOREIGN = -4.0
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
        """Returns how far the less likely answer lies below the median of all; see ``deviations``."""
        nothing = np.full(len(sketches), -1, dtype=np.int64)
        return Scores(deviations(sketches), nothing)


def log_likelihoods(batch: PairBatch) -> NDArray[np.float64]:
    """Returns the mean log-probability of the tokens of both answers, nats, shape ``(n, 2)``, NaN where unknown."""
    sums = [batch.figures.get(name, np.full(len(batch), np.nan)) for name in ("chosen_logp", "rejected_logp")]
    lengths = np.column_stack([batch.chosen_tokens, batch.rejected_tokens])
    per_token: NDArray[np.float64] = np.column_stack(sums) / np.maximum(lengths, 1)
    return per_token


def deviations(per_token: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns how far the less likely answer of each pair lies below the median of all.

    Args:
        per_token: Log-likelihood per token of both answers, nats, shape ``(n, 2)``, NaN where unknown.

    Returns:
        Standard deviations, 0 or more, shape ``(n,)``, NaN where both are unknown. The standard deviation is taken to
        be 1.4826 times the median absolute one, so that outliers do not hide themselves.
    """
    known = per_token[np.isfinite(per_token)]
    if not len(known):
        return np.full(len(per_token), np.nan)
    centre = np.median(known)
    spread = max(_TO_SIGMA * float(np.median(np.abs(known - centre))), 1e-6)
    below = np.maximum((centre - per_token) / spread, 0.0)
    most: NDArray[np.float64] = np.fmax(below[:, 0], below[:, 1])
    return most


def foreign_warning(per_token: NDArray[np.float64]) -> list[str]:
    """Returns a warning if half of the answers are as unlikely as text that the model does not know."""
    known = per_token[np.isfinite(per_token)]
    if not len(known) or (median := float(np.median(known))) > _FOREIGN:
        return []
    return [
        f"The data looks foreign to the reference model: half of the answers have less than {median:.2f} nats a token "
        f"(perplexity {math.exp(-median):.0f}); check the chat template and the language, or fine-tune on such "
        "answers first."
    ]
