"""``dpo-audit`` as users start it: what it says, writes and refuses, on data files and on an Axolotl YAML."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from click.testing import CliRunner, Result
from datasets import load_dataset

from axolotl_dpo_ext.cli import cli
from axolotl_dpo_ext.quality.files import read_files
from tests.integration import runs
from tests.quality.conftest import make_pairs, sentence
from tests.test_cli import command as started

PARTS = ("train", "heldout", "dropped")


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["audit", *map(str, words)])


def told(*words: object, code: int = 0) -> dict[str, Any]:
    done = run(*words, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def refused(*words: object) -> str:
    """Runs a command that is bad usage: exit code 2, nothing on stdout, no traceback; returns what it says."""
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    pairs = make_pairs(start + n)
    return [{name: values[i] for name, values in pairs.items()} for i in range(start, start + n)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """40 sound pairs over 40 prompts."""
    return runs.write_rows(tmp_path / "sound.jsonl", rows(40))


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """40 pairs: rows 3 and 17 have equal answers, row 30 an answer six times as long."""
    made = rows(40)
    for number in (3, 17):
        made[number]["rejected"] = made[number]["chosen"]
    made[30]["chosen"] = sentence(999, 240)
    return runs.write_rows(tmp_path / "faulty.jsonl", made)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model and pairs; those as messages too."""
    folder = tmp_path_factory.mktemp("inputs")
    done = runs.run([sys.executable, runs.ROOT / "example_configs" / "make_tiny_inputs.py", folder], folder)
    assert done.returncode == 0, runs.tail(done)
    runs.write_rows(folder / "chat.jsonl", runs.made_pairs())
    return folder


def test_sound_pairs_exit_with_0_and_words_are_said_to_be_words(sound: Path):
    done = run(sound)
    assert done.exit_code == 0, done.output
    assert "kept 40 of 40 pairs, dropped 0; none held out" in done.stdout
    assert "Lengths are words, not tokens: no tokenizer was given." in done.stdout
    assert "wrote" not in done.stdout


def test_dropped_pairs_exit_with_1(faulty: Path):
    data = told(faulty, code=1)
    assert (data["stopped"], data["pairs"], data["dropped"], data["train"], data["heldout"]) == (False, 40, 3, 37, 0)
    assert {name: check["flagged"] for name, check in data["checks"].items() if check["flagged"]} == {
        "identical": 2, "similarity": 2, "minimal_edit": 2, "length_ratio": 1,
    }  # fmt: skip
    assert data["written"] == []
    assert "kept 37 of 40 pairs, dropped 3" in run(faulty).stdout


def test_flagged_pairs_alone_exit_with_0_and_are_told_in_the_report(faulty: Path, tmp_path: Path):
    policy = "policy={identical: flag, similarity: flag, length_ratio: flag}"
    assert told(faulty, "--set", policy, "--output", tmp_path / "out")["dropped"] == 0
    section = json.loads((tmp_path / "out" / "dpo_report.json").read_text(encoding="utf-8"))["sections"][0]
    assert "2 pairs that identical flagged are still in the data: its policy is `flag`." in section["notes"]
    asked = {row[0]: row[2] for row in section["tables"][1]["rows"]}
    assert "2.5 % above 2 (now), 2.5 % above 3, " in asked["length_ratio"]
    assert asked["duplicate"].startswith("0.0 % above 0.8, "), "0.6 cannot be set, and is not known"


def test_a_folder_gets_every_row_the_records_and_the_report(faulty: Path, tmp_path: Path):
    output = tmp_path / "new" / "out"
    done = run(faulty, "--set", "holdout=0.2", "--output", output)
    assert done.exit_code == 1, done.output
    parts = {part: lines(output / f"{part}.jsonl") for part in PARTS}
    assert {part: len(found) for part, found in parts.items()} == {"train": 30, "heldout": 7, "dropped": 3}
    by_prompt = {row["prompt"]: row for row in lines(faulty)}
    assert {row["prompt"]: row for part in PARTS for row in parts[part]} == by_prompt
    for part in PARTS:
        assert f"wrote {output / part}.jsonl ({len(parts[part])} rows)" in done.stdout
        assert read_files([output / f"{part}.jsonl"]).dataset.to_list() == parts[part]
        assert load_dataset("json", data_files=str(output / f"{part}.jsonl"), split="train").to_list() == parts[part]
    records = lines(output / "dpo_quality_records.jsonl")
    assert f"dpo_quality_records.jsonl ({len(records)} rows)" in done.stdout
    assert {(one["row"], one["check"]) for one in records if one["action"] == "drop"} == {
        (3, "identical"), (3, "similarity"), (17, "identical"), (17, "similarity"), (30, "length_ratio"),
    }  # fmt: skip
    report = json.loads((output / "dpo_report.json").read_text(encoding="utf-8"))
    assert report["sections"][0]["data"]["dropped"] == 3
    # minimal_edit flagged two pairs, but others dropped them.
    assert [note for note in report["sections"][0]["notes"] if "still in the data" in note] == []
    assert report["config"]["dpo_ext"]["quality"]["holdout"] == 0.2
    assert "faulty.jsonl" in (output / "dpo_report.html").read_text(encoding="utf-8")
    assert len(list(output.iterdir())) == 6, "something temporary is left"


