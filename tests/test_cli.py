"""The commands as users start them: real processes, exit codes, stdout and stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from axolotl_dpo_ext.report import RunReport
from axolotl_dpo_ext.vocabulary import Decision

LISTED = "plugins: [axolotl_dpo_ext.DPOExtPlugin]\n"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "axolotl_dpo_ext", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def config(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.stack
def test_doctor_without_a_configuration_looks_at_the_environment():
    shown = command("doctor")
    assert shown.returncode == 0, shown.stderr
    assert "trl" in shown.stdout
    told = json.loads(command("doctor", "--json").stdout)
    assert told["ok"]
    assert told["versions"]["trl"]
    assert told["settings"] is None


def test_doctor_shows_effective_settings_and_decisions(tmp_path: Path):
    path = config(
        tmp_path,
        LISTED + "rl: dpo\nadapter: lora\ndpo_ext: {reference: auto, quality: {holdout: 0.2}, hardware: cpu}\n",
    )
    shown = command("doctor", path, "--quick")
    assert shown.returncode == 0, shown.stdout
    assert "max_length_ratio: 2.0" in shown.stdout
    assert "holdout: 0.2" in shown.stdout
    assert "reference = adapter" in shown.stdout
    assert "none found" in shown.stdout


def test_doctor_lists_every_problem_and_exits_with_1(tmp_path: Path):
    path = config(
        tmp_path,
        LISTED + "rl: dpo\nrl_beta: 0.1\ntrl: {beta: 0.2}\npad_to_multiple_of: 8\n"
        "dpo_ext: {qualty: true, reference: adapter, hardware: cpu8, quality: {policy: {identcal: drop}}}\n",
    )
    told = json.loads((done := command("doctor", path, "--json", "--quick")).stdout)
    assert done.returncode == 1
    assert not told["ok"]
    assert {problem["setting"] for problem in told["problems"]} == {
        "dpo_ext.qualty",
        "dpo_ext.hardware",
        "rl_beta",
        "pad_to_multiple_of",
        "dpo_ext.reference",
        "dpo_ext.quality.policy.identcal",
    }
    shown = command("doctor", path, "--quick").stdout
    assert "did you mean 'identical'?" in shown
    assert shown.count("fix:") == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rl: [dpo\n", "is not YAML"),
        ("- rl\n", "holds list"),
        ("", "is empty"),
        ("d: 2001-99-99\n", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
        ("\xff\xfe", "run.yaml"),
    ],
)
def test_a_file_that_is_no_configuration_is_bad_usage(tmp_path: Path, text: str, words: str):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    done = command("doctor", path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("dpo-ext: {quality: true}\n", "dpo-ext"),
        ("dpoext: true\n", "dpoext"),
        ("dpo_ext: {quality: true}\ndpo_ext: {reference: auto}\n", "dpo_ext"),
        ("dpo_ext:\n  quality: {holdout: 0.2}\n  quality: true\n", "quality"),
    ],
)
def test_doctor_finds_keys_that_would_be_lost(tmp_path: Path, text: str, setting: str):
    told = json.loads(
        (done := command("doctor", config(tmp_path, LISTED + "rl: dpo\n" + text), "--json", "--quick")).stdout
    )
    assert done.returncode == 1
    assert [problem["setting"] for problem in told["problems"]] == [setting]


@pytest.mark.parametrize(
    ("reference", "variable", "setting"),
    [
        ("{strategy: precomputed, store: FILE}", "", "dpo_ext.reference.store"),
        ("{strategy: auto, store: FILE/below}", "", "dpo_ext.reference.store"),
        ("precomputed", "FILE", "AXOLOTL_DPO_EXT_REFERENCE_STORE"),
        ("{strategy: precomputed, store: FOLDER}", "FILE", None),
        ("gpu", "FILE", None),
    ],
)
def test_doctor_finds_a_file_where_the_store_should_be(
    reference: str, variable: str, setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("AXOLOTL_DPO_EXT_REFERENCE_STORE", variable.replace("FILE", str(file)))
    reference = reference.replace("FILE", str(file)).replace("FOLDER", str(tmp_path / "absent"))
    path = config(tmp_path, LISTED + f"rl: dpo\nadapter: lora\ndpo_ext: {{reference: {reference}}}\n")
    told = json.loads(command("doctor", path, "--json", "--quick").stdout)
    assert [problem["setting"] for problem in told["problems"]] == ([setting] if setting else [])
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("plugins", ["axolotl_dpo_ext.DPOExtPlugin", "5", "true"])
def test_doctor_says_that_plugins_must_be_a_list(tmp_path: Path, plugins: str):
    path = config(tmp_path, f"rl: dpo\nplugins: {plugins}\ndpo_ext: {{quality: true}}\n")
    told = json.loads(command("doctor", path, "--json", "--quick").stdout)
    assert [problem["setting"] for problem in told["problems"]] == ["plugins"]


def test_bad_usage_exits_with_2(tmp_path: Path):
    assert command("doctor", tmp_path / "missing.yaml").returncode == 2
    assert command("docter").returncode == 2
    empty = command("report", tmp_path)
    assert empty.returncode == 2
    assert "dpo_report.json" in empty.stderr


def test_schema_is_a_json_schema_on_stdout():
    done = command("schema")
    assert done.returncode == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(done.stdout))


def test_report_renders_a_run_that_was_cut_off(tmp_path: Path):
    RunReport(
        tmp_path,
        title="run 7",
        config={"rl": "dpo"},
        decisions=[Decision("reference", "gpu", "asked for")],
        sections=[],
    ).save()
    lines = [
        {"event": "start", "beta": 0.1, "loss_type": ["sigmoid"], "max_steps": 9, "num_train_epochs": 1, "resumed_at": 0, "time": 1.0},
        {"event": "eval", "step": 0, "epoch": 0.0, "time": 2.0, "loss": 0.693, "rewards/accuracies": 0.0, "rewards/margins": 0.0, "rewards/margins_per_beta": 0.0},
        {"event": "train", "step": 1, "epoch": 0.1, "time": 3.0, "loss": 0.69, "rewards/accuracies": 0.5, "rewards/margins": 0.1, "rewards/margins_per_beta": 1.0},
    ]  # fmt: skip
    log = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "train", "st'
    (tmp_path / "preference_log.jsonl").write_text(log, encoding="utf-8")
    done = command("report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy" in done.stdout
    page = (tmp_path / "dpo_report.html").read_text(encoding="utf-8")
    assert "run 7" in page
    assert "<svg" in page
    assert json.loads(command("report", tmp_path, "--json").stdout)["title"] == "run 7"
