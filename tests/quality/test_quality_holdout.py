"""The held-out split shares no prompt, has the right size, and moves only when it must."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import audit
from axolotl_dpo_ext.quality.holdout import PromptLeakError, group_key, split
from axolotl_dpo_ext.quality.pairs import Pair
from axolotl_dpo_ext.quality.text import prompt_key
from axolotl_dpo_ext.settings import QualitySettings
from axolotl_dpo_ext.vocabulary import ConfigurationError

from .conftest import make_pairs


def keys_of(sizes: list[int], seed: int = 0) -> np.ndarray:
    """Returns keys of groups of these sizes, in hash order of the list, rows shuffled."""
    keys = [1000 * (group + 1) for group, size in enumerate(sizes) for _ in range(size)]
    random.Random(seed).shuffle(keys)
    return np.array(keys, dtype=np.uint64)


@pytest.mark.parametrize(
    ("sizes", "holdout", "expected"),
    [
        ([1] * 100, 0.1, 10),
        ([1] * 7, 0.1, 1),  # 0.7 pairs: still one
        ([1] * 25, 0.1, 3),  # half up
        ([1] * 100, 30, 30),
        ([7] * 10, 0.1, 7),
        ([50, 1, 1, 1, 1, 46], 4, 4),  # passes over what does not fit
        ([3, 3, 3], 4, 3),
        ([3, 3, 3], 5, 6),  # one more is closer than one less
        ([5, 3], 1, 3),  # nothing fits: the smallest group
        ([1, 99], 99, 99),  # an exchange
        ([3, 5, 5], 5, 5),
        ([2, 2], 3, 2),
        ([4, 6], 0.99, 6),
        ([1] * 5, 0, 0),
    ],
)
def test_size_of_the_split(sizes: list[int], holdout: float, expected: int):
    assert split(keys_of(sizes), holdout).sum() == expected


def test_an_exchange_is_made_near_the_cut():
    sizes = [2, 2, 2, 5, 3, 3]
    held_out = split(np.repeat(np.arange(6, dtype=np.uint64), sizes), 7)
    assert [bool(part.all()) for part in np.split(held_out, np.cumsum(sizes)[:-1])] == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("seed", range(30))
def test_no_prompt_is_shared_and_row_order_does_not_matter(seed: int):
    rng = random.Random(seed)
    keys = np.array([rng.getrandbits(64) for _ in range(40)], dtype=np.uint64)
    keys = keys[[int(39 * rng.random() ** 2) for _ in range(rng.randint(50, 300))]]
    holdout = rng.choice([0.05, 0.1, 0.5, 0.9, 1, 17])
    held_out = split(keys, holdout)
    assert not set(keys[held_out]) & set(keys[~held_out])
    assert 0 < held_out.sum() < len(keys)
    order = np.array(rng.sample(range(len(keys)), len(keys)))
    assert np.array_equal(split(keys[order], holdout), held_out[order])


def test_a_few_new_rows_move_few_groups():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**63, size=1000).astype(np.uint64)
    before = split(keys, 0.1)
    after = split(np.concatenate([keys, rng.integers(0, 2**63, size=50).astype(np.uint64)]), 0.1)[:1000]
    # The 50 new rows take up the places of about 5 % of the 100 held out: no reshuffle.
    assert (before != after).sum() <= 10


def random_data(seed: int, most: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Returns keys and sources of up to 2,000 pairs; a third of the prompts have pairs of several sources."""
    rng = random.Random(seed)
    weights = [rng.random() ** 2 for _ in range(rng.randint(2, 8))]
    keys, sources = [], []
    for _ in range(rng.randint(10, 600)):
        key, size = rng.getrandbits(64), rng.randint(1, most)
        own = rng.choices(range(len(weights)), weights, k=size if rng.random() < 1 / 3 else 1)
        keys += [key] * size
        sources += own * (size // len(own))
    order = rng.sample(range(len(keys)), len(keys))
    return np.array(keys, dtype=np.uint64)[order], np.array(sources)[order]


def home_of(keys: np.ndarray, sources: np.ndarray) -> dict[int, set[int]]:
    """Returns the sources that have most pairs of each key: several where they are equal."""
    homes = {}
    for key in set(keys.tolist()):
        counts = Counter(sources[keys == key].tolist())
        homes[key] = {source for source, count in counts.items() if count == max(counts.values())}
    return homes


@pytest.mark.parametrize("seed", range(40))
def test_no_prompt_is_shared_between_sources_on_two_sides(seed: int):
    keys, sources = random_data(seed)
    held_out = split(keys, [0.02, 0.1, 0.5, 0.9, 1][seed % 5], sources)
    assert not set(keys[held_out]) & set(keys[~held_out])
    assert 0 < held_out.sum() < len(keys)


@pytest.mark.parametrize("seed", range(40))
def test_neither_row_order_nor_the_numbers_of_sources_matter(seed: int):
    keys, sources = random_data(seed)
    held_out = split(keys, 0.1, sources)
    rng = random.Random(seed)
    order = np.array(rng.sample(range(len(keys)), len(keys)))
    numbers = np.array(rng.sample(range(-5, 1000), sources.max() + 1))
    assert np.array_equal(split(keys[order], 0.1, numbers[sources[order]]), held_out[order])


@pytest.mark.parametrize("seed", range(20))
def test_sources_that_tie_for_every_prompt_are_told_apart_by_their_prompts(seed: int):
    rng = random.Random(seed)
    keys = np.repeat(np.array([rng.getrandbits(64) for _ in range(60)], dtype=np.uint64), 2)
    sources = np.array([source for _ in range(60) for source in rng.sample(range(4), 2)])
    held_out = split(keys, 0.25, sources)
    for _ in range(5):
        numbers = np.array(rng.sample(range(4), 4))
        assert np.array_equal(split(keys, 0.25, numbers[sources]), held_out)


@pytest.mark.parametrize("seed", range(20))
def test_one_source_is_no_source(seed: int):
    keys, _ = random_data(seed)
    assert np.array_equal(split(keys, 0.1, np.full(len(keys), 3)), split(keys, 0.1))


@pytest.mark.parametrize("seed", range(40))
def test_single_pairs_are_shared_out_exactly(seed: int):
    keys, sources = random_data(seed, most=1)
    held_out = split(keys, 0.1, sources)
    assert held_out.sum() == max(1, np.floor(0.1 * len(keys) + 0.5))
    exact = np.bincount(sources) * held_out.sum() / len(keys)
    assert (np.abs(np.bincount(sources[held_out], minlength=len(exact)) - exact) < 1).all()


@pytest.mark.parametrize("seed", range(40))
def test_each_source_gives_its_share_and_the_total_is_right(seed: int):
    keys, sources = random_data(seed)
    homes = home_of(keys, sources)
    # Whole prompts of one source: how many of its pairs a source gives is then no matter of other sources.
    own = np.array([len(homes[key]) == 1 for key in keys.tolist()])
    keys, sources = keys[own], np.array([min(homes[key]) for key in keys[own].tolist()])
    held_out = split(keys, 0.2, sources)
    assert held_out.sum() == np.floor(0.2 * len(keys) + 0.5)
    given, exact = np.bincount(sources[held_out], minlength=sources.max() + 1), 0.2 * np.bincount(sources)
    # One pair of rounding, and half a group for what was not divided.
    assert (np.abs(given - exact) <= 1 + np.unique(keys, return_counts=True)[1].max() / 2).all()


@pytest.mark.parametrize(
    ("sizes_by_source", "holdout", "expected"),
    [
        ([[1] * 50, [1] * 30, [1] * 20], 0.1, [5, 3, 2]),
        ([[1] * 10, [90]], 0.1, [10, 0]),  # a source of one prompt gives none, the total is right
        ([[1] * 91, [9]], 0.1, [10, 0]),
        ([[20], [1] * 100, [1] * 200], 0.1, [0, 11, 21]),  # what it misses is shared out among the larger ones
        ([[1] * 96, [4], [4], [4], [4]], 0.1, [11, 0, 0, 0, 0]),
        ([[1] * 60, [1] * 30, [1] * 3, [1] * 3, [1] * 4], 0.1, [6, 3, 0, 0, 1]),  # the largest remainder
        ([[7] * 10, [7] * 20], 0.1, [7, 14]),
        ([[7] * 40, [1] * 20], 0.1, [28, 2]),
        ([[5], [5]], 9, [5, 0]),  # one side or the other, but never all
        ([[60], [1] * 40], 0.9, [60, 30]),  # the larger source takes up what is too much
        ([[1] * 3, [50, 50]], 0.5, [2, 50]),
    ],
)
def test_shares_of_sources(sizes_by_source: list[list[int]], holdout: float, expected: list[int]):
    keys = keys_of([size for sizes in sizes_by_source for size in sizes])
    source_of_group = np.repeat(range(len(sizes_by_source)), [len(sizes) for sizes in sizes_by_source])
    sources = source_of_group[(keys // 1000 - 1).astype(int)]
    held_out = split(keys, holdout, sources)
    assert np.bincount(sources[held_out], minlength=len(expected)).tolist() == expected


def test_a_prompt_of_several_sources_counts_for_the_one_with_most_of_its_pairs():
    # Ten prompts with two pairs of source 0 and one of source 1, and 70 pairs of source 1 alone.
    keys = np.array([group for group in range(10) for _ in range(3)] + list(range(100, 170)), dtype=np.uint64)
    sources = np.array([0, 0, 1] * 10 + [1] * 70)
    held_out = split(keys, 10, sources)
    assert (held_out[:30].sum(), held_out[30:].sum()) == (3, 7)


@pytest.mark.parametrize("seed", range(20))
def test_a_few_new_rows_move_few_groups_of_any_source(seed: int):
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**63, size=1500).astype(np.uint64)[rng.integers(0, 1500, size=3030)]
    sources = rng.choice([9, 4, 2, 7], p=[0.6, 0.25, 0.1, 0.05], size=3030)
    before, after = split(keys[:3000], 0.1, sources[:3000]), split(keys, 0.1, sources)[:3000]
    # One per cent of new rows may move each source's cut, by a tenth of the 300 held-out pairs at most.
    assert (before != after).sum() <= 30


def test_each_pair_has_one_source():
    with pytest.raises(ValueError, match=r"shape \(3,\) for 4 pairs"):
        split(np.arange(4, dtype=np.uint64), 0.5, np.zeros(3, dtype=np.intp))


def test_prompts_that_differ_in_form_only_are_one_group():
    same = [
        "What  is Caf\u00e9?",
        "what is cafe\u0301?\n",
        "WHAT IS CAF\u00c9\uff1f",
        "\uff37hat is caf\u00e9?",
    ]
    assert len({group_key(Pair(prompt, "a", "b")) for prompt in same}) == 1
    assert group_key(Pair("What is tea?", "a", "b")) != group_key(Pair(same[0], "a", "b"))
    assert prompt_key("Stra\u00dfe \u0130") == prompt_key("STRASSE \u0130")


def test_pairs_without_a_prompt_are_told_apart_by_their_answers():
    one, two = Pair("", "a", "b"), Pair("", "a", "c")
    assert group_key(one) != group_key(two)
    assert group_key(one) == group_key(Pair("", "B", " a"))


def test_the_same_split_on_every_machine():
    # A fixed value: a change here would silently reshuffle every user's split.
    assert group_key(Pair("What is 2+2?", "4", "5")) == 12753020625113066233
    code = "from axolotl_dpo_ext.quality.holdout import *; from axolotl_dpo_ext.quality.pairs import Pair; "
    code += "import sys; sys.stdout.write(str(group_key(Pair('What is 2+2?', '', ''))))"
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        assert shown.stdout == b"12753020625113066233"


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        (10, "none would be left"),
        (-0.1, "neither a fraction"),
        (1.5, "neither a fraction"),
        (float("nan"), "neither"),
    ],
)
def test_sizes_that_cannot_be(holdout: float, message: str):
    with pytest.raises(ConfigurationError, match=message):
        audit(Dataset.from_dict(make_pairs(10)), settings=QualitySettings(), holdout=holdout)


