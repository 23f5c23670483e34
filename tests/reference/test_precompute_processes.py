"""A precompute that is killed, that runs out of disk, or that several processes share ends with the same bytes, or with a reason."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reference import child_processes
from tests.reference.precomputing import expected, make_dataset, shards

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
from tests.reference.precomputing import StandIn, make_dataset, run, shards

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
