"""Histograms of an audit: the scores of each check, and how much longer chosen is than rejected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.vocabulary import Histogram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.quality.result import AuditResult, Reason

_BINS = 30
_BEYOND = 0.999  # quantile: a single extreme score would squeeze all others into one bin


def histograms(result: AuditResult) -> list[Histogram]:
    """Returns a histogram for each check whose scores are more than yes and no, and one of the length bias."""
    kept = np.ones(result.pairs, dtype=np.bool_)
    kept[result.dropped_rows] = False
    bias = _histogram(result.scored.log_ratio, kept, 0.0)
    drawn = [_of_check(result.scores[reason.check], reason, kept) for reason in result.reasons]
    if bias is not None:
        title = f"Length of chosen : rejected, in {result.scored.unit}, before and after"
        drawn.insert(
            0, _named(bias, title, "natural logarithm of the ratio; right of 0 chosen is longer", 0.0, "equally long")
        )
    return [histogram for histogram in drawn if histogram is not None]


def plain_histogram(values: Mapping[str, NDArray[np.float64]], title: str, x_label: str) -> Histogram:
    """Returns a histogram of two sets of numbers in the same bins; NaN is left out."""
    known = np.concatenate([each[np.isfinite(each)] for each in values.values()])
    low, high = np.quantile(known, [1 - _BEYOND, _BEYOND])
    edges = _edges(float(low), float(high), float(low))
    finite = {name: each[np.isfinite(each)] for name, each in values.items()}
    counts = {
        name: np.histogram(np.clip(each, edges[0], edges[-1]), edges)[0].tolist() for name, each in finite.items()
    }
    return Histogram(title=title, edges=edges.tolist(), counts=counts, x_label=x_label)


def _of_check(scores: NDArray[np.float64], reason: Reason, kept: NDArray[np.bool_]) -> Histogram | None:
    known = scores[np.isfinite(scores)]
    if len(np.unique(known[:1000])) <= 2 and len(np.unique(known)) <= 2:
        return None
    geometric = bool(reason.threshold > 1 and known.min() >= 1)
    binned = _histogram(scores, kept, reason.threshold, geometric=geometric)
    if binned is None:
        return None
    title = f"{reason.check}: {reason.summary}"
    return _named(binned, title, "score", reason.threshold, "threshold", log_x=geometric)


Binned = tuple["NDArray[np.float64]", dict[str, list[int]]]


def _named(
    binned: Binned, title: str, x_label: str, marker: float, marker_label: str, log_x: bool = False
) -> Histogram:
    edges, counts = binned
    return Histogram(
        title=title,
        edges=edges.tolist(),
        counts=counts,
        x_label=x_label,
        marker=marker,
        marker_label=marker_label,
        log_x=log_x,
    )


def _histogram(
    scores: NDArray[np.float64], kept: NDArray[np.bool_], edge: float, *, geometric: bool = False
) -> Binned | None:
    """Counts scores in bins of which ``edge`` bounds two; what is beyond the last bins is counted in these."""
    finite = np.isfinite(scores)
    known = scores[finite]
    if not len(known):
        return None
    low, high = np.quantile(known, [1 - _BEYOND, _BEYOND])
    scaled = [math.log(value) if geometric else float(value) for value in (low, high, edge)]
    edges: NDArray[np.float64] = np.exp(_edges(*scaled)) if geometric else _edges(*scaled)
    counts = {
        "all": np.histogram(np.clip(known, edges[0], edges[-1]), edges)[0].tolist(),
        "kept": np.histogram(np.clip(scores[finite & kept], edges[0], edges[-1]), edges)[0].tolist(),
    }
    return edges, counts


def _edges(low: float, high: float, edge: float) -> NDArray[np.float64]:
    step = max(high - low, 1e-6) / _BINS
    first, last = int(np.floor((low - edge) / step)), int(np.ceil((high - edge) / step))
    # A threshold far from all scores does not stretch the bins to it.
    return np.asarray(edge + step * np.arange(first, max(last, first + 1) + 1), dtype=np.float64)
