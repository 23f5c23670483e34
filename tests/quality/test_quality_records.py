"""What an audit shows and writes: records, the table in the terminal, the page of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import AuditResult, audit
from axolotl_dpo_ext.report import RunReport
from axolotl_dpo_ext.settings import QualitySettings

from .conftest import make_pairs, sentence

SOURCES = ["one.jsonl", "two.jsonl"] * 20


@pytest.fixture(scope="module")
def result() -> AuditResult:
    pairs: dict[str, list[Any]] = make_pairs(40)
    pairs["chosen"][4] = None
    pairs["rejected"][7] = pairs["chosen"][7]
    pairs["chosen"][10] = "<b>long</b> & " + sentence(1000, 200)
    for column in pairs.values():
        column[21] = column[20]
    for side, other in (("chosen", "rejected"), ("rejected", "chosen"), ("prompt", "prompt")):
        pairs[side][30] = pairs[other][31]
    data, test = Dataset.from_dict(pairs), Dataset.from_dict({name: texts[39:] for name, texts in pairs.items()})
    return audit(data, settings=QualitySettings(), test=test, sources=SOURCES, holdout=8)


def test_parquet_and_json_lines_hold_the_same(result: AuditResult, tmp_path: Path):
    for name in ("records.parquet", "records.jsonl"):
        result.write_records(tmp_path / name)
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pq.read_table(tmp_path / "records.parquet").to_pylist() == lines == result.records
    assert Dataset.from_parquet(str(tmp_path / "records.parquet"), cache_dir=str(tmp_path)).to_list() == lines


def test_records_name_row_source_and_the_other_row(result: AuditResult):
    found = [(r["row"], r["source"], r["source_row"], r["check"], r["matched_row"]) for r in result.records]
    assert found == [
        (4, "one.jsonl", 2, "malformed", None),
        (7, "two.jsonl", 3, "identical", None),
        (7, "two.jsonl", 3, "similarity", None),
        (7, "two.jsonl", 3, "minimal_edit", None),
        (10, "one.jsonl", 5, "length_ratio", None),
        (21, "two.jsonl", 10, "duplicate", 20),
        (30, "one.jsonl", 15, "contradiction", 31),
        (31, "two.jsonl", 15, "contradiction", 30),
        (39, "two.jsonl", 19, "leakage", 0),
    ]
    assert {r["check"]: r["action"] for r in result.records if r["row"] in (21, 30)} == {
        "duplicate": "drop",
        "contradiction": "flag",
    }


def test_no_record_is_a_file_of_the_same_columns(tmp_path: Path):
    nothing = audit(Dataset.from_dict(make_pairs(3)))
    nothing.write_records(tmp_path / "records.parquet")
    nothing.write_records(tmp_path / "records.jsonl")
    table = pq.read_table(tmp_path / "records.parquet")
    assert (table.num_rows, (tmp_path / "records.jsonl").read_bytes()) == (0, b"")
    assert {"row", "source", "check", "score", "threshold", "matched_row", "reason"} <= set(table.column_names)


def test_a_failed_parquet_file_leaves_the_old_one(result: AuditResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "records.parquet"
    result.write_records(path)
    before = path.read_bytes()
    monkeypatch.setattr(pq.ParquetWriter, "write_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result.write_records(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["records.parquet"]


def test_the_table_in_the_terminal(result: AuditResult):
    table = result.summary_table().splitlines()
    assert table[:4] == [
        "check                 policy  threshold  flagged  share",
        "malformed             drop        > 0.5        1  2.5 %",
        "doubled_bos           flag          > 0        –      –",
        "truncated             flag          > 0        –      –",
    ]
    assert "contradiction         flag          > 1        2  5.0 %" in table
    assert any(line.startswith("  duplicate: row 21 (1): chosen '") for line in table)
    assert "doubled_bos had nothing to look at: it needs a tokenizer with a BOS token." in table
    assert "kept 36 of 40 pairs, dropped 4; 28 to train on, 8 held out, 0 prompts in both" in table
    bias = [line.split(":")[0] for line in table]
    first = bias.index("chosen is longer")
    assert bias[first : first + 3] == ["chosen is longer", "mean log length ratio", "sign test of the length bias"]


def test_the_page_of_the_report(result: AuditResult, tmp_path: Path):
    section = result.section()
    facts = dict(section.facts)
    assert (facts["pairs audited"], facts["dropped"], facts["to train on"]) == (40, "4 (10.0 %)", 28)
    assert facts["held out"] == "8 (0 shared prompts)"
    reasons, what_if, sources = section.tables
    assert [row[3] for row in reasons.rows if row[0] == "contradiction"] == ["2"]
    ratio = [row for row in what_if.rows if row[0] == "length_ratio"]
    shares = {t: 100 * (result.scores["length_ratio"] > t).mean() for t in (1.25, 1.5, 2, 3, 5, 9)}
    expected = ", ".join(f"{share:.1f} % above {t:g}{' (now)' if t == 2 else ''}" for t, share in shares.items())
    assert ratio == [["length_ratio", "max_length_ratio", expected]]
    assert [row[:5] for row in sources.rows] == [
        [name, 20, *(section.data["sources"][name][part] for part in ("dropped", "train", "heldout"))]
        for name in ("one.jsonl", "two.jsonl")
    ]
    titles = {group.title.split(":")[0]: group.examples for group in section.examples}
    assert titles["length_ratio"][0].title.startswith("one.jsonl, row 5: ")
    assert [name for name, _ in titles["duplicate"][0].answers] == [
        "chosen",
        "rejected",
        "chosen of row 20",
        "rejected of row 20",
    ]
    bias = section.histograms[0]
    assert (sum(bias.counts["all"]), sum(bias.counts["kept"])) == (39, 36)

    page = RunReport(tmp_path, "Data", sections=[section]).write_html().read_text(encoding="utf-8")
    assert "chosen: missing" in page
    assert "&lt;b&gt;long&lt;/b&gt; &amp; " in page
    assert "<b>long</b>" not in page
