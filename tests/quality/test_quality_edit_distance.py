"""Edit similarity: against the textbook table of distances, and quick on what users have."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np
import pytest

from axolotl_dpo_ext.quality.edit_distance import similarity


@dataclass(frozen=True, eq=False)
class Tokens:
    ids: np.ndarray
    starts: np.ndarray


def tokens(texts: list[list[int]]) -> Tokens:
    starts = np.cumsum([0, *map(len, texts)])
    return Tokens(np.array([token for text in texts for token in text], dtype=np.int64), starts)


def distance(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def edited(text: list[int], edits: int, rng: random.Random) -> list[int]:
    """Returns the text after so many random replacements, insertions and deletions, or fewer."""
    text = list(text)
    for _ in range(edits):
        place = rng.randrange(len(text) + 1)
        text[place : place + rng.randrange(2)] = [rng.randrange(50)] * rng.randrange(2)
    return text


def made_pairs() -> list[tuple[list[int], list[int]]]:
    rng = random.Random(11)
    pairs = [
        tuple([rng.randrange(k) for _ in range(rng.randrange(12))] for _ in range(2))
        for k in (1, 2, 3, 6)
        for _ in range(500)
    ]
    for length in (1, 2, 31, 63, 64, 65, 100, 130):  # around the lengths of machine words, where carries go wrong
        for edits in (0, 1, 2, length // 4, length // 2):
            text = [rng.randrange(50) for _ in range(length)]
            pairs.append((text, edited(text, edits, rng)))
    return pairs


def test_above_one_half_the_score_is_exact_and_below_it_is_a_bound():
    pairs = made_pairs()
    scores = similarity(tokens([a for a, _ in pairs]), tokens([b for _, b in pairs]))
    true = np.array([1 - distance(a, b) / max(len(a), len(b), 1) for a, b in pairs])
    exact = (true > 0.5) | (scores > 0.5)
    assert 300 < exact.sum() < len(pairs) - 300  # enough of both kinds
    assert scores[exact] == pytest.approx(true[exact], abs=1e-12)
    assert (scores >= true - 1e-12).all()
    assert (scores >= 0).all()
    assert (scores <= 1).all()


def test_it_is_symmetric_and_each_pair_is_on_its_own():
    pairs = made_pairs()
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    scores = similarity(tokens(left), tokens(right))
    assert similarity(tokens(right), tokens(left)).tolist() == scores.tolist()
    for i in range(0, len(pairs), 97):
        assert similarity(tokens(left[i : i + 1]), tokens(right[i : i + 1])).tolist() == [scores[i]]


@pytest.mark.parametrize(
    ("a", "b", "score"),
    [
        ([], [], 1.0),
        ([], [1], 0.0),
        ([7], [7], 1.0),
        ([7], [8], 0.0),
        ([1, 2, 3, 4], [1, 2, 3, 5], 0.75),
        ([1, 2, 3, 4], [2, 3, 4], 0.75),
        ([1, 1, 1, 2], [1, 2, 2, 2], 0.5),  # the bound: two tokens shared, counted as often as in the poorer
        ([2**32 - 1, 0], [2**32 - 1, 0], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], 0.0),  # the same bag of tokens in another order
    ],
)
def test_small_cases(a: list[int], b: list[int], score: float):
    assert similarity(tokens([a]), tokens([b])).tolist() == [score]


def test_no_texts_have_no_scores():
    assert similarity(tokens([]), tokens([])).tolist() == []


def test_tokens_of_neighbouring_pairs_are_not_shared():
    assert similarity(tokens([[1], [2], [3]]), tokens([[2], [3], [1]])).tolist() == [0.0, 0.0, 0.0]
    assert similarity(tokens([[1], [], [3]]), tokens([[], [1], [3]])).tolist() == [0.0, 0.0, 1.0]


def test_unequal_numbers_of_texts_are_refused():
    with pytest.raises(ValueError, match=r"found 2 and 1 texts"):
        similarity(tokens([[1], [2]]), tokens([[1]]))


def test_long_texts_do_not_stop_the_audit():
    """A table of 200,000 by 200,000 distances would take ten seconds or more even as bit vectors."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 1000, 200_000)
    changed = text.copy()
    changed[5] = changed[-5] = 1000  # what they share at both ends is short
    near = text.copy()
    near[100_000] = 1000
    one = Tokens(np.concatenate([text, text]), np.array([0, 200_000, 400_000]))
    two = Tokens(np.concatenate([changed, near]), np.array([0, 200_000, 400_000]))
    started = time.perf_counter()
    scores = similarity(one, two)
    assert time.perf_counter() - started < 5
    assert scores.tolist() == [1 - 2 / 200_000, 1 - 1 / 200_000]