def test_one_prompt_cannot_be_split():
    with pytest.raises(ConfigurationError, match="share one prompt"):
        audit(Dataset.from_dict(make_pairs(10, prompts=1)), settings=QualitySettings(), holdout=0.1)


def test_a_leak_is_an_exception(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("axolotl_dpo_ext.quality.holdout._choose", lambda sizes, homes, wanted: np.array([True, False]))
    monkeypatch.setattr(np, "unique", lambda keys, **_: (keys, np.array([0, 1, 0, 1]), np.array([2, 2])))
    with pytest.raises(PromptLeakError, match="1 prompts"):
        split(np.array([5, 5, 6, 7], dtype=np.uint64), 0.5)


def test_the_split_is_made_of_what_is_kept():
    pairs = make_pairs(60, prompts=20)
    pairs["rejected"][::3] = pairs["chosen"][::3]
    result = audit(Dataset.from_dict(pairs), settings=QualitySettings(), holdout=0.25)
    assert result.heldout is not None
    assert len(result.heldout) + len(result.train) == 40
    assert len(result.heldout) == 10
    assert not set(result.heldout["prompt"]) & set(result.train["prompt"])


def test_real_prompts_are_not_shared(judged: Dataset):
    result = audit(judged, settings=QualitySettings(max_drop_fraction=0.9, policy={"similarity": "keep"}), holdout=0.1)
    assert result.heldout is not None
    here, there = ({prompt_key(p) for p in part["prompt"]} for part in (result.train, result.heldout))
    assert not here & there
    kept = len(result.train) + len(result.heldout)
    assert abs(len(result.heldout) - 0.1 * kept) <= 4  # groups are of at most seven
