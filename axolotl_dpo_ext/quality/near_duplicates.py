"""Near-duplicates over a whole set, without comparing every row with every other.

A row is a few texts, its sides: prompt, chosen and rejected, or a prompt alone. Two rows are as similar as their
least similar side, by the Jaccard index of the sets of 8-byte grams: the same question with another answer is no
duplicate. Each side is summarised by the minima of hashed grams (MinHash, one permutation, as in Shrivastava's
"Optimal Densification for Fast and Accurate Minwise Hashing", 2017). Rows that agree in a band of four minima become
candidates (locality-sensitive hashing), and candidates are read again and compared exactly. So what is found is
exact; what can be missed is a pair that agrees in no band: 1 in 10,000 at 0.9 on every side, 1 in 100 at 0.8.

A set of 100,000 variations of one text would have billions of similar pairs. So within a bucket a row meets only
the 64 rows of lowest rank, and of all it met the 32 with most minima in common are compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.quality.text import collapse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Read = Callable[[NDArray[np.int64]], Sequence[tuple[str, ...]]]

# Minima of a row over all its sides. The number has to be a multiple of four and of the number of sides.
_MINIMA = 36
_BAND = 4
_GRAM = 8
_BUCKET = 64
_COMPARED = 32
_EMPTY = np.uint32(2**32 - 1)
_MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
# How a pair is packed into an int64 that sorts by later row, most agreement, earlier row.
_ROW_BITS, _AGREEMENT_BITS = 28, 6


@dataclass(frozen=True, eq=False)
class _SimilarPairs:
    """Pairs at or above the floor. Rows are numbered by rank; of rows with equal rank the first stands for all.

    Attributes:
        rows: Row number by place in rank order, shape ``(u,)``.
        places: Place in rank order of every row, shape ``(n,)``.
        later: Place of the row of higher rank, shape ``(m,)``, ascending.
        earlier: Place of the row of lower rank, shape ``(m,)``.
        similarity: Exact similarity, float64, shape ``(m,)``.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    later: NDArray[np.int64]
    earlier: NDArray[np.int64]
    similarity: NDArray[np.float64]


