"""The store under kill -9, several writers, a read-only folder and a full disk: real processes, real limits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from axolotl_dpo_ext.reference.store import ReferenceStore
from axolotl_dpo_ext.reference.store_upkeep import export_store, verify_store
from tests.reference import child_processes

# What every process below begins with: a deterministic "reference model" for shard number i of a data set.
PRELUDE = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from axolotl_dpo_ext.reference.store import ReferenceStore, StoredRows, StoreError
from tests.reference.child_processes import give_up_rights, killed

ROOT, IDENTITY = Path(sys.argv[1]), {"model": "m"}

def rows(i, count=50):
    generator = np.random.default_rng(i)
    keys = generator.integers(0, 256, (count, 16), dtype=np.uint8)
    return StoredRows(keys, -100 * generator.random(count, dtype=np.float32), np.full(count, 1 + i, np.int32))

def precompute(shards, tell=lambda word, i: None):
    store = ReferenceStore(ROOT, IDENTITY)
    for i in shards:
        wanted = rows(i)
        if not store.lookup(wanted.keys)[2].all():
            tell("begun", i)
            store.append(wanted)
            tell("stored", i)
    return store
"""

IDENTITY = {"model": "m"}


def start(code: str, root: Path, *arguments: object) -> subprocess.Popen[str]:
    return child_processes.start(PRELUDE + code, root, *arguments)


def result(process: subprocess.Popen[str]) -> object:
    return child_processes.result(process, timeout=300)


def content(root: Path) -> bytes:
    """What an export of the one store under a root holds."""
    (path,) = [path for path in root.iterdir() if path.is_dir()]
    export_store(path, root / "rows.jsonl")
    return (root / "rows.jsonl").read_bytes()


# Forks the writer instead of starting it anew: a moment costs milliseconds, and the kill is the same.
KILL = """
SHARDS = 240

def write(send):
    precompute(range(SHARDS), lambda word, i: os.write(send, f"{word} {i}\\n".encode()))

random.seed(int(sys.argv[2]))
rounds = []
while len(rounds) < 40 or (not rounds[-1]["temporary"] and len(rounds) < 80):
    after = random.randrange(0, 9)
    told, was_killed = killed(write, lambda told: told.count(b"\\n") >= after, 0.003)
    told = [line.split() for line in told.decode().splitlines()]
    begun = [int(i) for word, i in told if word == "begun"]
    stored = [int(i) for word, i in told if word == "stored"]
    store = ReferenceStore(ROOT, IDENTITY)
    rounds.append({
        "killed": was_killed,
        "begun": len(begun),
        "lost": [i for i in begun if not store.lookup(rows(i).keys)[2].all()],
        "lost_although_stored": [i for i in stored if not store.lookup(rows(i).keys)[2].all()],
        "rows": len(store),
        "damaged": len(store.damaged),
        "temporary": len(list(store.path.glob(".tmp-*"))),
    })
precompute(range(SHARDS))
print(json.dumps(rounds))
"""


def test_killed_at_any_moment_at_most_one_shard_is_lost_and_the_end_is_the_same(tmp_path: Path):
    seed = int.from_bytes(os.urandom(4))
    (tmp_path / "killed").mkdir()
    (tmp_path / "undisturbed").mkdir()
    undisturbed = start("precompute(range(240)); print(1)", tmp_path / "undisturbed")
    rounds = result(start(KILL, tmp_path / "killed", seed))
    result(undisturbed)
    about = f"seed {seed}"
    assert sum(each["killed"] and each["rows"] < 240 * 50 for each in rounds) >= 20, about
    assert sum(each["begun"] > 0 for each in rounds) >= 10, about
    # Some kills must have struck while a file was written, or this test shows nothing.
    assert rounds[-1]["temporary"] > 0, about
    for each in rounds:
        assert len(each["lost"]) <= 1, about
        assert each["lost_although_stored"] == [], about
        assert each["damaged"] == 0, about
        assert each["rows"] % 50 == 0, about
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed"), about


