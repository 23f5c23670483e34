"""The real ``axolotl`` command with ``dpo_ext:`` keys: what it must do, and what must stop it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration import runs

PLUGIN = "axolotl_dpo_ext.DPOExtPlugin"


def banner_lines(output: str) -> list[str]:
    return re.findall(r"axolotl-dpo-ext \S+ active: .*", output)


def records_of(output: Path) -> list[dict[str, Any]]:
    lines = (output / "dpo_quality_records.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_quickstart_trains_and_reports(inputs: Path, tmp_path: Path, discovers: bool):
    keys: dict[str, Any] = yaml.safe_load(
        (runs.ROOT / "example_configs" / "quickstart.yaml").read_text(encoding="utf-8")
    )
    keys["base_model"] = str(inputs / "model")
    keys["datasets"][0]["path"] = str(inputs / "pairs.jsonl")
    keys |= {"dataset_prepared_path": "prepared", "output_dir": "output", "num_epochs": 1}
    if discovers:
        # Found by its entry point, and listed under a second name besides: registers once all the same.
        keys["plugins"] = ["axolotl_dpo_ext.plugin.DPOExtPlugin"]
    done = runs.axolotl("train", keys, tmp_path)
    assert done.returncode == 0, runs.tail(done)

    assert len(banner_lines(done.stdout)) == 1
    assert "hardware=cpu, reference=precomputed, quality (held-out 0.15), report" in banner_lines(done.stdout)[0]

    output = tmp_path / "output"
    report = json.loads((output / "dpo_report.json").read_text(encoding="utf-8"))
    sections = {section["title"]: section for section in report["sections"]}
    heldout = sections["Training"]["data"]["heldout"]
    assert heldout["accuracy"]["after"] > 0.5
    assert abs(heldout["margin_per_beta"]["before"]) < 1e-3  # rounding: the reference was computed in other batches
    assert heldout["margin_per_beta"]["after"] > 1.0
    assert [decision["choice"] for decision in report["decisions"]] == ["cpu", "precomputed"]
    page = (output / "dpo_report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert re.search(r"held-out accuracy: .* at step 0 -> \S+ at step", done.stdout)
    assert "dpo_report.html" in done.stdout[-2000:]
    assert (output / "model.safetensors").exists()

    # 384 pairs, of which every twentieth row is spoilt in one of two ways (rows 7 and 14 of each twenty).
    identical = [record for record in records_of(output) if record["check"] == "identical"]
    assert all(record["chosen"] == record["rejected"] for record in identical)
    assert len(identical) == sum(number % 20 == 7 for number in range(384))
    dropped = {record["row"] for record in records_of(output) if record["action"] == "drop"}
    assert len(dropped) == sum(number % 20 in (7, 14) for number in range(384))
    left = 384 - len(dropped)
    train_rows, held_rows = map(int, re.search(r"; (\d+) to train on, (\d+) held out", done.stdout).groups())  # type: ignore[union-attr]
    assert train_rows + held_rows == left
    # Axolotl computed its steps from the rows that are left, not from those that it loaded.
    total = json.loads((output / "preference_log.jsonl").read_text(encoding="utf-8").splitlines()[0])["max_steps"]
    assert total == -(-train_rows // keys["micro_batch_size"])


def test_real_pairs_on_a_real_small_model(inputs: Path, tmp_path: Path):
    """The main job: real preference pairs, several keys of the pack, a model, metrics and a report."""
    model = runs.SHARED / "models" / "dpo-lab-llama-5m"
    rows = runs.real_pairs()
    data = runs.write_rows(tmp_path / "pairs.jsonl", rows)
    keys = runs.base_keys(model if model.exists() else inputs / "model", data)
    keys |= {"plugins": [PLUGIN], "max_steps": 8, "eval_steps": 4, "sequence_len": 512, "save_steps": 8}
    keys |= {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
    keys["dpo_ext"] = {
        "reference": "auto",
        "quality": {"max_length_ratio": 4, "policy": {"length_ratio": "flag"}, "holdout": 16},
    }
    done = runs.axolotl("train", keys, tmp_path, OMP_NUM_THREADS="2")
    assert done.returncode == 0, runs.tail(done)
    assert "reference=adapter" in banner_lines(done.stdout)[0]
    assert (tmp_path / "output" / "adapter_model.safetensors").exists()
    page = (tmp_path / "output" / "dpo_report.html").read_text(encoding="utf-8")
    assert "held-out" in page.lower()
    log = [
        json.loads(line)
        for line in (tmp_path / "output" / "preference_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [entry["step"] for entry in log if entry["event"] == "eval"] == [0, 4, 8]
    assert [entry["step"] for entry in log if entry["event"] == "train"] == list(range(1, 9))


def test_preprocess_audits_too_and_train_uses_its_cache(inputs: Path, tmp_path: Path):
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl")
    keys |= {
        "plugins": [PLUGIN],
        "dpo_ext": {"quality": {"max_length_ratio": 3}, "report": False},
        "max_steps": 2,
        "save_steps": 2,
    }
    first = runs.axolotl("preprocess", keys, tmp_path)
    assert first.returncode == 0, runs.tail(first)
    kept = re.search(r"kept (\d+) of 384 pairs", first.stdout)
    assert kept, runs.tail(first)
    # A changed threshold must have its effect although Axolotl's cache of prepared data knows nothing of it.
    keys["dpo_ext"]["quality"] = {"policy": {"identical": "keep", "similarity": "keep", "length_ratio": "keep"}}
    second = runs.axolotl("train", keys, tmp_path)
    assert second.returncode == 0, runs.tail(second)
    assert "kept 384 of 384 pairs" in second.stdout
    assert int(kept[1]) < 384
    assert not (tmp_path / "output" / "dpo_report.html").exists()


@pytest.mark.parametrize("rl", ["ipo", "orpo", "simpo"])
def test_other_pair_losses_get_what_they_ask_for(rl: str, inputs: Path, tmp_path: Path):
    """No schedule for evaluations is set: the pack adds one, or the held-out pairs would never be used."""
    texts = [
        {
            "prompt": row["messages"][0]["content"],
            "chosen": row["chosen"]["content"],
            "rejected": row["rejected"]["content"],
        }
        for row in runs.made_pairs()
    ]
    data = runs.write_rows(tmp_path / "pairs.jsonl", texts)
    keys = runs.base_keys(inputs / "model", data) | {"rl": rl, "max_steps": 4, "save_steps": 4}
    keys["datasets"] = [{"path": str(data), "ds_type": "json", "split": "train", "type": None}]
    keys |= {"simpo_gamma": 0.5} if rl == "simpo" else {}
    keys |= {"plugins": [PLUGIN], "dpo_ext": {"quality": True, "report": {"baseline": rl != "orpo"}}}
    done = runs.axolotl("train", keys, tmp_path)
    assert done.returncode == 0, runs.tail(done)
    lines = (tmp_path / "output" / "preference_log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    evaluated = [entry["step"] for entry in entries if entry["event"] == "eval"]
    assert evaluated == ([4] if rl == "orpo" else [0, 4])
    assert entries[0]["has_reference"] == (rl == "ipo")
    report = json.loads((tmp_path / "output" / "dpo_report.json").read_text(encoding="utf-8"))
    training = next(section for section in report["sections"] if section["title"] == "Training")
    assert any("reference" in note for note in training["notes"]) == (rl == "ipo")
    assert report["config"]["eval_strategy"] == "epoch"


def test_empty_answers_are_found_behind_axolotls_template(inputs: Path, tmp_path: Path):
    rows = runs.made_pairs()[:60]
    for number in (3, 17, 41):
        rows[number] = rows[number] | {"rejected" if number == 17 else "chosen": {"role": "assistant", "content": ""}}
    data = runs.write_rows(tmp_path / "pairs.jsonl", rows)
    keys = runs.base_keys(inputs / "model", data) | {"plugins": [PLUGIN]}
    keys["dpo_ext"] = {"quality": {"policy": {"length_ratio": "keep", "similarity": "keep", "identical": "keep"}}}
    done = runs.axolotl("preprocess", keys, tmp_path)
    assert done.returncode == 0, runs.tail(done)
    assert re.search(r"malformed +drop +> 0.5 +3 ", done.stdout), runs.tail(done)
    assert "kept 57 of 60 pairs" in done.stdout


def test_a_second_copy_beside_an_adapter_with_the_users_own_held_out_set(inputs: Path, tmp_path: Path):
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl")
    keys |= {"plugins": [PLUGIN], "dpo_ext": {"reference": "gpu", "quality": True}, "max_steps": 2, "save_steps": 2}
    keys |= {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, "eval_steps": 2}
    runs.write_rows(tmp_path / "test.jsonl", runs.made_pairs()[:24])
    keys["test_datasets"] = [{"path": str(tmp_path / "test.jsonl"), **runs.CHAT_DATASET}]
    done = runs.axolotl("train", keys, tmp_path)
    assert done.returncode == 0, runs.tail(done)
    assert "reference=gpu, quality, report" in banner_lines(done.stdout)[0]
    assert "dropped 38; none held out" in done.stdout
    lines = (tmp_path / "output" / "preference_log.jsonl").read_text(encoding="utf-8").splitlines()
    evals = [entry for entry in map(json.loads, lines) if entry["event"] == "eval"]
    assert [entry["step"] for entry in evals] == [0, 2]
    assert evals[0]["rewards/margins"] == 0.0, "the second copy is not the base model that the adapter starts from"


def test_resuming_continues_the_log_and_the_report(inputs: Path, tmp_path: Path):
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl")
    keys |= {"plugins": [PLUGIN], "dpo_ext": {"quality": True}, "max_steps": 4, "save_steps": 2}
    first = runs.axolotl("train", keys, tmp_path)
    assert first.returncode == 0, runs.tail(first)
    again = runs.axolotl("train", keys | {"resume_from_checkpoint": "output/checkpoint-2"}, tmp_path)
    assert again.returncode == 0, runs.tail(again)
    entries = [
        json.loads(line)
        for line in (tmp_path / "output" / "preference_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [entry["step"] for entry in entries if entry["event"] == "train"] == [1, 2, 3, 4]
    assert [entry["resumed_at"] for entry in entries if entry["event"] == "start"] == [0, 2]


def test_a_failed_run_does_not_show_an_earlier_runs_report(inputs: Path, tmp_path: Path):
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl") | {"plugins": [PLUGIN], "dpo_ext": {"quality": True}}
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "dpo_report.json").write_text('{"schema_version": 1}', encoding="utf-8")
    broken = tmp_path / "model"
    shutil.copytree(inputs / "model", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    done = runs.axolotl("train", keys | {"base_model": str(broken)}, tmp_path)
    assert done.returncode != 0
    assert "what the run did" not in done.stdout
    assert "SafetensorError" in done.stdout, runs.tail(done)


# Axolotl gives each of several processes an accelerator, also where there is none.
BOTH_ON_THE_CPU = """
from pathlib import Path
from axolotl.integrations.base import BasePlugin

