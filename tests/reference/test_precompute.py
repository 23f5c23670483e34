"""What a store lacks is computed, once; whatever interrupts that, it ends with the same bytes, or with a reason."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
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
from tests.reference import child_processes

PLAIN = LogProbDefinition()
BATCHING = Batching(share_prompts=True, budget=64)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precompute, "SHARD_TOKENS", 150)


class StandIn:
    """Computes values that depend on an answer and its prompt alone, and counts what it is asked."""

    def __init__(self, value: Callable[[Answer], float] = lambda answer: 1.0) -> None:
        self.scored: list[bytes] = []
        self.calls = 0
        self.prepared = 0
        self._factor = value

    def __call__(self, answers: Sequence[Answer]) -> tuple[StandIn, Batching]:
        self.prepared += 1
        return self, BATCHING

    def token_log_probs(self, rows: Sequence[Row], share_prompts: bool) -> Any:
        assert share_prompts
        self.calls += 1
        self.scored += [answer_key(answer, None) for row in rows for answer in row.answers]
        return np.concatenate([self._factor(answer) * tokens_of(answer) for row in rows for answer in row.answers])


def tokens_of(answer: Answer) -> Any:
    return -0.1 * (answer.completion % 97) - 0.01 * (answer.prompt.sum() % 89)


def make_dataset(count: int, seed: int = 0) -> Dataset:
    """Different pairs, some of which have their prompt in common with the one before."""
    generator = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [generator.randrange(1, 1000) for _ in range(generator.randrange(least, most + 1))]

    rows: list[dict[str, list[int]]] = []
    for _ in range(count):
        prompt = rows[-1]["prompt_ids"] if rows and generator.random() < 0.3 else tokens(2, 20)
        rows.append({"prompt_ids": prompt, "chosen_ids": tokens(2, 15), "rejected_ids": tokens(2, 15)})
    return Dataset.from_list(rows)


def expected(dataset: Dataset, definition: LogProbDefinition = PLAIN) -> np.ndarray:
    """The sums, one answer at a time."""
    values = []
    for pair in read_pairs(dataset, definition, 0, len(dataset)):
        for answer in (pair.chosen, pair.rejected):
            weights = np.where(np.arange(answer.tokens) < answer.shared, 1.0, definition.ld_alpha or 1.0)
            values.append((tokens_of(answer) * weights).sum())
    return np.array(values).reshape(-1, 2).T


def run(
    dataset: Dataset, root: Path, scorer: Any, definition: LogProbDefinition = PLAIN
) -> tuple[PairLogProbs, ReferenceStore]:
    store = ReferenceStore(root, {"ld_alpha": definition.ld_alpha})
    return reference_log_probs(dataset, definition, store, scorer, Processes()), store


def assert_right(found: PairLogProbs, dataset: Dataset, definition: LogProbDefinition = PLAIN) -> None:
    np.testing.assert_allclose(np.stack([found.chosen, found.rejected]), expected(dataset, definition), rtol=1e-6)


def shards(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.glob("*/shard-*")}


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


# Forked children are quick to start, and a model may not be computed with threads in them.
PRELUDE = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
import numpy as np, torch
from tqdm import tqdm
torch.set_num_threads(1)
# tqdm's own lock is common to all forked processes, and stays taken if one is killed.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0
from axolotl_dpo_ext.reference import precompute
from axolotl_dpo_ext.reference.precompute import Batching, reference_log_probs
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.rows import LogProbDefinition, answer_key
from axolotl_dpo_ext.reference.store import ReferenceStore, StoreError
from axolotl_dpo_ext.vocabulary import RunStopped
from tests.reference.child_processes import forked, give_up_rights, killed
from tests.reference.test_precompute import StandIn, make_dataset, run, shards

ROOT = Path(sys.argv[1])
precompute.SHARD_TOKENS = 150
"""


def start(code: str, root: Path, *arguments: object) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    return child_processes.start(PRELUDE + code, root, *arguments)


