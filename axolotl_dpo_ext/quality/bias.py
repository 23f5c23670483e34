"""Whether "chosen" just means "longer": a length ratio that is capped on both sides leaves such a bias as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LengthBias:
    """Whether one answer tends to be the longer one. Figures are NaN without pairs.

    Attributes:
        pairs: Number of well-formed pairs.
        chosen_longer: Share of pairs whose chosen answer is the longer one, 0 to 1.
        rejected_longer: Share of pairs whose rejected answer is the longer one; the rest are equally long.
        mean_log_ratio: Mean of the natural logarithm of chosen : rejected length; 0 is no bias.
        p_value: Two-sided sign test: how likely a split at least as uneven is where both are equally likely to be
            the longer one. Pairs of equal length are left out, as usual (Dixon and Mood, 1946).
    """

    pairs: int
    chosen_longer: float
    rejected_longer: float
    mean_log_ratio: float
    p_value: float

    @classmethod
    def of(cls, log_ratio: NDArray[np.float64]) -> LengthBias:
        """Measures the bias of pairs with these log-ratios of lengths; NaN entries are left out."""
        from scipy.stats import binomtest

        known = log_ratio[~np.isnan(log_ratio)]
        if not len(known):
            return cls(0, *[float("nan")] * 4)
        longer, shorter = int((known > 0).sum()), int((known < 0).sum())
        p_value = float(binomtest(longer, longer + shorter).pvalue) if longer + shorter else 1.0
        return cls(len(known), longer / len(known), shorter / len(known), float(known.mean()), p_value)
