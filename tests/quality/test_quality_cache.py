"""Scores on disk: read where nothing they depend on has changed, computed anew where anything has."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import AuditResult, Check, PairBatch, PairCheck, audit, builtins
from axolotl_dpo_ext.settings import QualitySettings

from .conftest import make_pairs

ROOT = Path(__file__).parents[2]
LOOSE = {"max_drop_fraction": 1.0}


class Counting(PairCheck):
    """Says how many pairs it was shown."""

    name = "counting"
    summary = "never found"

    def __init__(self) -> None:
        self.shown = 0

    def threshold(self, settings: QualitySettings) -> float:
        return 0.5

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Any) -> np.ndarray:
        self.shown += len(batch)
        return np.zeros(len(batch))


def faulty() -> dict[str, list[Any]]:
    pairs: dict[str, list[Any]] = make_pairs(30)
    pairs["rejected"][3] = None
    pairs["rejected"][5] = pairs["chosen"][5]
    for side in pairs:
        pairs[side][8] = pairs[side][7]
    return pairs


def audited(folder: Path | None, settings: QualitySettings | None = None, **given: Any) -> tuple[AuditResult, int]:
    """Audits with scores on disk; returns the result, and how many pairs were scored for it."""
    counting = Counting()
    checks: list[Check] = [*builtins.pair_checks(), *given.pop("more", []), counting]
    data = given.pop("data", None) or Dataset.from_dict(faulty())
    result = audit(data, settings=settings or QualitySettings(**LOOSE), checks=checks, cache=folder, **given)
    return result, counting.shown


def scored(folder: Path, **given: Any) -> int:
    return audited(folder, **given)[1]


def shown(result: AuditResult) -> str:
    return json.dumps([result.records, result.section().data, result.train.to_list()]) + result.summary_table()


def test_a_second_audit_reads_the_scores(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fresh, _ = audited(None)
    first, scored_first = audited(tmp_path)
    with caplog.at_level(logging.INFO):
        second, scored_second = audited(tmp_path)
    assert (scored_first, scored_second) == (29, 0)
    assert "read the scores of 30 pairs from" in caplog.text
    assert {shown(first), shown(second)} == {shown(fresh)}
    assert {record["check"] for record in second.records} >= {"malformed", "identical", "duplicate"}


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length_ratio": 1.01},
        {"max_similarity": 0.7},
        {"min_edit_distance": 0.5},
        {"max_duplicate_similarity": 0.99},
        {"max_likelihood_deviation": 1.0},
        {"policy": {"identical": "flag", "minimal_edit": "drop"}},
        {"holdout": 0.2},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_thresholds_and_policies_read_the_same_scores(tmp_path: Path, changed: dict[str, Any]):
    scored(tmp_path)
    settings = QualitySettings(**LOOSE, **changed)
    result, again = audited(tmp_path, settings)
    assert again == 0
    assert shown(result) == shown(audited(None, settings)[0])


def test_sources_and_batches_read_the_same_scores(tmp_path: Path):
    scored(tmp_path)
    sources = ["a", "b"] * 15
    result, again = audited(tmp_path, sources=sources, batch_size=4, holdout=6)
    assert again == 0
    assert shown(result) == shown(audited(None, sources=sources, holdout=6)[0])


def test_columns_that_no_check_reads_read_the_same_scores(tmp_path: Path):
    scored(tmp_path)
    assert scored(tmp_path, data=Dataset.from_dict({**faulty(), "comment": list("x" * 30)})) == 0


def other_text(pairs: dict[str, list[Any]]) -> None:
    pairs["rejected"][29] += "."


def other_prompt(pairs: dict[str, list[Any]]) -> None:
    pairs["prompt"][0] += "?"


def swapped(pairs: dict[str, list[Any]]) -> None:
    pairs["chosen"], pairs["rejected"] = pairs["rejected"], pairs["chosen"]


def moved_over_the_edge(pairs: dict[str, list[Any]]) -> None:
    pairs["prompt"][0], pairs["chosen"][0] = pairs["prompt"][0] + pairs["chosen"][0][:1], pairs["chosen"][0][1:]


def other_order(pairs: dict[str, list[Any]]) -> None:
    for column in pairs.values():
        column.reverse()


def empty_for_missing(pairs: dict[str, list[Any]]) -> None:
    pairs["rejected"][3] = ""


def with_scores(pairs: dict[str, list[Any]]) -> None:
    pairs["margin"] = [1.0] * 30


@pytest.mark.parametrize(
    "change", [other_text, other_prompt, swapped, moved_over_the_edge, other_order, empty_for_missing, with_scores]
)
def test_changed_rows_are_scored_anew(tmp_path: Path, change: Callable[[dict[str, list[Any]]], None]):
    scored(tmp_path)
    pairs = faulty()
    change(pairs)
    result, again = audited(tmp_path, data=Dataset.from_dict(pairs))
    assert again > 0
    assert shown(result) == shown(audited(None, data=Dataset.from_dict(pairs))[0])


def test_rows_that_were_selected_or_cut_off_are_scored_anew(tmp_path: Path):
    data = Dataset.from_dict(faulty())
    scored(tmp_path, data=data)
    assert scored(tmp_path, data=data.select(range(10, 30))) > 0
    assert scored(tmp_path, data=data.select(range(20))) > 0
    assert scored(tmp_path, data=data.select(range(30))) == 0


def changed_tokenizers(tokenizer: Any) -> dict[str, Any]:
    made = {name: copy.deepcopy(tokenizer) for name in ("token", "template", "bos", "eos", "opening")}
    made["token"].add_tokens(["quirvenol"])
    made["template"].chat_template += " "
    made["bos"].bos_token = made["bos"].eos_token
    made["eos"].eos_token = "<s>"
    made["opening"].backend_tokenizer.post_processor = None
    return made


def test_another_tokenizer_is_another_score(tmp_path: Path, chat_tokenizer: Any):
    assert scored(tmp_path, tokenizer=chat_tokenizer) > 0
    assert scored(tmp_path, tokenizer=copy.deepcopy(chat_tokenizer)) == 0
    again = {name: scored(tmp_path, tokenizer=other) for name, other in changed_tokenizers(chat_tokenizer).items()}
    assert again == dict.fromkeys(again, 29)
    assert scored(tmp_path) > 0  # words


def test_what_else_scores_depend_on_is_scored_anew(tmp_path: Path):
    scored(tmp_path)
    test, other = (Dataset.from_dict(make_pairs(n)) for n in (3, 4))
    given: list[dict[str, Any]] = [
        {"max_length": 100},
        {"max_length": 101},
        {"test": test},
        {"test": other},
        {"faults": {2: "line 3 is not JSON"}},
        {"settings": QualitySettings(group_similar_prompts=True, **LOOSE)},
        {"settings": QualitySettings(policy={"similarity": "keep"}, **LOOSE)},
    ]
    assert all(scored(tmp_path, **some) > 0 for some in given)
    assert not any(scored(tmp_path, **some) for some in given)


CHECK = """
import os, pathlib
import numpy as np
from axolotl_dpo_ext.quality import PairCheck