def result(process: subprocess.Popen[str], timeout: float = 240) -> Any:
    return child_processes.result(process, timeout)


# A dataset in several parts, with answers that are in two of them, and a store that holds some of it already.
KILL = """
from datasets import concatenate_datasets
precompute.PART_PAIRS = 60
random.seed(int(sys.argv[2]))
whole = make_dataset(170)
dataset = concatenate_datasets([whole, whole.select(range(100, 10, -9)), make_dataset(9, seed=1)])
some = whole.select(range(0, 170, 19))

class Telling(StandIn):
    def __init__(self, send):
        super().__init__()
        self.send = send
    def token_log_probs(self, rows, share_prompts):
        values = super().token_log_probs(rows, share_prompts)
        os.write(self.send, b"".join(answer_key(answer, None) for row in rows for answer in row.answers) + b"|" * 16)
        time.sleep(0.0005)
        return values

Processes()
run(some, ROOT / "undisturbed", StandIn())
run(dataset, ROOT / "undisturbed", StandIn())
wanted = shards(ROOT / "undisturbed")
home = {row.tobytes(): name for name in wanted for row in keys_of(ROOT / "undisturbed", name)}
rounds = []
while len(rounds) < 200 and sum(each["killed"] for each in rounds) < 24:
    if not rounds or len(shards(ROOT / "killed")) == len(wanted):  # from the start again
        for path in (ROOT / "killed").glob("*/*"):
            path.unlink()
        run(some, ROOT / "killed", StandIn())
    known = len(ReferenceStore(ROOT / "killed", {"ld_alpha": None}))
    after = random.randrange(1, 30) * 16 * 8
    told, was_killed = killed(
        lambda send: run(dataset, ROOT / "killed", Telling(send)), lambda told: len(told) >= after, 0.004
    )
    scored = {told[i : i + 16] for i in range(0, len(told), 16)} - {b"|" * 16}
    store = ReferenceStore(ROOT / "killed", {"ld_alpha": None})
    found = store.lookup(np.frombuffer(b"".join(sorted(scored)), np.uint8).reshape(-1, 16))[2]
    rounds.append({
        "killed": was_killed,
        "scored": len(scored),
        "stored": len(store) - known,
        "lost shards": len({home[key] for key, there in zip(sorted(scored), found) if not there}),
        "foreign": sorted(set(shards(ROOT / "killed")) - set(wanted)),
        "damaged": len(store.damaged),
        "temporary": len(list(store.path.glob(".tmp-*"))),
    })
scorer = StandIn()
run(dataset, ROOT / "killed", scorer)
print(json.dumps([rounds, len(wanted), len(scorer.scored)]))
"""

KEYS_OF = """
from safetensors.numpy import load_file
def keys_of(root, name):
    (path,) = root.glob("*/" + name)
    return load_file(path)["keys"]
"""


def test_killed_at_any_moment_and_resumed_gives_the_same_bytes_and_loses_one_shard_at_most(tmp_path: Path):
    seed = int.from_bytes(os.urandom(4))
    rounds, count, _ = result(start(KEYS_OF + KILL, tmp_path, seed))
    about = f"seed {seed}"
    killed = [each for each in rounds if each["killed"]]
    assert len(killed) >= 20, about
    assert count > 20, about
    for each in rounds:
        assert each["lost shards"] <= 1, about
        assert each["foreign"] == [], about
        assert each["damaged"] == 0, about
    # Kills that struck between shards alone, or before the first, would show nothing.
    assert sum(each["lost shards"] for each in killed) >= 5, about
    assert sum(each["stored"] > 0 for each in killed) >= 5, about
    assert len(shards(tmp_path / "undisturbed")) == count
    assert shards(tmp_path / "killed") == shards(tmp_path / "undisturbed"), about