class Both(BasePlugin):
    def load_datasets(self, cfg, preprocess=False):
        cfg.device_map = {"": "cpu"}

    def add_callbacks_post_trainer(self, cfg, trainer):
        state = trainer.accelerator.state
        Path(f"process-{state.process_index}-of-{state.num_processes}").touch()
        return []
"""


@pytest.mark.skipif(not runs.SEVERAL_PROCESSES, reason="Axolotl needs the driver of a CUDA build for several processes")
def test_two_processes_write_one_report(inputs: Path, tmp_path: Path):
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl")
    keys |= {
        "plugins": ["both.Both", PLUGIN],
        "dpo_ext": {"quality": True, "reference": "gpu"},
        "max_steps": 2,
        "save_steps": 2,
    }
    # With `--cpu` accelerate starts one process, whatever their number.
    launcher = ["--launcher", "accelerate", "--", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    (tmp_path / "both.py").write_text(BOTH_ON_THE_CPU, encoding="utf-8")
    done = runs.axolotl("train", keys, tmp_path, *launcher, PYTHONPATH=str(tmp_path), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, runs.tail(done)
    assert {file.name for file in tmp_path.glob("process-*")} == {"process-0-of-2", "process-1-of-2"}
    log = (tmp_path / "output" / "preference_log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in log]
    assert [entry["step"] for entry in entries if entry["event"] == "eval"] == [0, 2]
    assert [entry["event"] for entry in entries].count("start") == 1
    assert [entry["step"] for entry in entries if entry["event"] == "train"] == [1, 2]
    assert len(banner_lines(done.stdout)) == 1
    assert (tmp_path / "output" / "dpo_report.html").exists()


def test_every_problem_stops_the_run_in_one_error(inputs: Path, tmp_path: Path):
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl")
    keys |= {"plugins": [PLUGIN], "pad_to_multiple_of": 8, "trl": {"beta": 0.3}}
    keys["dpo_ext"] = {
        "refrenc": "auto",
        "hardware": "cpux",
        "reference": "adapter",
        "quality": {"embedder": "lexicl"},
    }
    done = runs.axolotl("train", keys, tmp_path)
    assert done.returncode != 0
    assert "6 problems in the configuration" in done.stdout, runs.tail(done)
    for words in ("did you mean 'reference'", "did you mean 'cpu'", "did you mean 'lexical'", "pad_to_multiple_of: 8",
                  "rl_beta: 0.1, trl.beta: 0.3", "adapter, without `adapter:`"):  # fmt: skip
        assert words in done.stdout
    assert "raise ConfigurationError" not in done.stdout, "the list must not be buried in a traceback"
    assert not (tmp_path / "output" / "model.safetensors").exists()


@pytest.mark.parametrize("asked", [True, False])
def test_a_plugin_that_cannot_be_imported_stops_only_runs_that_ask_for_it(
    asked: bool, inputs: Path, tmp_path: Path, discovers: bool
):
    # `None` in sys.modules makes the import fail as a missing or broken dependency would.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['axolotl_dpo_ext.plugin'] = None\n", encoding="utf-8"
    )
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl") | {"max_steps": 1, "save_steps": 1}
    if not discovers:
        keys["plugins"] = [PLUGIN]
    if asked:
        keys["dpo_ext"] = {"reference": "gpu"}
    done = runs.axolotl("train", keys, tmp_path, PYTHONPATH=str(tmp_path))
    if asked:
        assert done.returncode != 0
        assert "axolotl-dpo-ext could not be activated" in done.stdout, runs.tail(done)
        assert not (tmp_path / "output").exists()
    else:
        assert done.returncode == 0, runs.tail(done)
        assert (tmp_path / "output" / "model.safetensors").exists()


def test_a_key_without_the_plugin_listed(inputs: Path, tmp_path: Path, discovers: bool):
    """Axolotl 0.20 and newer discover the plugin; Axolotl 0.19 would ignore the key, so the run must stop."""
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl")
    keys |= {"dpo_ext": {"reference": "adapter"}}  # without `adapter:`: refused wherever the plugin is active
    done = runs.axolotl("train", keys, tmp_path)
    assert done.returncode != 0
    expected = "adapter, without `adapter:`" if discovers else "the plugin would not be active"
    assert expected in done.stdout, runs.tail(done)
    assert not (tmp_path / "output").exists()


def test_registering_twice_activates_once():
    code = """