def test_a_second_audit_replaces_what_the_first_wrote(faulty: Path, sound: Path, tmp_path: Path):
    output = tmp_path / "out"
    first = told(faulty, "--set", "holdout=8", "--output", output, code=1)
    assert {Path(name) for name in first["written"]} == set(output.iterdir())
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    before = (output / "train.jsonl").stat().st_ino
    second = told(sound, "--output", output)
    # What was held out then may be trained on now: the file must not stay beside the new one.
    assert {path.name for path in output.iterdir()} == {
        "train.jsonl", "dpo_quality_records.jsonl", "dpo_report.json", "dpo_report.html", "notes.txt",
    }  # fmt: skip
    assert len(second["written"]) == 4
    assert lines(output / "train.jsonl") == lines(sound)
    assert lines(output / "dpo_quality_records.jsonl") == []
    assert (output / "train.jsonl").stat().st_ino != before, "written over instead of replaced"


def test_auditing_what_was_written_drops_nothing(faulty: Path, tmp_path: Path):
    run(faulty, "--output", tmp_path / "out")
    assert told(tmp_path / "out" / "train.jsonl")["dropped"] == 0


@pytest.mark.parametrize("words", [("--output", "."), ("--records", "train.jsonl"), ("--test", "train.jsonl", "--output", ".")])  # fmt: skip
def test_what_is_read_is_never_replaced(words: tuple[str, ...], sound: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.write_rows(tmp_path / "train.jsonl", rows(5))
    source = sound if "--test" in words else "train.jsonl"
    assert "train.jsonl is read by this audit and would be replaced" in refused(source, *words)
    assert lines(tmp_path / "train.jsonl") == rows(5)


def test_the_report_of_a_training_run_is_not_replaced(sound: Path, tmp_path: Path):
    (tmp_path / "preference_log.jsonl").touch()
    assert "holds a training run" in refused(sound, "--output", tmp_path)
    assert not (tmp_path / "train.jsonl").exists()


def test_a_folder_that_cannot_be_written_to_is_said(sound: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    done = run(sound, "--output", tmp_path / "file" / "below")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert str(tmp_path / "file") in done.stderr
    assert "is a file" in refused(sound, "--output", tmp_path / "file")


def test_records_go_to_a_file_of_their_own(faulty: Path, tmp_path: Path):
    output, parquet = tmp_path / "out", tmp_path / "records.parquet"
    told(faulty, "--output", output, code=1)
    data = told(faulty, "--output", output, "--records", parquet, code=1)
    assert str(parquet) in data["written"]
    assert not (output / "dpo_quality_records.jsonl").exists()
    told(faulty, "--records", tmp_path / "records.jsonl", code=1)
    table = pyarrow.parquet.read_table(parquet).drop_columns(["source", "source_row"])  # of one file they are not known
    assert table.to_pylist() == lines(tmp_path / "records.jsonl")
    assert "records are written as .jsonl or .parquet" in refused(faulty, "--records", tmp_path / "records.csv")


def test_a_tokenizer_counts_tokens_and_a_length_shows_what_is_cut_off(inputs: Path):
    data = told(inputs / "pairs.jsonl", "--tokenizer", inputs / "model", code=1)
    assert (data["length_unit"], data["pairs"], data["dropped"]) == ("tokens", 384, 38)
    assert data["checks"]["truncated"]["scored"] == 0
    cut = told(inputs / "pairs.jsonl", "--tokenizer", inputs / "model", "--max-length", 40, code=1)["checks"][
        "truncated"
    ]
    assert cut["scored"] == 384
    assert 0 < cut["flagged"] < 384
    assert "Lengths are words" not in run(inputs / "pairs.jsonl", "--tokenizer", inputs / "model").stdout


def test_an_unknown_tokenizer_is_named(sound: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"--tokenizer: '{tmp_path}' why: no tokenizer can be loaded" in refused(sound, "--tokenizer", tmp_path)
    assert "--tokenizer: 'lab/absent'" in refused(sound, "--tokenizer", "lab/absent")


def test_prompts_of_test_files_are_flagged(sound: Path, tmp_path: Path):
    tests = [runs.write_rows(tmp_path / f"test{i}.jsonl", rows(3, start)) for i, start in enumerate((5, 38))]
    one = told(sound, "--test", tests[0], "--set", "policy={leakage: drop}", code=1)
    both = told(sound, "--test", tests[0], "--test", tests[1])
    assert (one["checks"]["leakage"]["flagged"], one["dropped"]) == (3, 3)
    assert (both["checks"]["leakage"]["flagged"], both["dropped"]) == (5, 0), "row 40 of the test data is not in sound"
    assert told(sound)["checks"]["leakage"]["scored"] == 0


def test_settings_are_read_as_yaml(faulty: Path):
    data = told(faulty, "--set", "max_length_ratio=10", "--set", "policy={identical: keep, similarity: flag}")
    assert data["dropped"] == 0
    assert data["checks"]["length_ratio"]["threshold"] == 10
    assert "identical" not in data["checks"]
    assert told(faulty, "--set", "holdout = 8", code=1)["heldout"] == 8


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("max_length_ratio", "expected KEY=VALUE, such as `--set max_length_ratio=3`"),
        ("=3", "expected KEY=VALUE"),
        ("policy={", "--set policy={: the value is not YAML"),
        ("max_lenght_ratio=3", "unknown key 'max_lenght_ratio' why: this version has no such setting"),
        ("max_lenght_ratio=3", "fix: did you mean 'max_length_ratio'?"),
        ("max_length_ratio=half", "dpo_ext.quality.max_length_ratio: 'half'"),
        ("max_length_ratio=0.5", "dpo_ext.quality.max_length_ratio: 0.5"),
        ("holdout=1.5", "dpo_ext.quality.holdout: 1.5"),
        ("policy={identcal: drop}", "there is no check of that name fix: did you mean 'identical'?"),
        ("policy={identical: remove}", "dpo_ext.quality.policy.identical: 'remove'"),
        ("embedder=lexicl", "dpo_ext.quality.embedder: 'lexicl'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(sound: Path, setting: str, words: str):
    assert words in refused(sound, "--set", setting)


def test_a_setting_given_twice_is_refused(sound: Path):
    assert "holdout is set twice" in refused(sound, "--set", "holdout=1", "--set", "holdout=2")


def test_a_stop_shows_its_table_and_writes_nothing(faulty: Path, tmp_path: Path):
    words = (faulty, "--set", "max_drop_fraction=0.05", "--output", tmp_path / "out")
    done = run(*words)
    assert done.exit_code == 1
    assert "would drop 3 of 40 pairs (7.5%), more than `max_drop_fraction: 0.05` allows" in done.stdout
    assert re.search(r"identical +drop +> 0.5 +2 +5.0 %", done.stdout)
    assert "`policy: {identical: flag}` keeps its 2 pairs" in done.stdout
    assert "--set max_drop_fraction=1" in done.stdout
    assert "Traceback" not in done.output
    data = told(*words, code=1)
    assert data["stopped"]
    assert data["message"].startswith("The audit would drop 3 of 40")
    assert data["checks"]["identical"]["flagged"] == 2
    assert data["written"] == []
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_be_audited_are_refused(sound: Path, tmp_path: Path):
    assert "Missing argument 'SOURCES...'" in refused()
    assert "does not exist" in refused(sound, tmp_path / "absent.jsonl")
    assert "does not exist" in refused(sound, "--test", tmp_path / "absent.jsonl")
    assert "a file named twice" in refused(sound, sound)
    assert "'.txt'" in refused(Path(sound).rename(tmp_path / "sound.txt"))
    other = runs.write_rows(tmp_path / "other.jsonl", [{"question": "q", "answer": "a"}])
    assert "columns question, answer why: pairs need `chosen` and `rejected`" in refused(other)


def test_a_yaml_stands_alone(sound: Path, tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text("rl: dpo\nbase_model: x\n", encoding="utf-8")
    assert "give it alone" in refused(sound, config)
    assert "with `base_model`" in refused(config, "--tokenizer", "x")
    assert "with `sequence_len`" in refused(config, "--max-length", 5)
    assert "with `test_datasets`" in refused(config, "--test", sound)
    config.write_text("rl: dpo\ndatasets: []\nrl: ipo\n", encoding="utf-8")
    assert "the key rl twice in the mapping that starts in line 1" in refused(config)
    config.write_text("rl: [dpo\n", encoding="utf-8")
    assert "is not YAML" in refused(config)


def test_malformed_rows_are_dropped_and_named_with_file_and_line(sound: Path, tmp_path: Path):
    made = [json.dumps(row) for row in rows(20, start=50)]
    made[4], made[9] = '{"prompt": "q" "chosen": 1}', json.dumps(rows(1)[0] | {"chosen": 42})
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(made) + "\n", encoding="utf-8")
    output = tmp_path / "out"
    data = told(sound, broken, "--output", output, code=1)
    assert (data["pairs"], data["dropped"], data["train"]) == (60, 2, 58)
    named = {one["row"]: one for one in lines(output / "dpo_quality_records.jsonl") if one["check"] == "malformed"}
    assert named[44]["reason"].startswith("broken.jsonl, line 5: not JSON: Expecting ',' delimiter")
    assert named[49]["reason"].startswith("broken.jsonl, line 10: chosen: a number, but it has to be text")
    assert {row: (one["source"], one["source_row"]) for row, one in named.items()} == {
        44: ("broken.jsonl", 4), 49: ("broken.jsonl", 9),
    }  # fmt: skip


def test_figures_are_given_per_source(faulty: Path, sound: Path, tmp_path: Path):
    other = runs.write_rows(tmp_path / "other.jsonl", rows(20, start=100))
    words = (faulty, other, "--set", "holdout=0.2")
    data = told(*words, code=1)
    assert {name: (of["pairs"], of["dropped"], of["heldout"]) for name, of in data["sources"].items()} == {
        "faulty.jsonl": (40, 3, 7), "other.jsonl": (20, 0, 4),
    }  # fmt: skip
    assert data["sources"]["faulty.jsonl"]["flagged"]["identical"] == 2
    assert re.search(r"^faulty.jsonl +40 +3 +30 +7\nother.jsonl +20 +0 +16 +4$", run(*words).stdout, re.M)
    assert "source" not in run(faulty).stdout


def test_labelled_answers_are_audited_as_such(tmp_path: Path):
    made = [{"prompt": f"q {i}", "completion": sentence(i), "label": i % 2 == 0} for i in range(30)]
    made[7]["completion"] = " "
    done = run(runs.write_rows(tmp_path / "kto.jsonl", made))
    assert done.exit_code == 1, done.output
    assert "kept 29 of 30 answers, dropped 1" in done.stdout
    assert "length_ratio" not in done.stdout


@pytest.mark.stack
def test_as_a_process_stdout_is_one_json_object(faulty: Path, sound: Path, tmp_path: Path):
    done = started("audit", faulty, "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["dropped"] == 3
    assert started("audit", sound).returncode == 0
    bad = started("audit", tmp_path / "absent.jsonl")
    assert (bad.returncode, bad.stdout) == (2, "")


def test_data_files_need_no_axolotl_and_a_yaml_says_that_it_does(sound: Path, tmp_path: Path):
    (tmp_path / "run.yaml").write_text("rl: dpo\nbase_model: x\n", encoding="utf-8")
    # `None` in sys.modules: importing it fails as if it were not there.
    code = "import sys; sys.modules['axolotl'] = None; from axolotl_dpo_ext.cli import main; main()"
    files, config = (
        subprocess.run([sys.executable, "-c", code, "audit", path], capture_output=True, text=True, check=False)
        for path in (sound, tmp_path / "run.yaml")
    )
    assert files.returncode == 0, files.stderr
    assert config.returncode == 2
    assert "pip install 'axolotl-dpo-ext[axolotl]'" in config.stderr


needs_axolotl = pytest.mark.skipif(not importlib.util.find_spec("axolotl"), reason="stack C has no Axolotl")


def audit_yaml(keys: dict[str, Any], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the command on these keys in a folder; stdout and stderr apart."""
    (folder / "run.yaml").write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "axolotl_dpo_ext", "audit", "run.yaml", *words]
    environment = {**os.environ, **runs.ENVIRONMENT}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@needs_axolotl
@pytest.mark.stack
def test_a_yaml_is_audited_as_a_run_would_on_any_machine(inputs: Path, tmp_path: Path):
    made = runs.made_pairs()
    for name, some in (("a", made[:200]), ("b", made[200:])):
        runs.write_rows(tmp_path / f"{name}.jsonl", some)
    keys = runs.base_keys(inputs / "model", tmp_path / "a.jsonl")
    keys["datasets"].append({"path": "b.jsonl", **runs.CHAT_DATASET})
    # A login node has neither bfloat16 nor deepspeed; the data are the same there.
    keys |= {"bf16": True, "deepspeed": "absent.json", "dpo_ext": {"quality": {"holdout": 0.2}, "reference": "gpu"}}
    done = audit_yaml(keys, tmp_path, "--set", "max_length_ratio=3", "--output", "audited", "--json")
    assert done.returncode == 1, done.stderr[-6000:]
    data = json.loads(done.stdout)
    # Every twentieth row is spoilt in one of two ways (rows 7 and 14 of each twenty).
    spoilt = [number for number in range(384) if number % 20 in (7, 14)]
    assert (data["pairs"], data["dropped"], data["length_unit"]) == (384, len(spoilt), "tokens")
    assert data["heldout"] == pytest.approx(0.2 * 346, abs=1)
    assert [of["pairs"] for of in data["sources"].values()] == [200, 184]
    assert data["checks"]["length_ratio"]["threshold"] == 3
    dropped = {
        one["row"] for one in lines(tmp_path / "audited" / "dpo_quality_records.jsonl") if one["action"] == "drop"
    }
    assert dropped == set(spoilt)
    assert sum(len(lines(tmp_path / "audited" / f"{part}.jsonl")) for part in PARTS) == 384
    assert not (tmp_path / "output").exists(), "an audit leaves the run's own folder alone"


@needs_axolotl
@pytest.mark.stack
def test_a_yaml_without_quality_and_with_test_data(inputs: Path, tmp_path: Path):
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl")
    runs.write_rows(tmp_path / "test.jsonl", runs.made_pairs()[:24])
    keys["test_datasets"] = [{"path": "test.jsonl", **runs.CHAT_DATASET}]
    done = audit_yaml(keys, tmp_path, "--json")
    assert done.returncode == 1, done.stderr[-6000:]
    data = json.loads(done.stdout)
    assert (data["pairs"], data["dropped"], data["heldout"]) == (384, 38, 0)
    assert data["checks"]["leakage"]["flagged"] >= 24
    refused = audit_yaml(keys | {"pad_to_multiple_of": 8}, tmp_path, "--set", "polcy={}")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "2 problems in the configuration" in refused.stderr
    assert "did you mean 'policy'" in refused.stderr


@needs_axolotl
@pytest.mark.stack
def test_a_broken_line_is_named_and_the_good_rows_can_be_had(inputs: Path, tmp_path: Path):
    made = (inputs / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    made[16] = made[16][:30]
    (tmp_path / "pairs.jsonl").write_text("\n".join(made) + "\n", encoding="utf-8")
    keys = runs.base_keys(inputs / "model", Path("pairs.jsonl"))
    keys |= {"plugins": ["axolotl_dpo_ext.DPOExtPlugin"], "dpo_ext": {"quality": True}}
    audited = audit_yaml(keys, tmp_path)
    prepared = runs.axolotl("preprocess", keys, tmp_path)
    assert audited.returncode == 2
    assert prepared.returncode != 0
    for said in (audited.stderr, prepared.stdout):
        assert "datasets: pairs.jsonl, line 17: not JSON" in said, said[-6000:]
        assert "`axolotl dpo-audit pairs.jsonl --output DIR`" in said
        assert "Traceback" not in said[said.index("line 17") :]
    good = started("audit", tmp_path / "pairs.jsonl", "--output", tmp_path / "good")
    assert good.returncode == 1, good.stderr
    keys["datasets"][0]["path"] = "good/train.jsonl"
    again = audit_yaml(keys, tmp_path, "--json")
    assert json.loads(again.stdout)["dropped"] == 0, again.stderr[-6000:]


def test_files_that_no_audit_wrote_are_not_replaced(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b c", "rejected": "d e"}) + "\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "heldout.jsonl").write_text("mine\n")
    command = [str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "own")]
    done = CliRunner().invoke(cli, ["audit", *command])
    assert done.exit_code == 2
    assert "holds heldout.jsonl, which no audit left there" in done.output
    assert (tmp_path / "own" / "heldout.jsonl").read_text() == "mine\n"
