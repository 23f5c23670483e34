"""``dpo-ref-cache`` as users start it: exit codes, one JSON object on stdout, and nothing removed unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result

from axolotl_dpo_ext.cli import cli
from axolotl_dpo_ext.reference.store import STORE_VARIABLE, ReferenceStore, StoredRows

ROWS = StoredRows(
    keys=np.arange(160, dtype=np.uint8).reshape(10, 16),
    logps=np.linspace(-50, -1, 10, dtype=np.float32),
    tokens=np.arange(1, 11, dtype=np.int32),
)


def command(*words: object) -> Result:
    return CliRunner().invoke(cli, ["ref-cache", *map(str, words)])


def told(*words: object, code: int = 0) -> dict:
    done = command(*words, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "stores"))
    return tmp_path / "stores"


@pytest.fixture
def stores(root: Path) -> list[Path]:
    """Two stores, the second with two shards."""
    paths = []
    for model, shards in (("lab/one", 1), ("lab/two", 2)):
        store = ReferenceStore(root, {"weights": model}, model)
        for part in np.array_split(np.arange(10), shards):
            store.append(ROWS[part])
        paths.append(store.path)
    return paths


def shard(store: Path) -> Path:
    return sorted(store.glob("shard-*"))[0]


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1])
    return path


def files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


def test_ls_shows_every_store_with_its_model_and_figures(root: Path, stores: list[Path]):
    listed = {each["store"]: each for each in told("ls")["stores"]}
    assert set(listed) == {path.name for path in stores}
    two = listed[stores[1].name]
    assert (two["model"], two["rows"], two["shards"], two["damaged"]) == ("lab/two", 10, 2, [])
    assert two["bytes"] == sum(path.stat().st_size for path in stores[1].iterdir())
    shown = command("ls")
    assert shown.exit_code == 0
    for path, model in zip(stores, ("lab/one", "lab/two"), strict=True):
        (line,) = [line for line in shown.stdout.splitlines() if line.startswith(path.name[:12])]
        assert model in line
        assert " 10 " in line


def test_ls_without_any_store_is_fine_and_creates_nothing(root: Path):
    assert told("ls") == {"root": str(root), "stores": []}
    assert "no stores" in command("ls").stdout
    assert not root.exists()


def test_root_names_another_folder(root: Path, stores: list[Path], tmp_path: Path, monkeypatch):
    monkeypatch.delenv(STORE_VARIABLE)
    assert len(told("ls", "--root", root)["stores"]) == 2


@pytest.mark.parametrize("words", [("ls",), ("verify",), ("prune", "--damaged", "--yes")])
def test_a_root_that_is_no_folder_of_stores_is_bad_usage(stores: list[Path], tmp_path: Path, words: tuple[str, ...]):
    file = tmp_path / "file"
    file.touch()
    for root in (tmp_path / "absent", file, ""):
        done = command(*words, "--root", root)
        assert done.exit_code == 2
        assert f"there is no folder {str(root)!r}" in done.stderr
    done = command(*words, "--root", stores[0])
    assert done.exit_code == 2
    assert f"its root is {stores[0].parent}, its name {stores[0].name}" in done.stderr


def test_a_root_in_the_environment_that_is_a_store_itself_is_bad_usage(stores: list[Path], monkeypatch):
    monkeypatch.setenv(STORE_VARIABLE, str(stores[0]))
    assert command("ls").exit_code == 2


def test_files_that_no_run_writes_are_not_looked_at_and_stay(stores: list[Path]):
    strangers = [stores[0] / "notes.txt", stores[0] / "shard-mine.safetensors"]
    for path in strangers:
        path.touch()
    assert told("verify")["stores"][0]["damaged"] == []
    told("prune", "--damaged", "--yes")
    assert all(path.exists() for path in strangers)


def test_verify_names_each_damaged_file_and_exits_with_1(stores: list[Path]):
    assert told("verify")["stores"][0]["damaged"] == []
    path = damage(shard(stores[1]))
    by_store = {each["store"]: each for each in told("verify", code=1)["stores"]}
    assert [each["file"] for each in by_store[stores[1].name]["damaged"]] == [str(path)]
    assert by_store[stores[1].name]["rows"] == 5
    assert by_store[stores[0].name]["damaged"] == []
    shown = command("verify")
    assert shown.exit_code == 1
    assert path.name in shown.stdout
    assert "checksum" in shown.stdout
    # A store that is named is looked at alone.
    assert told("verify", stores[0].name)["stores"][0]["store"] == stores[0].name
    assert len(told("verify", stores[1].name[:20], code=1)["stores"]) == 1


def test_an_unknown_store_is_bad_usage_and_lists_those_there_are(stores: list[Path], tmp_path: Path):
    for words in (("verify", "xyz"), ("export", "xyz", tmp_path / "rows.jsonl"), ("prune", "--store", "xyz", "--yes")):
        done = command(*words)
        assert done.exit_code == 2
        assert all(path.name in done.stderr for path in stores)
        assert done.stdout == ""
    assert all(path.is_dir() for path in stores)


def test_prune_must_be_told_what(root: Path, stores: list[Path]):
    done = command("prune", "--yes")
    assert done.exit_code == 2
    assert "--damaged" in done.stderr
    assert all(path.is_dir() for path in stores)


def test_prune_only_says_what_it_would_remove_until_it_is_told_yes(root: Path, stores: list[Path]):
    before = files(root)
    size = sum(path.stat().st_size for path in stores[0].iterdir())
    plan = told("prune", "--store", stores[0].name[:10])
    assert plan["removed"] is False
    assert plan["bytes"] == size
    assert [each["path"] for each in plan["removals"]] == [str(stores[0])]
    shown = command("prune", "--store", stores[0].name[:10])
    assert "nothing was removed" in shown.stdout
    assert str(stores[0]) in shown.stdout
    assert files(root) == before
    assert told("prune", "--store", stores[0].name[:10], "--yes")["removed"] is True
    assert files(root) == {path for path in before if path.parent != stores[0]}


def test_prune_takes_several_stores(root: Path, stores: list[Path]):
    words = [word for path in stores for word in ("--store", path.name)]
    assert told("prune", *words, "--yes")["removed"]
    assert files(root) == set()


def test_prune_damaged_takes_the_damaged_files_alone(root: Path, stores: list[Path]):
    before = files(root)
    first, second = damage(shard(stores[0])), damage(shard(stores[1]))
    # Of the one store that is named …
    told("prune", "--damaged", "--store", stores[0].name, "--yes")
    assert files(root) == before - {first}
    # … and of all.
    told("prune", "--damaged", "--yes")
    assert files(root) == before - {first, second}
    assert told("verify")["stores"]


def test_prune_unused_takes_what_no_run_opened_for_so_long(root: Path, stores: list[Path]):
    for path in stores[0].iterdir():
        os.utime(path, (1e9, 1e9))
    plan = told("prune", "--unused-days", "30")
    assert [each["path"] for each in plan["removals"]] == [str(stores[0])]
    told("prune", "--unused-days", "30", "--yes")
    assert [path for path in stores if path.is_dir()] == stores[1:]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_export_writes_every_row_exactly(stores: list[Path], tmp_path: Path, suffix: str):
    file = tmp_path / f"rows.{suffix}"
    file.write_text("what was there before")
    assert told("export", stores[1].name[:12], file) == {
        "store": stores[1].name, "file": str(file), "rows": 10, "left_out": []}  # fmt: skip
    if suffix == "parquet":
        table = pyarrow.parquet.read_table(file)
        assert [str(kind) for kind in table.schema.types] == ["string", "float", "int32"]
        rows = table.to_pylist()
    else:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [list(row) for row in rows] == [["key", "logp", "tokens"]] * 10
    assert [row["key"] for row in rows] == [key.tobytes().hex() for key in ROWS.keys]
    assert [np.float32(row["logp"]) for row in rows] == list(ROWS.logps)
    assert [row["tokens"] for row in rows] == list(ROWS.tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "stores"]


def test_export_leaves_damaged_rows_out_and_says_so(stores: list[Path], tmp_path: Path):
    path = damage(shard(stores[1]))
    done = command("export", stores[1].name, tmp_path / "rows.jsonl", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["left_out"] == [str(path)]
    assert path.name in done.stderr
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 5


def test_export_to_what_is_no_table_is_bad_usage_and_to_no_place_a_problem(stores: list[Path], tmp_path: Path):
    done = command("export", stores[0].name, tmp_path / "rows.csv")
    assert done.exit_code == 2
    assert ".parquet, .jsonl" in done.stderr
    done = command("export", stores[0].name, tmp_path / "absent" / "rows.jsonl")
    assert done.exit_code == 1
    assert f"there is no folder {tmp_path / 'absent'}" in done.stderr


def test_a_damaged_identity_stops_an_export_with_its_name(stores: list[Path], tmp_path: Path):
    path = damage(stores[0] / "identity.json")
    done = command("export", stores[0].name, tmp_path / "rows.jsonl")
    assert done.exit_code == 1
    assert str(path) in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()


def test_stdout_of_a_real_process_is_one_json_object(stores: list[Path], root: Path):
    damage(shard(stores[0]))
    words = [sys.executable, "-m", "axolotl_dpo_ext", "ref-cache", "verify", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["root"] == str(root)
