"""The identity of weights: content decides, wherever the files lie, and nothing is hashed twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save_file

from axolotl_dpo_ext.reference import weights
from axolotl_dpo_ext.reference.durable import sealed, unsealed
from axolotl_dpo_ext.reference.store import STORE_VARIABLE
from axolotl_dpo_ext.reference.store_files import shard_names
from axolotl_dpo_ext.reference.store_upkeep import list_stores
from axolotl_dpo_ext.reference.weights import WeightsNotFoundError, weight_files, weights_digest
from axolotl_dpo_ext.vocabulary import RunStopped

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "stores"))
    return tmp_path / "stores" / "weights"


@pytest.fixture
def later(monkeypatch):
    """The clock of a start some time after the files were written: nobody can set a file's ctime."""
    now = weights.time.time
    monkeypatch.setattr(weights.time, "time", lambda: now() + 60)


def a_checkpoint(folder: Path, *names: str, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for name in names or ("model.safetensors",):
        save_file({"weight": random.random((16, 16), dtype=np.float32)}, folder / name)
    return folder


def a_sharded_checkpoint(folder: Path) -> Path:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    a_checkpoint(folder, *names)
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1], "c": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def in_the_hub_cache(tmp_path: Path, monkeypatch, checkpoint: Path, blob_names: dict[str, str] | None = None) -> str:
    """Lays a checkpoint out as the hub's cache does, under the name lab/model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--lab--model"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for path in checkpoint.iterdir():
        blob = (blob_names or {}).get(path.name) or hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, repo / "blobs" / blob)
        (repo / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{blob}")
    return "lab/model"


@pytest.mark.parametrize("make", [a_checkpoint, a_sharded_checkpoint])
def test_content_decides_and_not_the_place_or_the_time(tmp_path: Path, make):
    digest = weights_digest(str(make(tmp_path / "a")))
    assert weights_digest(str(make(tmp_path / "elsewhere" / "b"))) == digest
    (tmp_path / "a" / "README.md").write_text("not a weight")
    for path in (tmp_path / "a").iterdir():
        os.utime(path, (1, 1))
    assert weights_digest(str(tmp_path / "a")) == digest
    assert len(digest) == 64


def test_one_bit_of_any_file_is_another_digest(tmp_path: Path, later):
    folder = a_sharded_checkpoint(tmp_path / "a")
    digests = {weights_digest(str(folder))}
    for path in weight_files(folder):
        before = path.stat()
        flip_a_bit(path)
        # As tar, rsync and images do: the time of another file. What the kernel keeps shows it all the same.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
        digests.add(weights_digest(str(folder)))
    assert len(digests) == 3


def test_swapped_files_are_another_digest(tmp_path: Path):
    folder = a_sharded_checkpoint(tmp_path / "a")
    digest = weights_digest(str(folder))
    first, second = weight_files(folder)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    assert weights_digest(str(folder)) != digest


def test_the_digest_is_remembered_and_used(tmp_path: Path, memory: Path, later):
    folder = a_checkpoint(tmp_path / "a")
    digest = weights_digest(str(folder))
    (entry,) = memory.iterdir()
    content = unsealed(entry.read_bytes())
    assert content["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    # Only who trusts what is remembered is fooled by this: so the file was not hashed again.
    entry.write_bytes(sealed({**content, "sha256": "0" * 64}))
    assert weights_digest(str(folder)) != digest
    # It is remembered there and nowhere else.
    assert weights_digest(str(folder), remember_in=tmp_path / "other") == digest
    assert len(list((tmp_path / "other" / "weights").iterdir())) == 1


def test_what_is_remembered_is_no_store(tmp_path: Path, memory: Path, later):
    weights_digest(str(a_checkpoint(tmp_path / "a")))
    assert memory.is_dir()
    assert list_stores(memory.parent) == []
    assert shard_names(memory) == []


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, memory: Path):
    folder = a_checkpoint(tmp_path / "a")
    os.utime(folder / "model.safetensors", (1, 1))
    weights_digest(str(folder))
    assert not memory.exists()


def test_a_changed_byte_or_a_cut_in_what_is_remembered_is_not_trusted(tmp_path: Path, memory: Path, later):
    folder = a_checkpoint(tmp_path / "a")
    digest = weights_digest(str(folder))
    (entry,) = memory.iterdir()
    original = entry.read_bytes()
    for place in range(len(original)):
        changed = bytearray(original)
        changed[place] ^= 1 << (place % 8)
        entry.write_bytes(changed)
        assert weights_digest(str(folder)) == digest, place
        assert entry.read_bytes() == original, "written anew"
    for size in (0, 1, len(original) // 2):
        entry.write_bytes(original[:size])
        assert weights_digest(str(folder)) == digest


def test_what_is_remembered_of_another_file_is_not_taken(tmp_path: Path, memory: Path, later):
    first, second = a_checkpoint(tmp_path / "a"), a_checkpoint(tmp_path / "b", seed=1)
    digests = [weights_digest(str(folder)) for folder in (first, second)]
    entries = list(memory.iterdir())
    contents = [entry.read_bytes() for entry in entries]
    for entry, content in zip(entries, reversed(contents), strict=True):
        entry.write_bytes(content)
    assert [weights_digest(str(folder)) for folder in (first, second)] == digests
    assert digests[0] != digests[1]


def test_a_memory_that_cannot_be_written_only_costs_time(tmp_path: Path, memory: Path, later, caplog):
    memory.parent.parent.mkdir(exist_ok=True)
    memory.parent.write_text("no folder")
    caplog.set_level("INFO", logger=weights.__name__)
    folder = a_checkpoint(tmp_path / "a")
    assert weights_digest(str(folder)) == weights_digest(str(folder), remember_in=tmp_path / "other")
    assert "model.safetensors is not remembered" in caplog.text


def test_a_file_of_the_hub_cache_has_the_hubs_digest_and_is_not_read(tmp_path: Path, monkeypatch, memory: Path, later):
    name = in_the_hub_cache(tmp_path, monkeypatch, a_sharded_checkpoint(tmp_path / "a"))
    # The digest of a copy outside the cache, which is hashed, is the same.
    assert weights_digest(name) == weights_digest(str(tmp_path / "a"))
    assert weights_digest(name, revision="main") == weights_digest(name, revision=COMMIT) == weights_digest(name)
    assert len(list(memory.iterdir())) == 2, "those of the copy"
    digest = weights_digest(name)
    for blob in (tmp_path / "hub").glob("*/blobs/*"):
        if blob.stat().st_size > 1000:
            blob.write_bytes(b"would give another digest if it were read")
    assert weights_digest(name) == digest


def test_a_small_file_of_the_hub_cache_without_a_sha256_name_is_hashed(tmp_path: Path, monkeypatch):
    checkpoint = a_checkpoint(tmp_path / "a")
    # Files that are not in LFS are named by their git digest.
    name = in_the_hub_cache(tmp_path, monkeypatch, checkpoint, {"model.safetensors": "ab" * 20})
    assert weights_digest(name) == weights_digest(str(checkpoint))


def test_a_link_into_a_folder_that_is_not_the_hubs_is_hashed(tmp_path: Path):
    checkpoint = a_checkpoint(tmp_path / "a")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    shutil.move(checkpoint / "model.safetensors", checkpoint / ("ab" * 32))
    (tmp_path / "link" / "model.safetensors").unlink()
    (tmp_path / "link" / "model.safetensors").symlink_to(checkpoint / ("ab" * 32))
    assert weights_digest(str(tmp_path / "link")) == weights_digest(str(a_checkpoint(tmp_path / "c")))


def test_the_network_is_never_asked(tmp_path: Path, monkeypatch):
    asked: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network")

    name = in_the_hub_cache(tmp_path, monkeypatch, a_checkpoint(tmp_path / "a"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert weights_digest(name)
    for absent, revision in ((name, "v2"), ("lab/absent", None), ("/no/such/folder", None), ("~x y", None)):
        with pytest.raises(WeightsNotFoundError) as caught:
            weights_digest(absent, revision=revision)
        assert absent in str(caught.value)
        assert str(tmp_path / "hub") in str(caught.value)
        assert (revision or "") in str(caught.value)
        assert isinstance(caught.value, RunStopped)
    assert asked == []


@pytest.mark.parametrize(
    ("present", "read"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (["adapter_model.safetensors"], ["adapter_model.safetensors"]),
        (["adapter_model.bin"], ["adapter_model.bin"]),
        (["model.safetensors", "adapter_model.safetensors"], ["model.safetensors", "adapter_model.safetensors"]),
        (["model.safetensors", "consolidated.safetensors", "optimizer.bin"], ["model.safetensors"]),
    ],
)
def test_the_files_are_those_that_are_loaded(tmp_path: Path, present: list[str], read: list[str]):
    folder = a_checkpoint(tmp_path / "a", *present)
    assert [path.name for path in weight_files(folder)] == read
    digest = weights_digest(str(folder))
    for name in present:
        flip_a_bit(folder / name)
        changed = weights_digest(str(folder))
        assert (changed != digest) == (name in read), name
        digest = changed


def test_a_single_file_beside_an_index_is_what_transformers_loads(tmp_path: Path):
    folder = a_checkpoint(a_sharded_checkpoint(tmp_path / "a"))
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
    (folder / "config.json").write_text(json.dumps({"transformers_weights": "model-00001-of-00002.safetensors"}))
    assert [path.name for path in weight_files(folder)] == ["model-00001-of-00002.safetensors"]


def test_an_old_sharded_checkpoint(tmp_path: Path):
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    folder = a_checkpoint(tmp_path / "a", *names)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    )
    assert [path.name for path in weight_files(folder)] == names


def test_what_is_missing_is_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsNotFoundError, match=r"none of .*model\.safetensors.*adapter_model\.safetensors"):
        weights_digest(str(tmp_path / "empty"))
    folder = a_sharded_checkpoint(tmp_path / "a")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"lacks model-00002-of-00002\.safetensors"):
        weights_digest(str(folder))
    for content in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(WeightsNotFoundError, match=r"index\.json names no weight files"):
            weights_digest(str(folder))


def test_hashing_a_large_file_shows_progress_and_a_small_one_does_not(tmp_path: Path, monkeypatch, capsys):
    folder = a_checkpoint(tmp_path / "a")
    weights_digest(str(folder))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(weights, "_SHOW_PROGRESS_ABOVE", 1000)
    weights_digest(str(folder))
    assert "hashing model.safetensors" in capsys.readouterr().err
