"""What others raise without saying what to change, told in this pack's form."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl_dpo_ext.upstream_errors import explained, in_datasets, in_files, in_trainer, in_validation
from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem, RunStopped
from tests.test_cli import command

KEYS: dict[str, Any] = {
    "base_model": "/absent/model",
    "datasets": [{"path": "pairs.jsonl"}],
    "sequence_len": 4,
    "bf16": True,
}


def told(step: Any, error: Exception, keys: dict[str, Any] = KEYS) -> Problem:
    with pytest.raises(ConfigurationError) as caught, explained(keys, step):
        raise error
    (problem,) = caught.value.problems
    return problem


def test_a_missing_model_is_named_whatever_step_looks_for_it(monkeypatch):
    from transformers import AutoConfig

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, reason in (("/absent/model", "there is no such folder"), ("lab/absent", "connect")):
        with pytest.raises(OSError, match=r".") as raised:
            AutoConfig.from_pretrained(name)
        for step in (in_validation, in_datasets, in_trainer):
            problem = told(step, raised.value, {**KEYS, "base_model": name})
            assert problem.setting == "base_model"
            assert name in problem.found
            assert reason in problem.reason


def test_no_rows_are_told_with_the_files_and_the_length():
    for step in (in_datasets, in_trainer):
        problem = told(step, StopIteration())
        assert problem.setting == "datasets"
        assert "pairs.jsonl" in problem.found
        assert "sequence_len (4)" in problem.reason


def test_datasets_that_cannot_be_loaded_are_named():
    for error in (ValueError("no such\nfile"), FileNotFoundError("no such file")):
        problem = told(in_datasets, error)
        assert "pairs.jsonl can't be loaded" in problem.found
        assert "no such file" in problem.reason


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), KeyError("messages")])
def test_rows_of_local_files_are_named_with_line_and_reason(error: Exception, tmp_path: Path):
    pair = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    lines = {
        "pairs.jsonl": [pair, pair, "oops", "5", "6", "7"],
        "mixed.jsonl": [pair, pair, pair, pair.replace('"a"', "1")],
        "own columns.jsonl": ['{"question": "q", "good": "a"}', "oops"],
        "sound.jsonl": [pair, pair],
    }
    for name, some in lines.items():
        (tmp_path / name).write_text("\n".join(some) + "\n", encoding="utf-8")
    (tmp_path / "array.json").write_text(f"[{pair};{pair}]", encoding="utf-8")
    path = {name: str(tmp_path / name) for name in (*lines, "array.json")}
    keys = {
        "datasets": [
            {"path": path["pairs.jsonl"]},
            {"path": "json", "data_files": [path["mixed.jsonl"]]},
            {"path": "lab/hub"},
        ],
        "test_datasets": [
            {"path": path["own columns.jsonl"]},
            {"path": path["sound.jsonl"]},
            {"path": path["array.json"]},
        ],
    }
    for step in (in_files, in_datasets):
        problems = step(keys, error)
        assert [(problem.setting, problem.found) for problem in problems] == [
            ("datasets", "pairs.jsonl, line 3: not JSON: Expecting value at character 1; pairs.jsonl, line 4: a number, not an "
             "object with columns; pairs.jsonl, line 5: a number, not an object with columns; and 1 more"),
            ("datasets", "mixed.jsonl, line 4: chosen: a number, but it has to be text, as in most rows of the file"),
            ("test_datasets", "own columns.jsonl, line 2: not JSON: Expecting value at character 1"),
            ("test_datasets", problems[3].found),
        ]  # fmt: skip
        assert problems[3].found.startswith("array.json: broken JSON in line 1")
        assert f"`axolotl dpo-audit {path['pairs.jsonl']} --output DIR`" in problems[0].fix
        assert type(error).__name__ in problems[0].reason
        # The command reads the columns of pairs only.
        assert problems[2].fix == problems[3].fix == "mend it"


def test_sound_files_are_not_blamed_and_a_missing_column_is_told(tmp_path: Path):
    (tmp_path / "sound.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n', encoding="utf-8")
    keys = {"datasets": [{"path": str(tmp_path / "sound.jsonl")}]}
    error = KeyError("messages")
    with pytest.raises(KeyError) as caught, explained(keys, in_files):
        raise error
    assert caught.value is error
    with pytest.raises(ConfigurationError) as told, explained(keys, in_datasets):
        raise error
    assert "KeyError: 'messages'" in str(told.value)
    assert "correct `path`, `type` and the field names" in str(told.value)


def test_bfloat16_on_a_machine_without_it_is_told():
    problem = told(in_trainer, ValueError("Your setup doesn't support bf16/gpu."))
    assert (problem.setting, problem.found) == ("bf16", "bf16: true, on a machine without bfloat16")


@pytest.mark.parametrize(
    "error",
    [ValueError("something else"), OSError(28, "No space left on device"), RunStopped("said already"), KeyError("x")],
)
def test_what_is_not_known_passes_with_its_traceback(error: Exception):
    with pytest.raises(type(error)) as caught, explained(KEYS, in_trainer):
        raise error
    assert caught.value is error


@pytest.mark.skipif(not importlib.util.find_spec("axolotl"), reason="stack C has no Axolotl")
def test_precompute_tells_what_axolotl_refuses_without_a_traceback(tmp_path: Path):
    keys = {
        "plugins": ["axolotl_dpo_ext.DPOExtPlugin"], "dpo_ext": {"hardware": "cpu", "reference": "precomputed"},
        "rl": "dpo", "datasets": [{"path": "pairs.jsonl", "type": "chat_template.default"}], "micro_batch_size": 1,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "val_set_size": 0, "eval_steps": 5,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    done = command("precompute", tmp_path / "run.yaml", "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    said = done.stderr[done.stderr.index("Error: ") :]
    assert re.search(r"\n\s+why: eval_steps .*val_set_size == 0\n\s+fix: ", said), said
