"""The store of reference log-probabilities: what is written is read, and what is not as it was written is named."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from axolotl_dpo_ext.reference import store_files
from axolotl_dpo_ext.reference.store import (
    STORE_VARIABLE,
    ReferenceStore,
    StoredRows,
    StoreError,
    root_problem,
    store_root,
)
from axolotl_dpo_ext.reference.store_upkeep import export_store, find_store, plan_pruning, remove, verify_store
from axolotl_dpo_ext.vocabulary import RunStopped
from tests.reference.storing import IDENTITY, a_store, held, some_rows


def test_what_is_stored_is_found_again_by_key_and_nothing_else_is(tmp_path: Path):
    stored, other = some_rows(1000, 1), some_rows(10, 2)
    store = a_store(tmp_path)
    assert len(store) == 0
    assert not list(tmp_path.iterdir()), "a store that was only read creates nothing"
    store.append(stored)
    for opened in (store, ReferenceStore(tmp_path, IDENTITY)):
        assert len(opened) == 1000
        order = np.random.default_rng(3).permutation(1000)
        logps, tokens, found = opened.lookup(np.concatenate([stored.keys[order], other.keys]))
        assert found.tolist() == [True] * 1000 + [False] * 10
        assert (logps[:1000] == stored.logps[order]).all()
        assert (tokens[:1000] == stored.tokens[order]).all()
        assert np.isnan(logps[1000:]).all()
        assert (tokens[1000:] == 0).all()
        assert (logps.dtype, tokens.dtype, found.dtype) == (np.float32, np.int32, np.bool_)


def test_keys_that_begin_or_end_in_zero_bytes_are_different_keys(tmp_path: Path):
    keys = np.zeros((34, 16), np.uint8)
    for place in range(16):
        keys[1 + place, place] = 1
        keys[17 + place, : place + 1] = 255
    keys[33] = 254
    store = a_store(tmp_path)
    store.append(StoredRows(keys, -np.arange(34, dtype=np.float32), np.arange(1, 35, dtype=np.int32)))
    logps, tokens, found = ReferenceStore(tmp_path, IDENTITY).lookup(keys)
    assert found.all()
    assert (-logps).tolist() == list(range(34))
    assert tokens.tolist() == list(range(1, 35))


def test_an_empty_store_and_an_empty_lookup(tmp_path: Path):
    store = a_store(tmp_path)
    assert [len(part) for part in store.lookup(some_rows(3).keys)] == [3, 3, 3]
    assert [len(part) for part in store.lookup(some_rows(0).keys)] == [0, 0, 0]
    assert store.append(some_rows(0)) == store.path
    assert not store.path.exists()


def test_another_identity_is_another_store(tmp_path: Path):
    store = a_store(tmp_path, 1)
    changed = {**IDENTITY, "model": {"name": "lab/llama", "weights": "ab" * 31 + "ac"}}
    assert not held(ReferenceStore(tmp_path, changed), some_rows(8, 1))
    reordered = dict(reversed(IDENTITY.items()))
    assert held(ReferenceStore(tmp_path, reordered), some_rows(8, 1))
    assert ReferenceStore.at(store.path).identity == IDENTITY


def test_equal_rows_make_one_file_in_whatever_order_and_however_often(tmp_path: Path):
    rows = some_rows(50)
    store = a_store(tmp_path)
    backwards = rows[np.arange(50)[::-1]]
    assert store.append(rows) == store.append(backwards) == ReferenceStore(tmp_path, IDENTITY).append(rows)
    assert len(store_files.shard_names(store.path)) == 1
    assert len(store) == 50


def test_refresh_reads_what_others_wrote_and_nothing_twice(tmp_path: Path):
    first, second = a_store(tmp_path), a_store(tmp_path)
    path = first.append(some_rows(8, 1))
    assert not held(second, some_rows(8, 1))
    second.refresh()
    assert held(second, some_rows(8, 1))
    path.write_bytes(b"would show as damaged if it were read again")
    first.append(some_rows(8, 2))
    second.refresh()
    assert second.damaged == []
    assert held(second, some_rows(8, 1))
    assert held(second, some_rows(8, 2))


@pytest.mark.parametrize(
    ("logp", "tokens"), [(float("nan"), 5), (float("-inf"), 5), (float("inf"), 5), (-1.0, 0), (-1.0, -3)]
)
def test_values_that_cannot_be_right_are_refused_by_key(tmp_path: Path, logp: float, tokens: int):
    rows = some_rows(8)
    rows.logps[3], rows.tokens[3] = logp, tokens
    store = a_store(tmp_path)
    with pytest.raises(StoreError, match=f"row {rows.keys[3].tobytes().hex()}"):
        store.append(rows)
    assert not store.path.exists()

    # And one that got there all the same, with a right name, is not read.
    store.append(some_rows(8, 1))
    name, data = store_files.shard_file(rows, store.path.name)
    (store.path / name).write_bytes(data)
    opened = ReferenceStore(tmp_path, IDENTITY)
    assert [file.path.name for file in opened.damaged] == [name]
    assert rows.keys[3].tobytes().hex() in opened.damaged[0].reason
    assert len(opened) == 8


def test_arrays_that_do_not_fit_together_are_an_error(tmp_path: Path):
    rows, store = some_rows(8), a_store(tmp_path)
    with pytest.raises(ValueError, match="8 keys"):
        store.append(StoredRows(rows.keys, rows.logps[:7], rows.tokens))
    with pytest.raises(ValueError, match=r"shape \(N, 16\)"):
        store.lookup(rows.keys[:, :15])


def test_values_that_differ_like_two_computations_come_from_the_first_shard_by_name(tmp_path: Path):
    rows = some_rows(500)
    other = StoredRows(rows.keys, rows.logps * np.float32(1.002), rows.tokens)
    paths = {a_store(tmp_path / "a").append(part).name: part for part in (rows, other)}
    # Written in one order and in the other, read by a process that starts afterwards.
    for root, order in (("b", (rows, other)), ("c", (other, rows))):
        store = ReferenceStore(tmp_path / root, IDENTITY)
        for part in order:
            store.append(part)
        assert held(store, order[0]), "a value once read does not change"
        opened = ReferenceStore(tmp_path / root, IDENTITY)
        assert held(opened, paths[min(paths)])
        assert len(opened) == 500
        assert verify_store(store.path).damaged == ()


@pytest.mark.parametrize("change", ["tokens", "logps"])
def test_shards_that_contradict_each_other_stop_the_run_and_can_be_pruned(tmp_path: Path, change: str):
    sound, rows = some_rows(8, 1), some_rows(8, 2)
    changed = {"tokens": StoredRows(rows.keys, rows.logps, rows.tokens + 1),
               "logps": StoredRows(rows.keys, rows.logps - 20, rows.tokens)}[change]  # fmt: skip
    store = a_store(tmp_path)
    named = {store.append(part).name for part in (rows, changed)}
    with pytest.raises(StoreError) as caught:
        store.lookup(rows.keys)
    kept = ReferenceStore(tmp_path / "x", IDENTITY).append(sound)
    (store.path / kept.name).write_bytes(kept.read_bytes())
    with pytest.raises(StoreError) as reopened:
        ReferenceStore(tmp_path, IDENTITY)
    for error in (caught, reopened):
        assert all(name in str(error.value) for name in named)
        assert kept.name not in str(error.value)
        assert "--damaged" in str(error.value)
    summary = verify_store(store.path)
    assert {file.path.name for file in summary.damaged} == named
    assert summary.rows == 8
    remove(plan_pruning(tmp_path, [store.path], damaged=True))
    opened = ReferenceStore(tmp_path, IDENTITY)
    assert held(opened, sound)
    assert not held(opened, rows)


def test_one_value_twice_in_one_batch_is_stored_once_and_two_values_are_refused(tmp_path: Path):
    rows = some_rows(8)
    twice = StoredRows(*(np.concatenate([part, part]) for part in (rows.keys, rows.logps, rows.tokens)))
    store = a_store(tmp_path)
    store.append(twice)
    assert len(store) == 8
    twice.tokens[8:] += 1
    with pytest.raises(StoreError, match="twice"):
        store.append(twice)


def test_the_place_is_the_setting_then_the_environment_then_beside_the_hub_cache(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv(STORE_VARIABLE, raising=False)
    assert store_root() == tmp_path / "hf" / "dpo_reference"
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "variable"))
    assert store_root() == tmp_path / "variable"
    assert store_root(tmp_path / "setting") == tmp_path / "setting"
    assert store_root("~/x") == Path.home() / "x"
    monkeypatch.setenv(STORE_VARIABLE, "")
    assert store_root() == tmp_path / "hf" / "dpo_reference"


def test_a_place_that_cannot_be_written_is_told_early_with_what_to_change(tmp_path: Path):
    occupied = tmp_path / "file"
    occupied.write_text("no folder")
    store = ReferenceStore(occupied / "below", IDENTITY)
    for write in (store.marked().__enter__, lambda: store.append(some_rows(1))):
        with pytest.raises(StoreError) as caught:
            write()
        for part in (str(store.path), "NotADirectoryError", "dpo_ext.reference.store", STORE_VARIABLE):
            assert part in str(caught.value)
        assert "fix: remove or rename it" in str(caught.value)


def test_a_root_where_no_store_can_be_is_a_problem_of_the_setting_that_names_it(tmp_path: Path, monkeypatch):
    file, broken = tmp_path / "file", tmp_path / "broken"
    file.write_text("no folder")
    broken.symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv(STORE_VARIABLE, str(file))
    for setting, path in ((str(file), file), (str(file / "below"), file), (str(broken), broken), (None, file)):
        problem = root_problem(setting)
        assert problem is not None
        assert problem.setting == ("dpo_ext.reference.store" if setting else STORE_VARIABLE)
        assert problem.reason == f"{path} is there, and is no folder"
        assert problem.fix.startswith("remove or rename it")
    for fine in (tmp_path, tmp_path / "a" / "b"):
        assert root_problem(str(fine)) is None
    assert sorted(tmp_path.iterdir()) == [broken, file]


def test_a_root_that_can_only_be_read_is_none_unless_it_has_to_be_made(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda _path, rights: not rights & os.W_OK)
    assert root_problem(str(tmp_path)) is None
    problem = root_problem(str(tmp_path / "absent"))
    assert problem is not None
    assert problem.reason == f"it does not exist, and {tmp_path} can't be written"
    monkeypatch.setattr(os, "access", lambda _path, _rights: False)
    problem = root_problem(str(tmp_path))
    assert problem is not None
    assert problem.reason == f"{tmp_path} can't be read"


def test_a_place_that_can_be_written_is_left_without_a_trace_of_the_probe(tmp_path: Path):
    store = a_store(tmp_path)
    with store.marked():
        assert len(list(store.path.iterdir())) == 2
    assert [path.name for path in store.path.iterdir()] == ["identity.json"]


def test_opening_is_remembered_as_last_used(tmp_path: Path):
    store = a_store(tmp_path, 1)
    long_ago = time.time() - 100 * 86_400
    for path in store.path.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert [each.path for each in plan_pruning(tmp_path, unused_days=30)] == [store.path]
    ReferenceStore(tmp_path, IDENTITY)
    assert plan_pruning(tmp_path, unused_days=30) == []


def test_pruning_takes_old_leftovers_of_killed_writers_and_no_young_ones(tmp_path: Path):
    store = a_store(tmp_path, 1)
    old, young = store.path / ".tmp-1-old", store.path / ".tmp-2-young"
    folder = tmp_path / ".tmp-3-half-removed-store"
    folder.mkdir()
    for path in (old, young, folder / "shard"):
        path.write_bytes(b"12345")
    os.utime(old, (1, 1))
    os.utime(folder, (1, 1))
    plan = plan_pruning(tmp_path, damaged=True)
    assert {(each.path, each.size) for each in plan} == {(old, 5), (folder, 5)}
    remove(plan)
    assert not old.exists()
    assert not folder.exists()
    assert young.exists()
    assert held(ReferenceStore(tmp_path, IDENTITY), some_rows(8, 1))


def test_a_prefix_names_a_store_only_if_no_other_begins_so(tmp_path: Path):
    for name in ("ab" * 16, "ac" * 16):
        (tmp_path / name).mkdir()
    assert find_store(tmp_path, "ab").name == "ab" * 16
    for prefix in ("a", "b", ""):
        with pytest.raises(ValueError, match=r"stores under|no store"):
            find_store(tmp_path, prefix)


def test_a_store_that_is_removed_while_open_is_started_anew(tmp_path: Path):
    store = a_store(tmp_path, 1)
    remove(plan_pruning(tmp_path, [store.path]))
    assert not store.path.exists()
    store.append(some_rows(8, 2))
    opened = ReferenceStore(tmp_path, IDENTITY)
    assert held(opened, some_rows(8, 2))
    assert not held(opened, some_rows(8, 1))


def test_an_export_that_fails_leaves_no_file(tmp_path: Path):
    store = a_store(tmp_path, 1)
    with pytest.raises(ValueError, match=r"\.parquet, \.jsonl"):
        export_store(store.path, tmp_path / "rows.csv")
    with pytest.raises(OSError, match="no folder"):
        export_store(store.path, tmp_path / "absent" / "rows.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == [store.path.name]


def test_a_store_error_ends_a_run_and_travels_between_processes():
    error = pickle.loads(pickle.dumps(StoreError("found\n    why: reason\n    fix: change")))
    assert isinstance(error, RunStopped)
    assert "why: reason" in str(error)


def test_importing_the_store_loads_no_torch():
    code = "import sys, axolotl_dpo_ext.reference.store, axolotl_dpo_ext.reference.store_upkeep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def large_and_small(tmp_path_factory):
    roots = {}
    for count in (1_000_000, 10_000):
        roots[count] = tmp_path_factory.mktemp(f"rows{count}")
        store = ReferenceStore(roots[count], IDENTITY)
        rows = some_rows(count)
        for start in range(0, count, 5000):
            store.append(rows[np.arange(start, start + 5000)])
    return roots


def test_a_million_rows_cost_as_much_a_row_as_ten_thousand(large_and_small):
    seconds = {}
    for count, root in large_and_small.items():
        keys = some_rows(count).keys
        runs = []
        for _ in range(3):
            start = time.process_time()
            found = ReferenceStore(root, IDENTITY).lookup(keys)[2]
            runs.append((time.process_time() - start) / count)
            assert found.all()
        seconds[count] = min(runs)
    # A search goes deeper and leaves the processor's cache; without an index the factor would be 100.
    assert seconds[1_000_000] < 10 * seconds[10_000]
    assert seconds[1_000_000] * 1_000_000 < 5


def test_a_row_takes_24_bytes_of_memory(large_and_small):
    tracemalloc.start()
    try:
        store = ReferenceStore(large_and_small[1_000_000], IDENTITY)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store) == 1_000_000
    assert now < 26 * 1_000_000
    assert peak < 120 * 1_000_000
