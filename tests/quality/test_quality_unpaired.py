"""Unpaired data (``rl: kto``): the checks that make sense on single answers, records, split and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import AuditResult, audit
from axolotl_dpo_ext.report import RunReport
from axolotl_dpo_ext.settings import QualitySettings

from .conftest import make_pairs, sentence

ON_SINGLES = ["malformed", "doubled_bos", "truncated", "duplicate", "contradiction", "leakage"]


def rows(form: str) -> list[dict[str, Any]]:
    """Returns 40 answers to 20 prompts, of which rows 3, 5, 6, 9 and 12 to 15 have faults."""
    pairs = make_pairs(20)
    made: list[dict[str, Any]] = []
    for prompt, good, bad in zip(*pairs.values(), strict=True):
        made += [{"prompt": prompt, "completion": answer, "label": answer is good} for answer in (good, bad)]
    made[3]["completion"] = ""
    made[5]["label"] = None
    made[6]["completion"] = sentence(99, 300)  # truncated
    made[9]["completion"] = f"<s>{made[9]['completion']}"
    made[13] = dict(made[12])  # a copy
    made[15] = {**made[14], "label": not made[14]["label"]}
    if form == "conversation":
        for row in made:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row["completion"] = [{"role": "assistant", "content": row["completion"]}]
    return [{**row, "source": "ab"[i % 2]} for i, row in enumerate(made)]


@pytest.fixture(params=["text", "conversation"])
def result(request: pytest.FixtureRequest, chat_tokenizer: Any) -> AuditResult:
    data, test = Dataset.from_list(rows(request.param)), Dataset.from_list(rows("text")[20:22])
    longest = max(len(chat_tokenizer(row["completion"]).input_ids) for row in rows("text")[20:]) + 60
    return audit(data, chat_tokenizer, max_length=longest, test=test, sources="source", holdout=0.25)


def test_the_checks_that_fit_run_and_find_their_rows(result: AuditResult):
    found: dict[str, list[int]] = {}
    for record in result.records:
        found.setdefault(record["check"], []).append(record["row"])
    assert list(result.counts) == ON_SINGLES
    assert found == {
        "malformed": [3, 5],
        "doubled_bos": [9],
        "truncated": [6],
        "duplicate": [13],
        "contradiction": [14, 15],
        "leakage": [20, 21],
    }
    assert result.dropped_rows.tolist() == [3, 5, 13]


def test_records_name_faults_matched_rows_and_sources(result: AuditResult):
    records = {(record["check"], record["row"]): record for record in result.records}
    assert records["malformed", 3]["reason"] in ("completion: empty", "completion: only whitespace")
    assert records["malformed", 5]["reason"] == "label: missing"
    assert [records["contradiction", row]["matched_row"] for row in (14, 15)] == [15, 14]
    assert (records["duplicate", 13]["source"], records["duplicate", 13]["source_row"]) == ("b", 6)
    assert {record["rejected"] for record in result.records} == {""}


def test_both_answers_to_a_prompt_are_on_one_side(result: AuditResult):
    assert result.heldout is not None
    train, heldout = ({json.dumps(prompt) for prompt in part["prompt"]} for part in (result.train, result.heldout))
    assert not train & heldout
    assert len(result.heldout) in (8, 9, 10)
    assert set(result.heldout["source"]) == {"a", "b"}


def test_the_page_speaks_of_answers_and_not_of_length_bias(result: AuditResult, tmp_path: Path):
    section = result.section()
    assert dict(section.facts)["answers audited"] == 40
    assert "length_bias" not in section.data
    assert np.isnan(result.scored.log_ratio).all()
    page = RunReport(tmp_path, "kto", sections=[section]).write_html().read_text(encoding="utf-8")
    for text in (page, result.summary_table()):
        assert "chosen is longer" not in text
        assert "length ratio" not in text
    assert "undesirable" in page
    names = {name for group in section.examples for example in group.examples for name, _ in example.answers}
    assert names <= {"desirable", "undesirable"} | {
        f"{label} of row {row}" for label in ("desirable", "undesirable") for row in range(40)
    }


def test_answers_without_any_prompt_are_grouped_by_their_text():
    data = Dataset.from_list([{"completion": sentence(i // 2), "label": bool(i % 2)} for i in range(20)])
    result = audit(data, settings=QualitySettings(max_drop_fraction=1.0), holdout=0.3)
    assert result.counts["contradiction"] == 20
    assert result.heldout is not None
    assert not set(result.train["completion"]) & set(result.heldout["completion"])
