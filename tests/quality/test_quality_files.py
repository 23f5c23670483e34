"""Preference files of every format are read as they are; what is wrong in them is named, and the rest is kept."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Json, Value

from axolotl_dpo_ext.quality.files import read_files, write_rows
from axolotl_dpo_ext.quality.pairs import parse_pair
from axolotl_dpo_ext.quality.reading import read_pairs
from axolotl_dpo_ext.vocabulary import ConfigurationError

from .malformed_files import CASES, GOOD, MalformedFile, chat_row, line, text_row

USER = {"role": "user", "content": "Now?"}


def write(folder: Path, name: str, *rows: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(line, rows)))
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_malformed_file_is_named_with_row_and_reason_and_the_rest_is_kept(case: MalformedFile, tmp_path: Path):
    path = tmp_path / case.file
    path.write_bytes(case.data)
    if case.problem:
        with pytest.raises(ConfigurationError) as stop:
            read_files([path])
        (problem,) = stop.value.problems
        assert problem.setting == str(path)
        assert all(words in str(problem) for words in case.problem), problem
        return
    read = read_files([path])
    assert set(read.faults) == set(case.faults)
    for row, words in case.faults.items():
        assert read.faults[row].startswith(f"{case.file}, ")
        assert all(part in read.faults[row] for part in words), read.faults[row]
        assert read.dataset[row]["chosen"] is read.dataset[row]["rejected"] is None
    good = [row for i, row in enumerate(read.dataset) if i not in read.faults]
    assert good == case.good
    assert read.sources == [case.file] * len(read.dataset)


def test_there_are_enough_malformed_files_and_each_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES) >= 60


def test_a_faulty_row_keeps_its_other_columns(tmp_path: Path):
    read = read_files([write(tmp_path, "a.jsonl", *GOOD, {**text_row(9), "chosen": 5})])
    assert read.dataset[3] == {"prompt": None, "chosen": None, "rejected": None, "score": 9.5}


def test_a_prompt_that_few_rows_have_is_not_taken_for_the_column_of_all(tmp_path: Path):
    rows = [{"chosen": [USER, {"role": "assistant", "content": str(i)}], "rejected": [USER]} for i in range(5)]
    read = read_files([write(tmp_path, "a.jsonl", *rows, {"prompt": "q", **rows[0]})])
    assert read.dataset.column_names == ["chosen", "rejected"]
    assert read.dataset[:]["chosen"] == [row["chosen"] for row in [*rows, rows[0]]]


def test_values_that_no_type_holds_together_come_back_as_they_were(tmp_path: Path):
    odd = [1, "2", None, {"a": [1.5, None]}, [], True, 2**60, 0.1]
    rows = [{**text_row(i), "odd": value, "big": 2**60 + i, "ids": [i, None]} for i, value in enumerate(odd)]
    read = read_files([write(tmp_path, "a.jsonl", *rows)])
    assert list(read.dataset) == rows
    assert read.dataset.features["odd"] == Json()
    assert read.dataset.features["big"] == Value("int64")


def test_content_parts_and_tool_calls_come_back_as_they_were(tmp_path: Path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": "z"}}}
    parts = [{"type": "text", "text": "yes"}]
    rows = [
        {
            "messages": [USER],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": parts}],
            "tools": [call],
        },
        {
            "messages": [USER],
            "chosen": [{"role": "assistant", "content": parts}],
            "rejected": [{"role": "assistant", "content": "b"}],
            "tools": [other],
        },
    ]
    read = read_files([write(tmp_path, "a.jsonl", *rows)])
    assert list(read.dataset) == rows
    for name in ("b.jsonl", "b.parquet"):
        write_rows(read.dataset, tmp_path / name)
        assert list(read_files([tmp_path / name]).dataset) == rows
    assert read_pairs(read.dataset, range(len(rows))) == [
        parse_pair(row["chosen"], row["rejected"], row["messages"]) for row in rows
    ]


def test_what_later_rows_have_more_is_not_lost(tmp_path: Path):
    late = {**text_row(2500), "score": "high", "label": True}
    late["extra"] = {"a": 1}
    rows = [*map(text_row, range(2500)), late]
    read = read_files([write(tmp_path, "a.jsonl", *rows)])
    assert read.faults == {}
    assert read.dataset[2500] == late
    assert read.dataset[7] == {**text_row(7), "label": None, "extra": None}


def test_csv_columns_are_numbers_only_where_all_cells_are(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("chosen,rejected,n,x,b,id,mixed,none\n1,2,1,1,true,007,1,\n,4,,2.5,False,008,a,\n")
    read = read_files([path])
    assert list(read.dataset) == [
        {"chosen": "1", "rejected": "2", "n": 1, "x": 1.0, "b": True, "id": "007", "mixed": "1", "none": None},
        {"chosen": "", "rejected": "4", "n": None, "x": 2.5, "b": False, "id": "008", "mixed": "a", "none": None},
    ]


def test_a_cut_download_gives_the_rows_before_its_end(tmp_path: Path):
    rng = random.Random(0)
    rows = [{**text_row(i), "noise": str(rng.random())} for i in range(3000)]
    data = gzip.compress(b"".join(map(line, rows)))
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    read = read_files([tmp_path / "a.jsonl.gz"])
    last = len(read.dataset) - 1
    assert 1000 < last < 2000
    assert read.faults == {
        last: f"a.jsonl.gz, line {last + 1}: the compressed file ends here: it was cut off, so what came after is lost; copy or compress it again"
    }
    assert list(read.dataset)[:last] == rows[:last]


def test_files_that_agree_are_joined_as_they_are(tmp_path: Path):
    paths = [
        write(tmp_path, "one/a.jsonl", chat_row(0), {**chat_row(1), "chosen": 5}),
        write(tmp_path, "two/a.jsonl", {**chat_row(2), "score": 1}),
        write(
            tmp_path,
            "b.jsonl",
            {**chat_row(3), "score": 0.5, "chosen": [{"role": "assistant", "content": "a", "name": "n"}]},
        ),
    ]
    read = read_files(paths)
    assert read.sources == ["one/a.jsonl", "one/a.jsonl", "two/a.jsonl", "b.jsonl"]
    assert read.faults == {
        1: "one/a.jsonl, line 2: chosen: a number, but it has to be a list of messages, as in most rows of the file"
    }
    assert read.dataset[:]["score"] == [None, None, 1.0, 0.5]
    assert read.dataset[2]["chosen"] == [{"role": "assistant", "content": "yes 2", "name": None}]
    assert read.dataset[3]["chosen"] == [{"role": "assistant", "content": "a", "name": "n"}]


def test_files_that_differ_in_form_become_flat_text(tmp_path: Path):
    Dataset.from_list([chat_row(1)]).to_parquet(tmp_path / "b.parquet")
    sharegpt = {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    no_answer = {**sharegpt, "chosen": {"from": "human", "value": "a"}}
    paths = [
        write(tmp_path, "a.jsonl", text_row(0), {**text_row(5), "chosen": 5}),
        tmp_path / "b.parquet",
        write(tmp_path, "c.json", sharegpt, no_answer),
    ]
    read = read_files(paths)
    assert read.dataset.features == Features(
        {name: Value("float64" if name == "score" else "string") for name in ("prompt", "chosen", "rejected", "score")}
    )
    assert list(read.dataset.remove_columns("score")) == [
        {name: text_row(0)[name] for name in ("prompt", "chosen", "rejected")},
        dict.fromkeys(("prompt", "chosen", "rejected")),
        {"prompt": "Question 1?", "chosen": "yes 1", "rejected": "no 1"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        dict.fromkeys(("prompt", "chosen", "rejected")),
    ]
    assert read.faults == {
        1: "a.jsonl, line 2: chosen: a number, but it has to be text, as in most rows of the file",
        4: "c.json, line 2: chosen: answer begins with a message of 'user', not of 'assistant'",
    }


def test_labelled_answers_are_read_but_not_together_with_pairs(tmp_path: Path):
    rows = [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}]
    labelled = write(tmp_path, "kto.jsonl", *rows, {"prompt": "q", "completion": "c", "label": "yes"})
    read = read_files([labelled])
    assert list(read.dataset)[:2] == rows
    assert read.faults == {
        2: "kto.jsonl, line 3: label: text, but it has to be true or false, as in most rows of the file"
    }
    with pytest.raises(ConfigurationError, match="but other files have pairs") as stop:
        read_files([labelled, write(tmp_path, "a.jsonl", text_row(0))])
    assert [problem.setting for problem in stop.value.problems] == [str(labelled)]


def test_all_unusable_files_are_told_at_once(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    DatasetDict(train=Dataset.from_list(GOOD), test=Dataset.from_list(GOOD)).save_to_disk(tmp_path / "splits")
    good = write(tmp_path, "good.jsonl", *GOOD)
    with pytest.raises(ConfigurationError) as stop:
        read_files([tmp_path / "none.jsonl", good, tmp_path / "folder", tmp_path / "splits"])
    assert [problem.setting for problem in stop.value.problems] == [
        str(tmp_path / name) for name in ("none.jsonl", "folder", "splits")
    ]
    assert "splits train, test" in str(stop.value)
    assert len(read_files([tmp_path / "splits" / "test"]).dataset) == 3
    with pytest.raises(ConfigurationError, match="named twice"):
        read_files([good, tmp_path / "folder" / ".." / "good.jsonl"])
    with pytest.raises(ConfigurationError, match="no file"):
        read_files([])


def test_parquet_columns_of_other_writers_are_read(tmp_path: Path):
    table = pa.table(
        {
            "chosen": pa.array(["a", "b"], pa.large_string()),
            "rejected": pa.array(["c", "d"]).dictionary_encode(),
            "tags": pa.array([["x"], []], pa.large_list(pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    read = read_files([tmp_path / "a.parquet"])
    assert read.dataset.features == Dataset.from_dict(table.to_pydict()).features
    assert read.dataset[:] == table.to_pydict()
    unknown = pa.table({**table.to_pydict(), "m": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64()))})
    pq.write_table(unknown, tmp_path / "b.parquet")
    with pytest.raises(ConfigurationError, match="datasets cannot hold it"):
        read_files([tmp_path / "b.parquet"])


def test_a_full_disk_is_told_with_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("axolotl_dpo_ext.quality.files.read.TemporaryFile", fail)
    with pytest.raises(ConfigurationError, match=r"(?s)No space.*TMPDIR"):
        read_files([write(tmp_path, "a.jsonl", *GOOD)])


def test_the_same_files_have_the_same_fingerprint(tmp_path: Path):
    a, b = write(tmp_path, "a.jsonl", *GOOD), write(tmp_path, "b.jsonl", text_row(5))
    assert read_files([a]).dataset._fingerprint == read_files([a]).dataset._fingerprint
    assert read_files([a]).dataset._fingerprint != read_files([b]).dataset._fingerprint
