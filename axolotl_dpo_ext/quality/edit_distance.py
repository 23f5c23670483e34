"""How alike two texts are, token by token: one minus the normalised edit distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.quality.tokens import TokenIds

# Two texts of 50,000 tokens take half a second; the time grows with the product of the lengths.
_MOST_CELLS = 50_000**2


def similarity(a: TokenIds, b: TokenIds) -> NDArray[np.float64]:
    """Returns one minus the Levenshtein distance over the length of the longer text, pair by pair.

    The tokens that two texts share in any order bound their similarity from above. Where that bound is not above
    one half it is the score: most pairs of answers are as different as that, and no one asks how different exactly.
    It also is where the parts that differ are too long to compare, such as more than 50,000 tokens in each text.

    Args:
        a: Token ids of ``n`` texts, not negative and below 2**32.
        b: Token ids of the texts to compare them with, ``n`` too.

    Returns:
        Similarity in [0, 1], shape ``(n,)``; 1 for equal texts, also empty ones. The same for ``(b, a)``.

    Raises:
        ValueError: If there are not as many texts in ``b`` as in ``a``.
    """
    if len(a.starts) != len(b.starts):
        raise ValueError(
            f"found {len(a.starts) - 1} and {len(b.starts) - 1} texts; each is compared with one, pass equally many"
        )
    longer = np.maximum(np.diff(a.starts), np.diff(b.starts))
    scores = np.where(longer > 0, _shared_tokens(a, b) / np.maximum(longer, 1), 1.0)
    for row in np.flatnonzero(scores > 0.5).tolist():
        left, right = _without_common_ends(
            a.ids[a.starts[row] : a.starts[row + 1]], b.ids[b.starts[row] : b.starts[row + 1]]
        )
        if len(left) * len(right) <= _MOST_CELLS:
            scores[row] = 1 - _levenshtein(left.tolist(), right.tolist()) / max(int(longer[row]), 1)
    return scores


def _shared_tokens(a: TokenIds, b: TokenIds) -> NDArray[np.int64]:
    """Returns how many tokens each pair has in common, each as often as in the text with fewer, shape ``(n,)``."""
    starts = a.starts + b.starts
    keys = np.empty(int(starts[-1]), dtype=np.int64)
    # A text of `a`, then the one of `b` it is compared with. The last bit says which of them a token is from, so
    # sorting makes equal tokens of both neighbouring runs.
    keys[np.arange(len(a.ids)) + np.repeat(b.starts[:-1], np.diff(a.starts))] = a.ids << 1
    keys[np.arange(len(b.ids)) + np.repeat(a.starts[1:], np.diff(b.starts))] = b.ids << 1 | 1
    for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        keys[first:end].sort()
    is_new = np.ones(len(keys), dtype=np.bool_)
    is_new[1:] = keys[1:] != keys[:-1]
    is_new[starts[:-1][np.diff(starts) > 0]] = True
    runs = np.flatnonzero(is_new)
    counts = np.diff(runs, append=len(keys))
    pairs = np.searchsorted(starts, runs, side="right") - 1
    tokens = keys[runs]
    shared = (tokens[1:] == (tokens[:-1] | 1)) & (tokens[:-1] & 1 == 0) & (pairs[1:] == pairs[:-1])
    fewer = np.minimum(counts[1:], counts[:-1])[shared]
    return np.bincount(pairs[1:][shared], weights=fewer, minlength=len(starts) - 1).astype(np.int64)


def _without_common_ends(a: NDArray[np.int64], b: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Removes what both begin and end with; that changes nothing about their distance."""
    start = _common_start(a, b)
    a, b = a[start:], b[start:]
    end = _common_start(a[::-1], b[::-1])
    return a[: len(a) - end], b[: len(b) - end]


def _common_start(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size


def _levenshtein(a: list[int], b: list[int]) -> int:
    """Returns the edit distance by Myers' bit vectors (1999), in Hyyrö's form (2003).

    A column of the table of distances is two integers: bit ``i`` of ``up`` or ``down`` says that the distance grows
    or falls by one from row ``i`` to the next. Python's integers are as long as the column, and one addition or
    ``and`` of those moves all of it.
    """
    if len(a) < len(b):
        a, b = b, a  # the longer one is in the bits: the loop is the slow part
    occurrences: dict[int, int] = {}
    for i, token in enumerate(a):
        occurrences[token] = occurrences.get(token, 0) | 1 << i
    mask = (1 << len(a)) - 1
    up, down = mask, 0
    for token in b:
        equal = occurrences.get(token, 0)
        diagonal = ((((equal & up) + up) ^ up) | equal | down) & mask
        right = (down | (mask ^ (diagonal | up))) << 1 | 1
        up = ((up & diagonal) << 1 | (mask ^ ((diagonal | right) & mask))) & mask
        down = right & diagonal
    return len(b) + up.bit_count() - down.bit_count()
