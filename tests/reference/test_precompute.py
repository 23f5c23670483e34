"""What a store lacks is computed, once; whatever interrupts that, it ends with the same bytes, or with a reason."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from axolotl_dpo_ext.reference import precompute
from axolotl_dpo_ext.reference.batching import Row
from axolotl_dpo_ext.reference.precompute import Batching, PairLogProbs, reference_log_probs
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.rows import Answer, LogProbDefinition, answer_key, read_pairs
from axolotl_dpo_ext.reference.store import ReferenceStore, StoreError
from axolotl_dpo_ext.vocabulary import RunStopped
from tests.reference.precomputing import PLAIN, StandIn, expected, make_dataset, run, shards


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precompute, "SHARD_TOKENS", 150)


def assert_right(found: PairLogProbs, dataset: Dataset, definition: LogProbDefinition = PLAIN) -> None:
    np.testing.assert_allclose(np.stack([found.chosen, found.rejected]), expected(dataset, definition), rtol=1e-6)


def test_everything_is_computed_once_and_read_afterwards(tmp_path: Path):
    dataset = make_dataset(80)
    scorer = StandIn()
    found, store = run(dataset, tmp_path, scorer)
    assert_right(found, dataset)
    assert found.computed == 160 == len(scorer.scored) == len(set(scorer.scored)) == len(store)
    assert len(shards(tmp_path)) > 5
    again = StandIn()
    found, _ = run(dataset, tmp_path, again)
    assert_right(found, dataset)
    assert (found.computed, again.prepared, again.calls, found.seconds) == (0, 0, 0, 0.0)


def test_a_dataset_extended_reordered_and_filtered_computes_its_new_rows_only(tmp_path: Path):
    dataset, new = make_dataset(80), make_dataset(13, seed=1)
    run(dataset, tmp_path, StandIn())
    kept = dataset.filter(lambda row: len(row["chosen_ids"]) > 5)
    assert 20 < len(kept) < 70
    changed = concatenate_datasets([kept, new]).shuffle(seed=2)
    rows: list[Row] = []
    scorer = ScorerThat(rows.extend)
    found, _ = run(changed, tmp_path, scorer)
    assert_right(found, changed)
    assert found.computed == 26 == len(scorer.scored)
    assert len(rows) <= 15  # nearly all with both answers to a prompt
    pairs = read_pairs(new, PLAIN, 0, len(new))
    assert set(scorer.scored) == {answer_key(answer, None) for pair in pairs for answer in (pair.chosen, pair.rejected)}


def test_equal_answers_are_computed_once_also_across_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precompute, "PART_PAIRS", 16)
    dataset = make_dataset(40)
    swapped = dataset.rename_columns({"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"})
    doubled = concatenate_datasets([dataset, dataset.select(range(20)), swapped.select_columns(dataset.column_names)])
    scorer = StandIn()
    found, _ = run(doubled, tmp_path, scorer)
    assert_right(found, doubled)
    assert found.computed == 80 == len(scorer.scored) == len(set(scorer.scored))


def test_a_common_prompt_goes_to_the_scorer_once(tmp_path: Path):
    prompt = list(range(1, 21))
    rows = [{"prompt_ids": prompt, "chosen_ids": [n, 1], "rejected_ids": [n, 2, 3]} for n in range(5)]
    given: list[Row] = []

    class Looking(StandIn):
        def token_log_probs(self, rows: Sequence[Row], share_prompts: bool) -> Any:
            given.extend(rows)
            return super().token_log_probs(rows, share_prompts)

    found, _ = run(Dataset.from_list(rows), tmp_path, Looking())
    assert found.computed == 10
    assert [len(row.answers) for row in given] == [10]
    assert given[0].length == 20 + 5 * 1 + 5 * 2


def test_answers_without_tokens_are_zero_and_neither_computed_nor_stored(tmp_path: Path):
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": []},
        {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5], "rejected_ids": [6]},
        {"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6, 7]},
    ]
    definition = LogProbDefinition(4)
    found, store = run(Dataset.from_list(rows), tmp_path, StandIn(), definition)
    assert found.rejected[0] == found.chosen[1] == found.rejected[1] == found.chosen[2] == 0
    assert (found.chosen[0] < 0, found.rejected[2] < 0) == (True, True)
    assert found.computed == 2 == len(store)
    nothing = Dataset.from_list(rows[1:2])
    scorer = StandIn()
    found, store = run(nothing, tmp_path / "other", scorer, definition)
    assert (found.chosen.tolist(), found.rejected.tolist(), scorer.prepared) == ([0.0], [0.0], 0)
    assert not store.path.exists()


def test_an_empty_dataset_needs_nothing(tmp_path: Path):
    scorer = StandIn()
    found, _ = run(make_dataset(3).select([]), tmp_path, scorer)
    assert (len(found.chosen), len(found.rejected), found.computed, scorer.prepared) == (0, 0, 0, 0)


def test_ld_alpha_weights_the_tokens_beyond_the_shorter_answer(tmp_path: Path):
    dataset = make_dataset(30)
    definition = LogProbDefinition(ld_alpha=0.25)
    found, _ = run(dataset, tmp_path, StandIn(), definition)
    assert_right(found, dataset, definition)
    assert not np.allclose(found.chosen, expected(dataset)[0], rtol=1e-3)


def out_of_memory(rows: Sequence[Row], least: int) -> None:
    """Stands in for a device on which so few rows fit."""
    if len(rows) > least:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(rows)} rows.")


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_out_of_memory_halves_the_batches_and_changes_no_value(
    fits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(precompute, "SHARD_TOKENS", 100_000)
    dataset = make_dataset(60)
    failures: list[int] = []

    class Small(StandIn):
        def __call__(self, answers: Sequence[Answer]) -> tuple[StandIn, Batching]:
            return super().__call__(answers)[0], Batching(True, 400)

        def token_log_probs(self, rows: Sequence[Row], share_prompts: bool) -> Any:
            failures.append(len(rows)) if len(rows) > fits else None
            out_of_memory(rows, fits)
            return super().token_log_probs(rows, share_prompts)

    scorer = Small()
    found, _ = run(dataset, tmp_path, scorer)
    assert_right(found, dataset)
    assert len(scorer.scored) == found.computed == 120
    assert failures[0] > 8
    # It halves, and remembers: no batch fails twice for one reason.
    assert failures == [size for n, size in enumerate(failures) if n == 0 or size == -(-failures[n - 1] // 2)]
    assert sum("ran out of memory; going on with at most" in record.getMessage() for record in caplog.records) == len(
        failures
    )


def test_a_row_of_several_answers_that_does_not_fit_is_computed_answer_by_answer(tmp_path: Path):
    dataset = make_dataset(20)

    class Tiny(StandIn):
        def token_log_probs(self, rows: Sequence[Row], share_prompts: bool) -> Any:
            out_of_memory([answer for row in rows for answer in row.answers], 1)  # type: ignore[misc]
            return super().token_log_probs(rows, share_prompts)

    scorer = Tiny()
    found, _ = run(dataset, tmp_path, scorer)
    assert_right(found, dataset)
    assert scorer.calls == 40


def test_what_a_failed_batch_had_allocated_is_free_when_it_is_tried_again(tmp_path: Path):
    # A caught error keeps its frames, and they their tensors: on a device that was full anyway.
    held: list[weakref.ref[torch.Tensor]] = []

    class Full(StandIn):
        def token_log_probs(self, rows: Sequence[Row], share_prompts: bool) -> Any:
            assert not any(reference() is not None for reference in held)
            hidden = torch.zeros(8)
            held.append(weakref.ref(hidden))
            out_of_memory([answer for row in rows for answer in row.answers], 1)  # type: ignore[misc]
            return super().token_log_probs(rows, share_prompts)

    run(make_dataset(10), tmp_path, Full())
    assert len(held) > 20


def test_one_answer_too_large_for_the_memory_is_named(tmp_path: Path):
    with pytest.raises(RunStopped) as stopped:
        run(make_dataset(4), tmp_path, ScorerThat(lambda rows: out_of_memory(rows, 0)))
    for words in ("one answer of", "tokens runs out of memory", "Tried to allocate 1 rows", "lower sequence_len"):
        assert words in str(stopped.value)
    assert shards(tmp_path) == {}


class ScorerThat(StandIn):
    """Does something before it computes."""

    def __init__(self, before: Callable[[Sequence[Row]], None]) -> None:
        super().__init__()
        self._before = before

    def token_log_probs(self, rows: Sequence[Row], share_prompts: bool) -> Any:
        self._before(rows)
        return super().token_log_probs(rows, share_prompts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_their_shard_is_not_stored(value: float, tmp_path: Path):
    dataset = make_dataset(80)
    longest = max(
        (answer for pair in read_pairs(dataset, PLAIN, 0, 80) for answer in (pair.chosen, pair.rejected)),
        key=lambda answer: answer.prompt.size,
    )
    wrong = answer_key(longest, None)
    with pytest.raises(RunStopped) as stopped:
        run(dataset, tmp_path, StandIn(lambda answer: value if answer_key(answer, None) == wrong else 1.0))
    for words in ("of 1 answers is not finite", wrong.hex(), "bfloat16 or float32", "nothing of this shard was stored"):
        assert words in str(stopped.value)
    before = shards(tmp_path)
    assert len(before) > 1  # those of shorter rows
    scorer = StandIn()
    found, store = run(dataset, tmp_path, scorer)
    assert_right(found, dataset)
    assert wrong in scorer.scored
    assert np.isfinite(store.rows().logps).all()
    assert before.items() < shards(tmp_path).items()


def test_a_flipped_byte_has_its_shard_computed_again_and_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    dataset = make_dataset(80)
    run(dataset, tmp_path, StandIn())
    before = shards(tmp_path)
    path = max(tmp_path.glob("*/shard-*"), key=lambda path: path.name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    scorer = StandIn()
    found, store = run(dataset, tmp_path, scorer)
    assert_right(found, dataset)
    assert path.name in caplog.text
    assert 0 < found.computed == len(scorer.scored) < 40
    assert shards(tmp_path) == before  # it heals: the same name, the right bytes
    assert not store.damaged
    assert run(dataset, tmp_path, StandIn())[0].computed == 0


def test_a_lost_shard_is_computed_again(tmp_path: Path):
    dataset = make_dataset(80)
    run(dataset, tmp_path, StandIn())
    before = shards(tmp_path)
    for path in sorted(tmp_path.glob("*/shard-*"))[1::3]:
        path.unlink()
    found, _ = run(dataset, tmp_path, StandIn())
    assert_right(found, dataset)
    assert shards(tmp_path) == before


def test_values_that_another_process_stored_meanwhile_are_found(tmp_path: Path):
    # Two runs at once, and two processes of one run of which the first has opened the store a moment later.
    dataset = make_dataset(30)
    store = ReferenceStore(tmp_path, {"ld_alpha": None})
    run(dataset, tmp_path, StandIn())

    class Later(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [np.zeros_like(value) if isinstance(value, np.ndarray) else value]

    found = reference_log_probs(dataset, PLAIN, store, StandIn(), Later())
    assert_right(found, dataset)
    assert found.computed == 0


def test_a_failure_in_reading_what_others_stored_is_told_to_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Those that did not fail would wait for this one in the next part of the dataset, or in training.
    told: list[Any] = []

    class Listening(Processes):
        def gather(self, value: Any) -> list[Any]:
            told.append(value)
            return [value]

    def refresh(self: ReferenceStore) -> None:
        raise StoreError("two shards contradict each other")

    store = ReferenceStore(tmp_path, {})
    monkeypatch.setattr(ReferenceStore, "refresh", refresh)
    with pytest.raises(StoreError, match="contradict"):
        reference_log_probs(make_dataset(5), PLAIN, store, StandIn(), Listening())
    assert told[-1] == "StoreError: two shards contradict each other"
