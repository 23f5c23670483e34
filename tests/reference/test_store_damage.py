"""Damaged, foreign and newer files of a store are named, not used, and pruned or healed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from axolotl_dpo_ext.reference import store_files
from axolotl_dpo_ext.reference.durable import sealed, unsealed
from axolotl_dpo_ext.reference.store import (
    ReferenceStore,
    StoreError,
)
from axolotl_dpo_ext.reference.store_upkeep import plan_pruning, remove, verify_store
from tests.reference.storing import IDENTITY, a_store, held, some_rows


def flips(path: Path, per_byte: int = 1) -> list[tuple[int, bytes]]:
    """The file's content with one bit changed: at every byte, in bits that go round."""
    content = path.read_bytes()
    found = []
    for place in range(len(content)):
        for bit in range(per_byte):
            changed = bytearray(content)
            changed[place] ^= 1 << ((place + bit) % 8)
            found.append((place, bytes(changed)))
    return found


def test_a_flipped_bit_anywhere_in_a_shard_is_found_and_its_rows_are_absent(tmp_path: Path):
    store = a_store(tmp_path, 1, 2)
    path = store.append(some_rows(8, 3))
    for place, content in flips(path):
        path.write_bytes(content)
        opened = ReferenceStore(tmp_path, IDENTITY)
        assert [file.path for file in opened.damaged] == [path], place
        assert not opened.lookup(some_rows(8, 3).keys)[2].any(), place
        assert held(opened, some_rows(8, 1))
        assert held(opened, some_rows(8, 2))


def test_a_truncated_or_extended_shard_is_found(tmp_path: Path):
    store = a_store(tmp_path, 1)
    path = store.append(some_rows(8, 3))
    content = path.read_bytes()
    for changed in [content[:size] for size in (0, 1, 7, 8, 40, len(content) - 1)] + [content + b"\0"]:
        path.write_bytes(changed)
        opened = ReferenceStore(tmp_path, IDENTITY)
        assert [file.path for file in opened.damaged] == [path], len(changed)
        assert len(opened) == 8


def test_a_damaged_shard_is_told_once_and_healed_by_the_same_rows_for_every_process(tmp_path: Path, caplog):
    store = a_store(tmp_path, 1)
    path = store.append(some_rows(8, 3))
    path.write_bytes(path.read_bytes()[:-1])
    here, elsewhere = ReferenceStore(tmp_path, IDENTITY), ReferenceStore(tmp_path, IDENTITY)
    elsewhere.refresh()
    told = [record for record in caplog.records if path.name in record.getMessage()]
    assert len(told) == 2, "once by each"
    assert "computed again" in told[0].getMessage()
    assert here.append(some_rows(8, 3)) == path
    assert held(here, some_rows(8, 3))
    elsewhere.refresh()
    assert held(elsewhere, some_rows(8, 3))
    assert here.damaged == elsewhere.damaged == []