def sketch(sides: Sequence[Sequence[str]]) -> NDArray[np.uint32]:
    """Summarises rows for the search; a row's sketch depends on nothing but its texts.

    Case, Unicode normal form and runs of whitespace make no difference.

    Args:
        sides: One to four lists of ``n`` texts each, such as ``(prompts, chosen, rejected)``.

    Returns:
        Minima, shape ``(n, 36 // sides, sides)``: 144 bytes a row. Sketches of batches can be concatenated.

    Raises:
        ValueError: If there are no sides or more than four, or if their lengths differ.
    """
    lengths = {len(texts) for texts in sides}
    if not 1 <= len(sides) <= 4 or len(lengths) != 1:
        raise ValueError(
            f"found {len(sides)} sides of {sorted(lengths)} texts; a row has one to four sides, "
            "so pass that many lists of equal length"
        )
    return np.stack([_minima(texts, _MINIMA // len(sides)) for texts in sides], axis=-1)


def nearest_before(
    sketches: NDArray[np.uint32], ranks: NDArray[np.uint64], read: Read, floor: float = 0.8
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Finds for every row the most similar row of lower rank.

    Ranks are hashes of the content, so the outcome does not depend on row order, and of several copies the same
    one stays. Dropping all rows above a threshold that is not below ``floor`` leaves a set in which nothing is
    above it: what a remaining row can be compared with was there before. (Not so in crowds: where a row has more
    candidates than are compared, the dropping of some makes room for others.)

    Args:
        sketches: What :func:`sketch` returned, shape ``(n, columns, sides)``.
        ranks: A hash of each row's content, shape ``(n,)``. Rows with equal rank are taken for copies; the one
            with the lower row number comes first.
        read: Returns the sides of the rows with these numbers (ascending), in this order.
        floor: Similarity from which a row is found, above 0 and at most 1. Below 0.8 many are missed.

    Returns:
        The highest similarity, shape ``(n,)``, 0 where nothing is found; and the row it was found in, -1 where
        nothing is.

    Raises:
        ValueError: If the shapes do not fit each other, or if the floor is out of range.
    """
    pairs = _similar_pairs(sketches, ranks, read, floor)
    best = np.lexsort((pairs.earlier, -pairs.similarity, pairs.later))
    later, first = np.unique(pairs.later[best], return_index=True)
    similarity, matched = np.zeros(len(pairs.rows)), np.full(len(pairs.rows), -1, dtype=np.int64)
    similarity[later] = pairs.similarity[best[first]]
    matched[later] = pairs.rows[pairs.earlier[best[first]]]
    original = pairs.rows[pairs.places]
    is_copy = original != np.arange(len(ranks))
    return np.where(is_copy, 1.0, similarity[pairs.places]), np.where(is_copy, original, matched[pairs.places])


def groups(
    sketches: NDArray[np.uint32], ranks: NDArray[np.uint64], read: Read, floor: float = 0.8
) -> NDArray[np.int64]:
    """Puts rows that are similar, also through others in between, into one group.

    Args and errors are those of :func:`nearest_before`.

    Returns:
        For every row the number of its group's row of lowest rank, shape ``(n,)``.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = _similar_pairs(sketches, ranks, read, floor)
    shape = (len(pairs.rows), len(pairs.rows))
    graph = coo_array((np.ones(len(pairs.later), dtype=np.int8), (pairs.later, pairs.earlier)), shape=shape)
    _, labels = connected_components(graph, directed=False)
    _, lowest = np.unique(labels, return_index=True)
    return np.asarray(pairs.rows[lowest[labels]][pairs.places], dtype=np.int64)


def _minima(texts: Sequence[str], columns: int) -> NDArray[np.uint32]:
    """Deals the hashed grams of each text to columns and returns the least of each, shape ``(n, columns)``."""
    grams, starts = _grams(texts)
    grams = _mixed(grams)
    cells = ((grams >> np.uint64(32)) * np.uint64(columns) >> np.uint64(32)).astype(np.int64)
    cells += np.repeat(np.arange(len(texts)) * columns, np.diff(starts))
    minima = np.full(len(texts) * columns, _EMPTY)
    np.minimum.at(minima, cells, np.minimum(grams.astype(np.uint32), _EMPTY - np.uint32(1)))
    return _densified(minima.reshape(len(texts), columns))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = values * _MIX_1
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MIX_2
    return mixed


def _densified(minima: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Fills empty columns from others of the row, each in an order of its own, the same for all rows.

    A text with fewer grams than columns leaves some empty, and two rows would agree in all of those. Taking the
    next column instead of a random one would give neighbouring columns, thus whole bands, the same luck.
    """
    columns = minima.shape[1]
    sparse = np.flatnonzero((minima == _EMPTY).any(axis=1))
    given = minima[sparse]
    filled = given.copy()
    donors = np.argsort(_mixed(np.arange(1, columns * columns + 1, dtype=np.uint64)).reshape(columns, columns), axis=0)
    for donor in donors:
        empty = filled == _EMPTY
        if not empty.any():
            break
        filled = np.where(empty, given[:, donor], filled)
    minima[sparse] = filled
    return minima


def _grams(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Returns the 8-byte grams of the texts and where each text's begin, shapes ``(total,)`` and ``(n + 1,)``.

    Shorter texts are padded, so every text has a gram, and an empty one is like another empty one only.
    """
    encoded = [collapse(text).lower().encode("utf-8", "surrogatepass").ljust(_GRAM, b"\0") for text in texts]
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    starts = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths - (_GRAM - 1), out=starts[1:])
    joined = b"".join(encoded)
    inside = np.ones(len(joined), dtype=np.bool_)
    ends = np.cumsum(lengths)
    for back in range(1, _GRAM):  # a gram that begins this near to its text's end reaches into the next
        inside[ends - back] = False
    size = max(len(joined) - _GRAM + 1, 0)
    every: NDArray[np.uint64] = np.ndarray((size,), dtype="<u8", buffer=joined, strides=(1,))
    return every[inside[:size]].astype(np.uint64, copy=False), starts


def _similar_pairs(sketches: NDArray[np.uint32], ranks: NDArray[np.uint64], read: Read, floor: float) -> _SimilarPairs:
    if sketches.ndim != 3 or ranks.shape != sketches.shape[:1]:
        raise ValueError(
            f"found sketches of shape {sketches.shape} and ranks of shape {ranks.shape}; "
            "pass what `sketch` returned, (n, columns, sides), and one rank per row"
        )
    if not 0 < floor <= 1:
        raise ValueError(f"found a floor of {floor}; a similarity is above 0 and at most 1, such as 0.8")
    _, rows, places = np.unique(ranks, return_index=True, return_inverse=True)
    later, earlier = _candidates(sketches, rows, floor)
    similarity = _compared(rows[later], rows[earlier], read, floor)
    found = similarity >= floor
    return _SimilarPairs(rows, places, later[found], earlier[found], similarity[found])


def _candidates(
    sketches: NDArray[np.uint32], rows: NDArray[np.int64], floor: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the places, in rank order, of pairs worth an exact comparison; none twice."""
    columns = sketches.shape[1]
    # Three and a half standard deviations below what rows at the floor agree in: a thousandth of those is lost.
    needed = columns * floor - 3.5 * np.sqrt(columns * floor * (1 - floor))
    flat = sketches.reshape(len(sketches), _MINIMA)
    best = np.empty(0, dtype=np.int64)
    for band in range(0, _MINIMA, _BAND):
        found = [best]
        for later, earlier in _in_buckets(_band_keys(flat[rows, band : band + _BAND])):
            agreement = (sketches[rows[later]] == sketches[rows[earlier]]).sum(axis=1)
            near = (agreement >= needed).all(axis=1)
            found.append(_packed(later[near], agreement[near].sum(axis=1), earlier[near]))
        best = _most_agreeing(np.concatenate(found))
    return best >> (_ROW_BITS + _AGREEMENT_BITS), best & (2**_ROW_BITS - 1)


def _band_keys(minima: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Returns a hash of four minima, shape ``(n,)``; a collision costs a comparison and nothing else."""
    pairs = np.ascontiguousarray(minima).view(np.uint64)
    return _mixed(_mixed(pairs[:, 0]) + pairs[:, 1])


def _in_buckets(keys: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yields pairs of positions with equal keys, the lower position second; at most 64 for each position."""
    order = np.argsort(keys, kind="stable")
    is_first = _begins_run(keys[order])
    bucket = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
    members = np.flatnonzero(~is_first)
    for start in range(0, len(members), 2048):  # times 64 pairs, times two sketches: 40 MB
        some = members[start : start + 2048]
        counts = np.minimum(some - bucket[some], _BUCKET)
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        yield order[np.repeat(some, counts)], order[np.repeat(bucket[some], counts) + nth]


def _packed(later: NDArray[np.int64], agreement: NDArray[np.int64], earlier: NDArray[np.int64]) -> NDArray[np.int64]:
    disagreement = _MINIMA - agreement
    return (later << (_ROW_BITS + _AGREEMENT_BITS)) | (disagreement << _ROW_BITS) | earlier


def _most_agreeing(packed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Removes repetitions and keeps the 32 best pairs of each later row."""
    pairs: NDArray[np.int64] = np.unique(packed)
    later = pairs >> (_ROW_BITS + _AGREEMENT_BITS)
    places = np.arange(len(pairs))
    nth: NDArray[np.int64] = places - np.maximum.accumulate(np.where(_begins_run(later), places, 0))
    return pairs[nth < _COMPARED]


def _begins_run(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Tells of each value whether it differs from the one before, shape ``(n,)``; the first does."""
    begins = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return begins


def _compared(a: NDArray[np.int64], b: NDArray[np.int64], read: Read, floor: float) -> NDArray[np.float64]:
    """Returns the exact similarity of rows ``a`` and ``b``, shape ``(m,)``; 0 where it is below the floor."""
    similarity = np.zeros(len(a))
    for start in range(0, len(a), 512):
        pairs = slice(start, start + 512)
        rows, position = np.unique(np.stack([a[pairs], b[pairs]]), return_inverse=True)
        sets = [_gram_sets(side) for side in zip(*read(rows), strict=True)]
        similarity[pairs] = [_least_jaccard([(side[i], side[j]) for side in sets], floor) for i, j in position.T]
    return similarity


def _gram_sets(texts: Sequence[str]) -> list[NDArray[np.uint64]]:
    """Returns the distinct grams of each text, ascending."""
    grams, starts = _grams(texts)
    return [_distinct(grams[first:end]) for first, end in pairwise(starts.tolist())]


def _distinct(grams: NDArray[np.uint64]) -> NDArray[np.uint64]:
    grams = np.sort(grams)
    return grams[_begins_run(grams)]


def _least_jaccard(sides: Sequence[tuple[NDArray[np.uint64], NDArray[np.uint64]]], floor: float) -> float:
    """Returns the least Jaccard index of pairs of ascending sets, or 0 as soon as one is below the floor."""
    least = 1.0
    for a, b in sides:
        # A stable sort merges two ascending runs: nine times as quick as `intersect1d`, which sorts from scratch.
        both = np.sort(np.concatenate([a, b]), kind="stable")
        shared = np.count_nonzero(both[1:] == both[:-1])
        least = min(least, shared / (len(both) - shared))
        if least < floor:
            return 0.0
    return least