def shards(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.glob("*/shard-*")}


def test_writers_at_once_store_everything_once(tmp_path: Path):
    wait = "\nwhile not Path(sys.argv[2]).exists(): time.sleep(0.001)\n"
    write = wait + "precompute(json.loads(sys.argv[3])); print(1)"
    # Disjoint at both ends, the same in the middle, in opposite order.
    forward, backward = list(range(60)), list(range(79, 19, -1))
    root, go = tmp_path / "both", tmp_path / "go"
    writers = [start(write, root, go, order) for order in (forward, backward)]
    readers = [start(wait + """
counts = []
while not counts or counts[-1] < 80 * 50:
    store = ReferenceStore(ROOT, IDENTITY)
    assert not store.damaged
    counts.append(len(store))
print(json.dumps(counts))
""", root, go)]  # fmt: skip
    go.touch()
    for process in writers:
        result(process)
    counts = result(readers[0])
    assert counts == sorted(counts)
    result(start("precompute(range(80)); print(1)", tmp_path / "one"))
    assert shards(root) == shards(tmp_path / "one")
    assert len(shards(root)) == 80
    assert content(root) == content(tmp_path / "one")


READ_ONLY = """
give_up_rights(next(ROOT.iterdir()))
store = ReferenceStore(ROOT, IDENTITY)
found = bool(store.lookup(rows(1).keys)[2].all())
told = []
for write in (store.marked().__enter__, lambda: store.append(rows(2))):
    try:
        write()
        told.append("")
    except StoreError as error:
        told.append(str(error))
print(json.dumps([found, told, bool(store.lookup(rows(2).keys)[2].any())]))
"""


def test_a_read_only_folder_is_read_and_a_write_says_what_to_change(tmp_path: Path):
    result(start("precompute([1]); print(1)", tmp_path / "root"))
    (path,) = (tmp_path / "root").iterdir()
    path.chmod(0o555)
    try:
        found, told, found_unwritten = result(start(READ_ONLY, tmp_path / "root"))
    finally:
        path.chmod(0o755)
    assert found is True
    assert found_unwritten is False
    for message in told:
        assert "PermissionError" in message
        assert str(path) in message
        assert "dpo_ext.reference.store" in message


FULL = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = precompute([1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
told = []
for write in (store.marked().__enter__, lambda: store.append(rows(2, count=500))):
    try:
        write()
        told.append("")
    except StoreError as error:
        told.append(str(error))
left = sorted(path.name for path in store.path.iterdir())
still = [bool(store.lookup(rows(i).keys)[2].all()) for i in (1, 2)]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.append(rows(2, count=500))
print(json.dumps([told, left, still, len(ReferenceStore(ROOT, IDENTITY))]))
"""


def test_a_full_disk_stops_with_the_reason_and_keeps_what_was_stored(tmp_path: Path):
    told, left, still, rows_after = result(start(FULL, tmp_path / "root"))
    for message in told:
        assert "File too large" in message
        assert "what is stored already stays valid" in message
    assert [name.partition("-")[0] for name in left] == ["identity.json", "shard"]
    assert still == [True, False]
    assert rows_after == 550


def test_a_device_that_is_full_from_the_start_leaves_nothing_that_stops_the_next_run(tmp_path: Path):
    code = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    precompute([1])
    print(json.dumps(""))
except StoreError as error:
    print(json.dumps(str(error)))
"""
    assert "File too large" in result(start(code, tmp_path / "root"))
    (path,) = (tmp_path / "root").iterdir()
    assert list(path.iterdir()) == []
    assert verify_store(path).damaged == ()
    assert len(ReferenceStore(tmp_path / "root", IDENTITY)) == 0
    result(start("precompute([1]); print(1)", tmp_path / "root"))
    assert len(ReferenceStore(tmp_path / "root", IDENTITY)) == 50