def test_two_runs_at_once_store_the_same_and_both_have_all_values(tmp_path: Path):
    code = """
Processes()
dataset = make_dataset(200)
run(dataset, ROOT / "one", StandIn())

class Slow(StandIn):
    def token_log_probs(self, rows, share_prompts):
        time.sleep(0.001 * random.random())
        return super().token_log_probs(rows, share_prompts)

def write(name):
    scorer = Slow()
    found, _ = run(dataset, ROOT / "both", scorer)
    np.save(ROOT / name, np.stack([found.chosen, found.rejected]))
    (ROOT / (name + ".scored")).write_text(str(len(scorer.scored)))

children = [forked(lambda name=name: write(name)) for name in ("first", "second")]
statuses = [os.waitpid(child, 0)[1] for child in children]
print(json.dumps(statuses))
"""
    assert result(start(code, tmp_path)) == [0, 0]
    assert shards(tmp_path / "both") == shards(tmp_path / "one")
    assert sum(int((tmp_path / f"{name}.scored").read_text()) for name in ("first", "second")) > 400  # both computed
    for name in ("first", "second"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected(make_dataset(200)), rtol=1e-6)


READ_ONLY = """
dataset = make_dataset(30)
run(dataset, ROOT / "stores", StandIn())
(folder,) = (ROOT / "stores").iterdir()
folder.chmod(0o555)
give_up_rights(folder)
scorer = StandIn()
found, _ = run(dataset, ROOT / "stores", scorer)
try:
    run(make_dataset(31), ROOT / "stores", scorer)
    told = ""
except StoreError as error:
    told = str(error)
print(json.dumps([found.computed, found.chosen.tolist(), told, scorer.prepared, scorer.calls]))
"""


def test_a_store_that_can_only_be_read_serves_what_it_has_and_stops_before_anything_is_computed(tmp_path: Path):
    try:
        computed, chosen, told, prepared, calls = result(start(READ_ONLY, tmp_path))
    finally:
        for path in (tmp_path / "stores").iterdir():
            path.chmod(0o755)
    assert computed == 0
    np.testing.assert_allclose(chosen, expected(make_dataset(30))[0], rtol=1e-6)
    for words in ("PermissionError", "can't be written", "dpo_ext.reference.store"):
        assert words in told
    assert (prepared, calls) == (0, 0)


# The limit on a file's size stands in for the disk: it strikes in the middle of a file, as a disk that runs full does.
FULL = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

class Filling(StandIn):
    def token_log_probs(self, rows, share_prompts):
        if len(self.scored) > 60:
            room(200)
        return super().token_log_probs(rows, share_prompts)

dataset = make_dataset(80)
run(dataset, ROOT / "undisturbed", StandIn())
first = Filling()
try:
    run(dataset, ROOT / "full", first)
    told = ""
except StoreError as error:
    told = str(error)
kept = {name: data.hex() for name, data in shards(ROOT / "full").items()}
again = StandIn()
try:
    run(dataset, ROOT / "full", again)
    still = ""
except StoreError as error:
    still = str(error)
room(resource.RLIM_INFINITY)
rest = StandIn()
found, store = run(dataset, ROOT / "full", rest)
print(json.dumps({
    "told": told, "still": still, "kept": kept, "computed while full": again.calls, "damaged": len(store.damaged),
    "scored": [len(first.scored), len(rest.scored)], "values": [found.chosen.tolist(), found.rejected.tolist()],
}))
"""


def test_a_disk_that_runs_full_stops_with_the_reason_and_with_room_again_the_same_bytes_are_stored(tmp_path: Path):
    done = result(start(FULL, tmp_path))
    whole = shards(tmp_path / "undisturbed")
    for message in (done["told"], done["still"]):
        for words in (str(tmp_path / "full"), "can't be written", "File too large", "make room", "stays valid"):
            assert words in message
    assert done["computed while full"] == 0  # it is said before anything is computed in vain
    kept = {name: bytes.fromhex(data) for name, data in done["kept"].items()}
    assert 2 < len(kept) < len(whole) - 2
    assert kept.items() < whole.items()
    assert shards(tmp_path / "full") == whole
    assert done["damaged"] == 0
    assert not list(tmp_path.rglob(".tmp-*"))
    np.testing.assert_allclose(done["values"], expected(make_dataset(80)), rtol=1e-6)
    # What did not fit, and nothing else, was computed twice.
    first, rest = done["scored"]
    lost = first + rest - 160
    assert 0 < lost < 20


# As torchrun starts them, but forked: one import serves all processes of all runs.
DISTRIBUTED = """
import socket
import accelerate.utils  # before the fork: once for all
from transformers import LlamaConfig, LlamaForCausalLM
from axolotl_dpo_ext.reference.logprobs import AnswerScorer
from axolotl_dpo_ext.reference.probe import choose_batching

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, initializer_range=0.3, **sizes)).eval()
dataset = make_dataset(70)
precompute.PART_PAIRS = 40

