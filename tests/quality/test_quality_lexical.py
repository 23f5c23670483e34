"""The built-in embedder: what makes two texts the same to it, and that its cosine is that of the n-grams."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from axolotl_dpo_ext.quality.embedders import LexicalEmbedder
from axolotl_dpo_ext.quality.text import collapse

from .conftest import sentence

ENCODE = LexicalEmbedder().encode
TEXTS = [
    "",
    " ",
    "x",
    "Yes.",
    sentence(1, 20),
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd",
    "\U0001f469\u200d\U0001f680 \U0001f44d\U0001f3fd",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643",
    "half a pair \ud83d of surrogates",
    "\x02\x02 control \x03\x00",
]


def grams(text: str) -> Counter[str]:
    padded = f"\x02\x02{collapse(text).lower()}\x03\x03"
    return Counter(padded[i : i + 4] for i in range(len(padded) - 3))


def cosine(a: Counter[str], b: Counter[str]) -> float:
    lengths = sum(n * n for n in a.values()) * sum(n * n for n in b.values())
    return sum(n * b[gram] for gram, n in a.items()) / lengths**0.5


def test_rows_are_counts_of_grams_of_unit_length():
    matrix = ENCODE(TEXTS)
    assert matrix.shape == (len(TEXTS), 2**18)
    assert matrix.dtype == np.float64
    assert matrix.has_canonical_format  # columns sorted, none twice: scipy trusts both
    for row, text in zip(matrix, TEXTS, strict=True):
        counts = np.array(sorted(grams(text).values())) / sum(n * n for n in grams(text).values()) ** 0.5
        assert sorted(row.data) == pytest.approx(counts, abs=1e-15)  # no two of these few grams collide


def test_no_texts_are_no_rows():
    assert ENCODE([]).shape == (0, 2**18)


def test_a_row_depends_on_its_text_only():
    together = ENCODE(TEXTS)
    order = random.Random(5).sample(range(len(TEXTS)), len(TEXTS))
    for place, row in enumerate(ENCODE([TEXTS[i] for i in order])):
        alone = ENCODE([TEXTS[order[place]]])
        assert (row != alone).nnz == 0
        assert (row != together[order[place]]).nnz == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("caf\u00e9 au lait", "CAFE\u0301  au\nlait "),
        ("\ud55c\uad6d\uc5b4", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165"),
        ("\u3053\u3093\u306b\u3061\u306f\u3000\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f \u4e16\u754c"),
    ],
)
def test_case_normal_form_and_whitespace_make_no_difference(a: str, b: str):
    rows = ENCODE([a, b])
    assert (rows[0] != rows[1]).nnz == 0


def test_the_cosine_is_that_of_the_grams_themselves(judged):
    """Colliding hashes may add a little, never much: 262,144 columns for a thousand grams of a text."""
    chosen, rejected = judged["chosen"][:300], judged["rejected"][:300]
    a, b = ENCODE(chosen), ENCODE(rejected)
    hashed = np.asarray(a.multiply(b).sum(axis=1)).ravel()
    true = np.array([cosine(grams(c), grams(r)) for c, r in zip(chosen, rejected, strict=True)])
    assert np.abs(hashed - true).max() < 0.03
    assert np.abs(hashed - true).mean() < 0.002


def test_columns_are_used_evenly():
    """Bad mixing would crowd English text into few columns, and unlike texts would look alike."""
    rng = np.random.default_rng(0)
    codes = rng.integers(97, 123, size=(50_000, 4)).astype(np.uint8)
    texts = {bytes(code).decode() for code in codes}
    used = len(np.unique(ENCODE(sorted(texts)).indices))
    distinct = len({gram for text in texts for gram in grams(text)})
    assert used == pytest.approx(2**18 * (1 - np.exp(-distinct / 2**18)), rel=0.02)  # as if dealt at random
