"""The built-in embedder: hashed character n-grams, nothing to download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.quality.text import collapse

if TYPE_CHECKING:
    from numpy.typing import NDArray

# One n instead of the range 3 to 5: a third of the time, and on real pairs almost the same ones are found.
_N = 4
_BITS = 18
_FEATURES = 2**_BITS
# Odd, with bits in no pattern: what multiplicative hashing asks for. Another number would change all scores a little.
_BASE = np.uint32(0x9E3779B1)
_BASE_SQUARED = np.uint32(0x9E3779B1**2 % 2**32)
_MIX = np.uint32(0x85EBCA6B)
# Even a one-letter answer has two n-grams, and an empty one has one. Both characters are whitespace to nobody,
# so a text cannot lose them to `collapse`, and text that holds them is rare enough to be left alone.
_BEFORE, _AFTER = "\x02\x02", "\x03\x03"


class LexicalEmbedder:
    """Counts of hashed character 4-grams, of unit length.

    Hashing has no vocabulary to fit, so a text's vector depends on nothing but the text. Case, Unicode normal
    form and runs of whitespace make no difference; word order does, through the n-grams that span words.
    """

    name = "lexical"

    def encode(self, texts: Sequence[str]) -> Any:
        """Returns a sparse matrix, shape ``(n, 262144)``, float64, rows of length 1, column numbers sorted.

        This is what scikit-learn's ``HashingVectorizer`` makes, with another hash. That one looks up every
        n-gram of every text in a Python loop, which took 11 times as long on real answers of 1,600 characters,
        longer than tokenizing them.
        """
        # scipy takes a moment to load, and this module is imported with the plugin.
        from scipy.sparse import csr_matrix

        grams, starts = _hashed_grams(texts)
        for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            grams[first:end].sort()  # text by text: small enough for the processor's nearest cache
        is_new = np.empty(len(grams), dtype=np.bool_)
        np.not_equal(grams[1:], grams[:-1], out=is_new[1:])
        is_new[starts[:-1]] = True
        places = np.flatnonzero(is_new)
        counts = np.diff(places, append=len(grams)).astype(np.float64)
        indptr = np.searchsorted(places, starts)
        lengths = np.sqrt(np.add.reduceat(counts * counts, indptr[:-1])) if len(texts) else counts
        data = counts / np.repeat(lengths, np.diff(indptr))
        return csr_matrix((data, grams[places].astype(np.int32), indptr), shape=(len(texts), _FEATURES))


def _hashed_grams(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Returns a column number for every 4-gram, and where each text's begin, shapes ``(total,)``, ``(n + 1,)``."""
    padded = [f"{_BEFORE}{collapse(text).lower()}{_AFTER}" for text in texts]
    lengths = np.fromiter(map(len, padded), dtype=np.int64, count=len(padded))
    # Half of a surrogate pair is no character, but data has it, and here it is a number like any other.
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32)
    pairs = codes[:-1] * _BASE + codes[1:]
    hashed = pairs[:-2] * _BASE_SQUARED + pairs[2:]
    hashed ^= hashed >> np.uint32(15)
    hashed *= _MIX
    hashed >>= np.uint32(32 - _BITS)
    inside = np.ones(len(codes), dtype=np.bool_)
    ends = np.cumsum(lengths)
    for back in range(1, _N):  # an n-gram that begins this near to its text's end reaches into the next
        inside[ends - back] = False
    starts = np.zeros(len(padded) + 1, dtype=np.int64)
    np.cumsum(lengths - (_N - 1), out=starts[1:])
    return hashed[inside[: len(hashed)]], starts