scored = []

class Counting(AnswerScorer):
    def token_log_probs(self, rows, share_prompts):
        scored.append(sum(len(row.answers) for row in rows))
        return super().token_log_probs(rows, share_prompts)

def scorer(answers):
    one = Counting(model)
    batching = Batching(choose_batching(AnswerScorer(model), model, answers).share_prompts, 64)
    return one, batching

def failing(answers):
    one, batching = scorer(answers)
    if int(os.environ.get("RANK", "0")) == 1:
        raise ValueError("this process has no model")
    return one, batching

def report(name, rank, scorer, folder=""):
    try:
        processes = Processes()
        store = ReferenceStore(ROOT / name / folder, {})
        found = reference_log_probs(dataset, LogProbDefinition(), store, scorer, processes)
        said = [processes.count, processes.rank, found.computed, found.chosen.tolist(), found.rejected.tolist()]
        said = [sum(scored), *said]
    except Exception as error:
        said = [type(error).__name__, str(error)]
    (ROOT / f"{name}-{rank}.json").write_text(json.dumps(said))

def torchrun(name, scorer, folders=("", "")):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
        )
        children.append(forked(lambda rank=rank: report(name, rank, scorer, folders[rank])))
    return children

def one():
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    report("one", 0, scorer)

runs = torchrun("two", scorer) + torchrun("failing", failing) + torchrun("apart", scorer, ("a", "b")) + [forked(one)]
deadline = time.monotonic() + 200
while runs and time.monotonic() < deadline:
    runs = [child for child in runs if os.waitpid(child, os.WNOHANG)[0] == 0]
    time.sleep(0.01)
for child in runs:
    os.kill(child, signal.SIGKILL)
print(json.dumps(len(runs)))
"""


@pytest.mark.stack
def test_two_processes_store_the_bytes_of_one_and_fail_together(tmp_path: Path):
    hanging = result(start(DISTRIBUTED, tmp_path))
    assert hanging == 0
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one-0", "two-0", "two-1"))
    assert one[:4] == [140, 1, 0, 140]
    assert [said[1:4] for said in two] == [[2, 0, 140], [2, 1, 140]]
    assert two[0][0] + two[1][0] == 140
    assert min(two[0][0], two[1][0]) > 40  # each its share
    assert one[4:] == two[0][4:] == two[1][4:]
    assert len(shards(tmp_path / "one")) > 8
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    first, second = (json.loads((tmp_path / f"failing-{rank}.json").read_text()) for rank in range(2))
    assert first == ["RunStopped", "process 1 of 2 failed: ValueError: this process has no model"]
    assert second == ["ValueError", "this process has no model"]
    # As on two nodes, each with a disk of its own: said before anything is computed.
    for rank, other in ((0, 1), (1, 0)):
        kind, said = json.loads((tmp_path / f"apart-{rank}.json").read_text())
        assert kind == "StoreError"
        assert (
            f"is not one folder for all 2 processes: on {platform.node()} nothing is seen of what processes {other}"
            in said
        )
        assert shards(tmp_path / "apart" / "ab"[rank]) == {}
    assert not list(tmp_path.rglob(".tmp-*"))


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
