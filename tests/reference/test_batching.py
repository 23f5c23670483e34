"""Batches hold every answer once, keep their budget, and do not depend on what was computed before them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from axolotl_dpo_ext.reference import precompute
from axolotl_dpo_ext.reference.batching import Row, make_batches, make_rows
from axolotl_dpo_ext.reference.precompute import Batching, plan_shards
from axolotl_dpo_ext.reference.rows import Answer

BUDGETS = (1, 8, 30, 64, 1000)


def make_answers(seed: int, count: int = 60) -> list[Answer]:
    """Answers to a dozen prompts, some of which begin alike."""
    generator = random.Random(seed)
    prompts = [
        [1] * generator.randrange(1, 12) + [generator.randrange(2, 4)] * generator.randrange(3) for _ in "123456789abc"
    ]
    answers = []
    for _ in range(count):
        prompt = generator.choice(prompts)
        completion = [generator.randrange(9) for _ in range(generator.randrange(1, 15))]
        answers.append(Answer(np.array(prompt + completion, np.int64), len(prompt), len(completion)))
    return answers


def shape(batches: list[list[Row]]) -> list[list[tuple[int, ...]]]:
    return [[row.indices for row in batch] for batch in batches]


def fed_tokens(row: Row) -> int:
    """Tokens that go through the model, counted one by one."""
    return len(row.answers[0].prompt) + sum(len(answer.completion[:-1]) for answer in row.answers)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_answer_is_in_one_row_of_one_batch(share: bool, budget: int):
    for seed in range(20):
        answers = make_answers(seed)
        rows = make_rows(answers, share, budget)
        assert sorted(index for row in rows for index in row.indices) == list(range(len(answers)))
        batches = make_batches(rows, budget, padded=not share)
        assert [row for batch in batches for row in batch] == rows
        assert all(batches)
        for row in rows:
            assert [answers[index] for index in row.indices] == list(row.answers)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_row_holds_one_prompt_and_keeps_the_budget_unless_it_is_one_answer(budget: int):
    several = 0
    for seed in range(20):
        for row in make_rows(make_answers(seed), True, budget):
            assert len({answer.prompt.tobytes() for answer in row.answers}) == 1
            assert row.length == fed_tokens(row)
            assert len(row.answers) == 1 or row.length <= budget
            several += len(row.answers) > 1
    assert budget == 1 or several > 20


def test_a_prompt_is_in_as_few_rows_as_the_budget_allows():
    for seed in range(20):
        answers = make_answers(seed)
        prompts = Counter(answer.prompt.tobytes() for answer in answers)
        assert len(make_rows(answers, True, 10**6)) == len(prompts)
    assert all(len(row.answers) == 1 for row in make_rows(answers, False, 10**6))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_batch_keeps_the_budget_unless_it_is_one_row(padded: bool, budget: int):
    full = 0
    for seed in range(20):
        batches = make_batches(make_rows(make_answers(seed), not padded, budget), budget, padded)
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            lengths = [row.length for row in batch]
            computed = len(batch) * max(lengths) if padded else sum(lengths)
            assert len(batch) == 1 or computed <= budget
            if following is not None:  # one more row would not have fitted
                with_next = [*lengths, following[0].length]
                assert (len(with_next) * max(with_next) if padded else sum(with_next)) > budget
                full += 1
    assert full > 20 or budget == 1000


def test_rows_go_from_the_shortest_to_the_longest():
    for seed in range(20):
        lengths = [row.length for row in make_rows(make_answers(seed), True, 40)]
        assert lengths == sorted(lengths)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_rest_after_any_whole_batch_gives_the_same_batches(padded: bool, budget: int):
    for seed in range(5):
        rows = make_rows(make_answers(seed), not padded, budget)
        batches = make_batches(rows, budget, padded)
        for done in range(len(batches) + 1):
            rest = [row for batch in batches[done:] for row in batch]
            assert shape(make_batches(rest, budget, padded)) == shape(batches[done:])


@pytest.mark.parametrize("share", [True, False])
def test_equal_answers_give_equal_batches_whatever_objects_they_are(share: bool):
    for seed in range(10):
        first, second = make_answers(seed), make_answers(seed)
        assert first[0] is not second[0]
        one, other = (make_batches(make_rows(answers, share, 30), 30, not share) for answers in (first, second))
        assert shape(one) == shape(other)
        assert len(one) > 3


def test_no_rows_make_no_batches():
    assert make_rows([], True, 8) == []
    assert make_batches([], 8, True) == []


@pytest.mark.parametrize("share", [True, False])
def test_the_plan_without_stored_shards_is_the_rest_of_the_plan(share: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precompute, "SHARD_TOKENS", 60)
    for seed in range(10):
        generator = random.Random(seed)
        answers = make_answers(seed)
        whole = plan_shards(answers, np.ones(len(answers), np.bool_), Batching(share, 24))
        assert len(whole) > 4
        kept = [generator.random() < 0.5 for _ in whole]
        missing = np.zeros(len(answers), np.bool_)
        for shard in (shard for shard, keep in zip(whole, kept, strict=True) if keep):
            missing[[index for batch in shard for row in batch for index in row.indices]] = True
        rest = plan_shards(answers, missing, Batching(share, 24))
        assert [shape(shard) for shard in rest] == [shape(s) for s, keep in zip(whole, kept, strict=True) if keep]


@pytest.mark.parametrize("share", [True, False])
def test_a_plan_holds_what_is_missing_once_and_nothing_else(share: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precompute, "SHARD_TOKENS", 60)
    for seed in range(30):
        answers = make_answers(seed)
        missing = np.random.default_rng(seed).random(len(answers)) < (0.05, 0.5, 0.95)[seed % 3]
        shards = plan_shards(answers, missing, Batching(share, 24))
        planned = [(index, answer) for s in shards for b in s for r in b for index, answer in zip(r.indices, r.answers, strict=True)]  # fmt: skip
        assert sorted(index for index, _ in planned) == np.flatnonzero(missing).tolist()
        assert all(answers[index] is answer for index, answer in planned)


@pytest.mark.parametrize("share", [True, False])
def test_a_plan_that_was_carried_out_in_part_goes_on_as_planned(share: bool, monkeypatch: pytest.MonkeyPatch):
    # Also where some answers were stored before: after a kill the same batches are computed, and the same bits stored.
    monkeypatch.setattr(precompute, "SHARD_TOKENS", 60)
    batching = Batching(share, 24)
    for seed in range(40):
        generator = random.Random(seed)
        answers = make_answers(seed)
        missing = np.random.default_rng(seed).random(len(answers)) < 0.8
        plan = plan_shards(answers, missing, batching)
        done = [generator.random() < 0.5 for _ in plan]  # as several processes leave it
        for shard in (shard for shard, is_done in zip(plan, done, strict=True) if is_done):
            missing[[index for batch in shard for row in batch for index in row.indices]] = False
        rest = plan_shards(answers, missing, batching)
        assert [shape(shard) for shard in rest] == [
            shape(s) for s, is_done in zip(plan, done, strict=True) if not is_done
        ]
