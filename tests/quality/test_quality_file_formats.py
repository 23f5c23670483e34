"""Every format gives back the rows that were written in it, by others and by the pack itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality.files import PreferenceFiles, read_files, write_rows
from axolotl_dpo_ext.quality.reading import read_pairs
from axolotl_dpo_ext.vocabulary import ConfigurationError

from .malformed_files import line


def assert_same(read: PreferenceFiles, data: Dataset) -> None:
    assert read.faults == {}
    assert read.dataset.features == data.features
    assert read.dataset[:] == data[:]


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.json",
        "a.jsonl.gz",
        "a.parquet",
        "array.json",
        "columns.json",
        "a.json.gz",
        "file.arrow",
        "stream.arrow",
        "saved",
        "a.jsonl.zst",
    ],
)
def test_conversations_come_back_from_every_format(name: str, sharegpt: Dataset, tmp_path: Path):
    save(sharegpt, tmp_path / name)
    assert_same(read_files([tmp_path / name]), sharegpt)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.jsonl", "a.parquet", "stream.arrow"])
def test_texts_and_scores_come_back_from_every_format(name: str, judged: Dataset, tmp_path: Path):
    save(judged, tmp_path / name)
    read = read_files([tmp_path / name])
    assert_same(read, judged)
    assert read_pairs(read.dataset, range(len(judged))) == read_pairs(judged, range(len(judged)))


def save(data: Dataset, path: Path) -> None:
    """Writes a dataset by other means than the pack's own."""
    rows = list(data)
    match path.name:
        case "array.json":
            path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
        case "a.json.gz":
            path.write_bytes(gzip.compress(json.dumps(rows).encode()))
        case "columns.json":
            path.write_text(json.dumps(data[:]), encoding="utf-8")
        case "a.jsonl.gz":
            path.write_bytes(gzip.compress(b"".join(map(line, rows))))
        case "a.jsonl.zst":
            with pa.output_stream(str(path), compression="zstd") as stream:
                stream.write(b"".join(map(line, rows)))
        case "a.parquet":
            data.to_parquet(path)
        case "saved":
            data.save_to_disk(path)
        case "file.arrow" | "stream.arrow":
            table = data.data.table.combine_chunks()
            new = pa.ipc.new_file if path.name == "file.arrow" else pa.ipc.new_stream
            with new(str(path), table.schema) as sink:
                sink.write_table(table)
        case "a.csv" | "a.csv.gz" | "a.tsv":
            data.to_pandas().to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
        case _:
            path.write_bytes(b"".join(map(line, rows)))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_written_rows_are_read_as_the_same(suffix: str, judged: Dataset, sharegpt: Dataset, tmp_path: Path):
    for data in (judged, judged.select([7, 3, 5])) + ((sharegpt,) if suffix != ".csv" else ()):
        path = tmp_path / "new" / f"kept{suffix}"
        write_rows(data, path)
        assert_same(read_files([path]), data)
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_written_leaves_the_old_file_alone(judged: Dataset, sharegpt: Dataset, tmp_path: Path):
    path = tmp_path / "kept.csv"
    path.write_text("old")
    with pytest.raises(ConfigurationError, match="conversations, chosen, rejected"):
        write_rows(sharegpt, path)
    with pytest.raises(ConfigurationError, match=r"'\.xlsx'"):
        write_rows(judged, tmp_path / "kept.xlsx")
    assert [file.name for file in tmp_path.iterdir()] == ["kept.csv"]
    assert path.read_text() == "old"


def test_half_an_emoji_outside_the_pair_is_written_and_read(tmp_path: Path):
    storage = pa.array(['"\\ude00z"', '{"a": 1}'], pa.string())
    notes = pa.ExtensionArray.from_storage(pa.json_(), storage)
    data = Dataset(pa.table({"chosen": ["é", "b"], "rejected": ["c", "d"], "note": notes}))
    write_rows(data, tmp_path / "a.jsonl")
    assert '"é"' in (text := (tmp_path / "a.jsonl").read_text(encoding="utf-8"))
    assert "\\ude00z" in text
    read = read_files([tmp_path / "a.jsonl"])
    assert read.faults == {}
    assert read.dataset[:] == {"chosen": ["é", "b"], "rejected": ["c", "d"], "note": ["\ufffdz", {"a": 1}]}


def test_a_failed_write_leaves_nothing_behind(judged: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.jsonl").write_text("old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_rows(judged, tmp_path / "a.jsonl")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.jsonl", "old")]