from axolotl.utils.config import validate_config
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault
from axolotl_dpo_ext.plugin import DPOExtPlugin
cfg = DictDefault({"rl": "dpo", "plugins": ["axolotl_dpo_ext.DPOExtPlugin", "axolotl_dpo_ext.plugin.DPOExtPlugin"],
                   "dpo_ext": {"reference": "gpu"}})
prepare_plugins(cfg)
ours = [p for p in PluginManager.get_instance().plugins.values() if isinstance(p, DPOExtPlugin)]
merge_input_args()
print("registered", len(ours), "active", sum(p._active is not None for p in ours))
"""
    done = runs.run([sys.executable, "-c", code], runs.ROOT)
    assert "registered 2 active 1" in done.stdout, runs.tail(done)


@pytest.mark.parametrize("start", [["axolotl", "dpo-doctor"], [sys.executable, "-m", "axolotl_dpo_ext", "doctor"]])
def test_doctor_reports_axolotls_own_objections_too(start: list[str], inputs: Path, tmp_path: Path):
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl") | {
        "plugins": [PLUGIN],
        "dpo_ext": {"quality": True},
    }
    config = tmp_path / "run.yaml"
    command = [
        str(runs.BIN / start[0]) if start[0] == "axolotl" else start[0],
        *start[1:],
        str(config),
        "--json",
    ]

    config.write_text(yaml.safe_dump(keys), encoding="utf-8")
    sound = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert sound.returncode == 0, sound.stderr[-3000:] + sound.stdout
    told = json.loads(sound.stdout[sound.stdout.index("{") :])
    assert told["ok"]
    assert told["plugin"].startswith("active")
    assert told["settings"]["quality"]["max_length_ratio"] == 2.0

    config.write_text(yaml.safe_dump(keys | {"evals_per_epoch": 2, "eval_steps": 5}), encoding="utf-8")
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert refused.returncode == 1
    assert "mutually exclusive" in refused.stdout