class Slow(PairCheck):
    name, summary = "slow", "never found"

    def threshold(self, settings):
        return 0.5

    def score(self, batch, settings, embedder):
        with pathlib.Path(os.environ["SCORED_LOG"]).open("a") as log:
            log.write(f"{os.getpid()}\\n")
        return np.zeros(len(batch))
"""


def test_an_edited_check_is_scored_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCORED_LOG", str(tmp_path / "log"))
    path = tmp_path / "a_check_to_edit.py"
    path.write_text(CHECK, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("a_check_to_edit")
    assert [scored(tmp_path, more=[module.Slow()]) for _ in range(2)] == [29, 0]
    path.write_text(CHECK.replace("zeros", "ones"), encoding="utf-8")
    assert scored(tmp_path, more=[module.Slow()]) > 0


@pytest.mark.parametrize("damage", [b"", b"not a zip", None], ids=["empty", "garbage", "cut"])
def test_a_damaged_file_is_told_and_replaced(tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture):
    first, _ = audited(tmp_path)
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    second, again = audited(tmp_path)
    assert again > 0
    assert shown(first) == shown(second)
    assert "is damaged" in caplog.text
    assert scored(tmp_path) == 0
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []


def test_a_check_that_fails_leaves_nothing_behind(tmp_path: Path):
    class Failing(Counting):
        name = "failing"

        def score(self, batch: PairBatch, settings: QualitySettings, embedder: Any) -> np.ndarray:
            raise KeyError("colour")

    with pytest.raises(RuntimeError, match="'failing'"):
        audited(tmp_path, more=[Failing()])
    assert list(tmp_path.glob("*.npz")) == []


AUDIT = """
import json, sys
from datasets import Dataset
from a_slow_check import Slow
from axolotl_dpo_ext.quality import audit, builtins
from axolotl_dpo_ext.settings import QualitySettings
data = Dataset.from_json(sys.argv[1], cache_dir=sys.argv[3])
checks = [*builtins.pair_checks(), Slow()]
result = audit(data, None, QualitySettings(max_drop_fraction=1.0), checks=checks, cache=sys.argv[2], holdout=5)
sys.stdout.write(json.dumps(result.records) + result.summary_table())
"""


def test_of_two_processes_at_once_one_scores_and_both_find_the_same(tmp_path: Path):
    (tmp_path / "a_slow_check.py").write_text(CHECK.replace("return", "__import__('time').sleep(1); return"))
    Dataset.from_dict(faulty()).to_json(tmp_path / "pairs.jsonl")
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "SCORED_LOG": str(log)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", AUDIT, *(str(tmp_path / name) for name in ("pairs.jsonl", "scores", f"own{i}"))],
            env=environment,
            stdout=subprocess.PIPE,
        )
        for i in range(2)
    ]
    one, other = (process.communicate(timeout=120)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert len(log.read_text(encoding="utf-8").splitlines()) == 1
    assert one == other
    assert b'"check": "duplicate"' in one