def test_a_flipped_bit_anywhere_in_the_identity_stops_with_the_files_name(tmp_path: Path):
    store = a_store(tmp_path, 1)
    path = store.path / "identity.json"
    original = path.read_bytes()
    for place, content in flips(path, per_byte=3):
        path.write_bytes(content)
        with pytest.raises(StoreError) as caught:
            ReferenceStore(tmp_path, IDENTITY)
        assert str(path) in str(caught.value), place
        assert verify_store(store.path).damaged, place
    for size in (0, 1, len(original) // 2, len(original) - 1):
        path.write_bytes(original[:size])
        with pytest.raises(StoreError, match=r"identity\.json"):
            ReferenceStore(tmp_path, IDENTITY)


def test_a_damaged_identity_can_be_pruned_and_no_value_is_lost_with_it(tmp_path: Path):
    store = a_store(tmp_path, 1)
    path = store.path / "identity.json"
    path.write_bytes(b"{")
    remove(plan_pruning(tmp_path, damaged=True))
    assert not path.exists()
    with pytest.raises(StoreError, match=r"no identity\.json"):
        ReferenceStore.at(store.path)
    opened = ReferenceStore(tmp_path, IDENTITY)
    assert held(opened, some_rows(8, 1))
    assert held(ReferenceStore.at(store.path), some_rows(8, 1))


def test_a_lost_identity_is_named_and_written_again_by_the_next_run_that_only_reads(tmp_path: Path):
    store = a_store(tmp_path, 1)
    (store.path / "identity.json").unlink()
    (lost,) = verify_store(store.path).damaged
    assert lost.path == store.path / "identity.json"
    assert "missing" in lost.reason
    assert plan_pruning(tmp_path, damaged=True) == []  # there is nothing to remove
    for path in store.path.iterdir():
        os.utime(path, (1e9, 1e9))
    assert held(ReferenceStore(tmp_path, IDENTITY), some_rows(8, 1))
    assert verify_store(store.path).damaged == ()
    assert plan_pruning(tmp_path, unused_days=30) == []
    assert held(ReferenceStore.at(store.path), some_rows(8, 1))


def test_reading_shards_without_an_identity_needs_no_right_to_write_it(tmp_path: Path, monkeypatch):
    store = a_store(tmp_path, 1)
    (store.path / "identity.json").unlink()

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("axolotl_dpo_ext.reference.store.write_whole", refuse)
    assert held(ReferenceStore(tmp_path, IDENTITY), some_rows(8, 1))


def test_the_identity_of_another_store_is_named_as_foreign(tmp_path: Path):
    store = a_store(tmp_path, 1)
    other = ReferenceStore(tmp_path, {"model": "another"})
    other.append(some_rows(8))
    (store.path / "identity.json").write_bytes((other.path / "identity.json").read_bytes())
    with pytest.raises(StoreError, match="foreign"):
        ReferenceStore(tmp_path, IDENTITY)


def test_a_shard_of_another_store_is_named_as_foreign_and_not_used(tmp_path: Path):
    store = a_store(tmp_path, 1)
    other = ReferenceStore(tmp_path, {"model": "another"}).append(some_rows(8, 2))
    copy = store.path / other.name
    copy.write_bytes(other.read_bytes())
    opened = ReferenceStore(tmp_path, IDENTITY)
    assert [file.path for file in opened.damaged] == [copy]
    assert other.parent.name in opened.damaged[0].reason
    assert not held(opened, some_rows(8, 2))
    assert held(opened, some_rows(8, 1))


def test_files_of_a_newer_version_are_named_so_and_never_pruned_as_damaged(tmp_path: Path, monkeypatch):
    store = a_store(tmp_path, 1)
    monkeypatch.setattr(store_files, "FORMAT", 2)
    name, data = store_files.shard_file(some_rows(8, 2), store.path.name)
    monkeypatch.undo()
    (store.path / name).write_bytes(data)
    opened = ReferenceStore(tmp_path, IDENTITY)
    assert "format version is 2" in opened.damaged[0].reason
    assert not held(opened, some_rows(8, 2))

    path = store.path / "identity.json"
    path.write_bytes(sealed({**unsealed(path.read_bytes()), "format": 2}))
    with pytest.raises(StoreError, match="format version is 2") as caught:
        ReferenceStore(tmp_path, IDENTITY)
    assert "update the package" in str(caught.value)
    assert len(verify_store(store.path).damaged) == 2
    assert plan_pruning(tmp_path, damaged=True) == []


def test_a_file_with_a_shards_name_that_is_no_shard_is_named(tmp_path: Path):
    store = a_store(tmp_path, 1)
    rows = some_rows(8, 2)
    no_metadata = save({"keys": rows.keys, "logps": rows.logps, "tokens": rows.tokens})
    metadata = {"dpo_reference": f'{{"format":1,"store":"{store.path.name}"}}'}
    other_types = save({"keys": rows.keys, "logps": rows.logps.astype(np.float64), "tokens": rows.tokens}, metadata)
    fewer_values = save({"keys": rows.keys, "logps": rows.logps[:7], "tokens": rows.tokens}, metadata)
    contents = [b"", b"[]", b"\x02\0\0\0\0\0\0\0[]", no_metadata, other_types, fewer_values]
    for content in contents:
        (store.path / f"shard-{store_files._checksum(content)}.safetensors").write_bytes(content)
    opened = ReferenceStore(tmp_path, IDENTITY)
    assert len(opened.damaged) == len(contents)
    assert all("no shard" in file.reason for file in opened.damaged)
    assert len(opened) == 8
