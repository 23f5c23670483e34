"""Every script and every odd character passes through checks, split, records and report page unharmed."""

from __future__ import annotations

import copy
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import AuditResult, audit
from axolotl_dpo_ext.report import RunReport
from axolotl_dpo_ext.settings import QualitySettings

SETTINGS = QualitySettings(max_drop_fraction=1.0)
# Prompt, and two answers that say different things at about the same length.
SCRIPTS = {
    "chinese": (
        "什么是光合作用\N{FULLWIDTH QUESTION MARK}",
        "植物把阳光变成糖分的过程。",
        "人们在海边晒太阳的习惯了。",
    ),
    "japanese": ("東京の名物は何ですか。", "寿司やもんじゃ焼きが有名です。", "雪がたくさん降る山の村です。"),
    "korean": ("한국의 수도는 어디인가요?", "한국의 수도는 서울입니다.", "잘 모르겠지만 부산 같아요."),
    "arabic": ("ما هي عاصمة مصر؟", "القاهرة هي عاصمة مصر اليوم.", "لا أعرف شيئا عن هذا البلد."),
    "hebrew": ("מהי בירת צרפת?", "פריז היא בירת צרפת.", "אין לי שום מושג היום."),
    "hindi": ("भारत की राजधानी क्या है?", "नई दिल्ली भारत की राजधानी है।", "मुझे इसके बारे में पता नहीं।"),
    "emoji": ("Which emoji? 👩‍👩‍👧‍👦", "👍🏽 👩🏿‍🚀 🏳️‍🌈 for you", "🎲 🧊 🐢 🍕 🚲 at once"),
    "accents": ("Où est le café?", "Près de l’hôtel, à côté du musée.", "Je n’en sais vraiment rien."),
    "zero width": ("Why\u200b not\u2060?", "Be\u200dcause it is so late now.", "\ufeffNobody wants to do it."),
    "controls": ("What\u2028now?\x85", "Go on\u2029as before, please.\x0b", "Stop\x1b[31m here and wait.\x07"),
    "bidi": ("Read \u202ethis\u202c?", "\u2066Left\u2069 to right, of course.", "\u202eRight\u202c to left, perhaps."),
    "astral": ("𝔚𝔥𝔞𝔱 is 𝒙?", "𝒙 is an unknown number, so 𝒙=𝟐.", "𓂀 is an eye, and 🂡 is an ace."),  # noqa: RUF001
}


@pytest.fixture(params=["text", "conversation"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair(form: str, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    if form == "text":
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    sides = (("prompt", "user", prompt), ("chosen", "assistant", chosen), ("rejected", "assistant", rejected))
    return {side: [{"role": role, "content": text}] for side, role, text in sides}


def audited(form: str, rows: list[tuple[str, str, str]], tokenizer: Any = None, **given: Any) -> AuditResult:
    return audit(Dataset.from_list([pair(form, *row) for row in rows]), tokenizer, SETTINGS, **given)


@pytest.mark.parametrize("counted", ["words", "tokens"])
def test_sound_pairs_of_any_script_are_kept(form: str, counted: str, chat_tokenizer: Any):
    result = audited(form, list(SCRIPTS.values()), chat_tokenizer if counted == "tokens" else None)
    ignored = {"length_ratio"}  # how many tokens a script takes is the tokenizer's affair
    assert {name for name, flagged in result.counts.items() if flagged} <= ignored
    assert np.isfinite(result.scores["similarity"]).all()
    assert len(set(result.scored.keys.tolist())) == len(SCRIPTS)


def test_faults_are_found_in_any_script(form: str, chat_tokenizer: Any):
    sound = list(SCRIPTS.values())
    identical = [(prompt, chosen, f" {chosen}\n") for prompt, chosen, _ in sound]
    reversed_pairs = [(f"{prompt} ", rejected, chosen) for prompt, chosen, rejected in sound]
    result = audited(form, sound + identical + reversed_pairs + sound, chat_tokenizer, max_length=10_000)
    found = {name: np.flatnonzero(result.scores[name] > 0.5) for name in ("identical", "duplicate", "contradiction")}
    n = len(sound)
    assert found["identical"].tolist() == list(range(n, 2 * n))
    assert found["duplicate"].tolist() == list(range(3 * n, 4 * n))
    assert set(found["contradiction"].tolist()) == {*range(n), *range(2 * n, 4 * n)}


def test_both_normal_forms_are_one_text(form: str, chat_tokenizer: Any):
    name = "accents"
    composed = tuple(unicodedata.normalize("NFC", text) for text in SCRIPTS[name])
    apart = tuple(unicodedata.normalize("NFD", text) for text in SCRIPTS[name])
    assert composed != apart
    result = audited(form, [composed, apart, (composed[0], composed[1], apart[1])], chat_tokenizer, holdout=0)
    assert len(set(result.scored.keys.tolist())) == 1
    assert result.scores["duplicate"].tolist() in ([1, 0, 0], [0, 1, 0])
    assert result.scores["identical"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("blank", ["\u200b\u200b", "\ufeff", "\u3000", "\u2060 \u200d", "\u2028"])
def test_what_cannot_be_seen_is_empty(form: str, blank: str):
    result = audited(form, [("Why?", "So.", "No."), ("Why not?", blank, "No.")])
    assert result.scores["malformed"].tolist() == [0, 1]
    assert result.records[0]["reason"] == "chosen: only whitespace"


def test_records_and_report_hold_every_script(form: str, tmp_path: Path, chat_tokenizer: Any):
    rows = [(prompt, f"{chosen} " * 9, rejected) for prompt, chosen, rejected in SCRIPTS.values()]
    result = audited(form, [*rows, ("Why?", "So.", "No.")], chat_tokenizer)
    assert {r["row"] for r in result.records if r["check"] == "length_ratio"} == set(range(len(rows)))
    for name in ("records.jsonl", "records.parquet"):
        result.write_records(tmp_path / name)
    lines = (tmp_path / "records.jsonl").read_bytes().decode("utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == result.records
    columns = list(result.records[0])
    assert pq.read_table(tmp_path / "records.parquet").select(columns).to_pylist() == result.records
    # A page shows the three strongest examples of each reason, so each script has a section of its own.
    sections = [audited(form, [row, ("Why?", "So.", "No.")], chat_tokenizer).section() for row in rows]
    page = RunReport(tmp_path, "Unicode", sections=sections).write_html().read_text(encoding="utf-8")
    for name in SCRIPTS.keys() - {"controls"}:
        assert SCRIPTS[name][2] in page, name
    shown = page + result.summary_table() + "".join(lines)
    assert not {character for character in shown if unicodedata.category(character) == "Cc"} - {"\n"}


def test_half_a_character_in_tools_is_told(chat_tokenizer: Any):
    # JSON can spell it, UTF-8 cannot: no tokenizer takes it.
    tools = '[{"type": "function", "function": {"name": "add", "description": "\\ud83d"}}]'
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    rows = [{**pair("conversation", *SCRIPTS["emoji"]), "tools": each} for each in (tools, "[]")]
    result = audit(Dataset.from_list(rows), tokenizer, SETTINGS)
    (record,) = [record for record in result.records if record["check"] == "malformed"]
    assert record["row"] == 0
    assert "surrogate" in record["reason"]
