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
    sides = zip(sums, (batch.chosen_tokens, batch.rejected_tokens), strict=True)
    return np.column_stack([per_token(of, n, batch.prompt_ids.lengths, batch.max_length) for of, n in sides])


def per_token(
    sums: NDArray[np.float64], tokens: NDArray[np.int64], prompts: NDArray[np.int64], max_length: int | None
) -> NDArray[np.float64]:
    """Returns log-probabilities per token that the run keeps, nats, shape ``(n,)``, NaN where it keeps none.

    Args:
        sums: Of all kept tokens of each answer, nats, shape ``(n,)``.
        tokens: Length of each answer, shape ``(n,)``; 0 where it is malformed.
        prompts: Length of each prompt, shape ``(n,)``.
        max_length: Tokens of prompt and answer that are kept; ``None`` keeps all.
    """
    kept = tokens if max_length is None else np.minimum(tokens, np.maximum(max_length - prompts, 0))
    return np.where(kept > 0, sums / np.maximum(kept, 1), np.nan)


def deviations(likely: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns how far the less likely answer of each pair lies below the median of all.

    Args:
        likely: Log-likelihood per token of both answers, nats, shape ``(n, 2)``, NaN where unknown.

    Returns:
        Standard deviations, 0 or more, shape ``(n,)``, NaN where both are unknown. The standard deviation is taken to
        be 1.4826 times the median absolute one, so that outliers do not hide themselves.
    """
    known = likely[np.isfinite(likely)]
    if not len(known):
        return np.full(len(likely), np.nan)
    centre = np.median(known)
    spread = max(_TO_SIGMA * float(np.median(np.abs(known - centre))), 1e-6)
    below = np.maximum((centre - likely) / spread, 0.0)
    most: NDArray[np.float64] = np.fmax(below[:, 0], below[:, 1])
    return most


def foreign_warning(likely: NDArray[np.float64]) -> list[str]:
    """Returns a warning if half of the answers are as unlikely as text that the model does not know."""
    known = likely[np.isfinite(likely)]
    if not len(known) or (median := float(np.median(known))) > _FOREIGN:
        return []
    return [
        f"The data looks foreign to the reference model: half of the answers have less than {median:.2f} nats a token "
        f"(perplexity {math.exp(min(-median, 50.0)):.3g}); check the chat template and the language, or fine-tune on "
        "such answers first."
    ]
