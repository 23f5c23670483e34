"""`dpo_ext: {reference: …}` in real Axolotl runs: the same losses, no reference model in memory, values kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axolotl_dpo_ext.reference.store import ReferenceStore
from tests.integration.runs import BIN, SEVERAL_PROCESSES, axolotl, base_keys, run, steps, tail

PLUGIN = "axolotl_dpo_ext.DPOExtPlugin"
# Axolotl's own hook tells how many models are in memory when training starts.
COUNTER = """
import gc, json
from axolotl.integrations.base import BasePlugin
from transformers import LlamaForCausalLM

class Counter(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        gc.collect()
        models = [m for m in gc.get_objects() if type(m) is LlamaForCausalLM]
        weights = {id(p): p.numel() for m in models for p in m.parameters()}
        policy = sum(p.numel() for p in trainer.accelerator.unwrap_model(trainer.model).parameters())
        with open("counted.json", "w") as file:
            json.dump({"all": sum(weights.values()), "policy": policy, "ref_model": trainer.ref_model is not None}, file)
        return []
"""

# In each process: shards so small that all have some, and a note of who stored how many rows.
SHARER = """
import os
from axolotl.integrations.base import BasePlugin
from axolotl_dpo_ext.reference import precompute
from axolotl_dpo_ext.reference.store import ReferenceStore

precompute.SHARD_TOKENS = 1500
append = ReferenceStore.append

def noted(self, rows):
    with open("stored-by-" + os.environ.get("RANK", "one"), "a") as file:
        file.write(f"{len(rows)} ")
    return append(self, rows)

ReferenceStore.append = noted

class Sharer(BasePlugin):
    pass
"""


def keys(inputs: Path, reference: str | None, **more: Any) -> dict[str, Any]:
    made = base_keys(inputs / "model", inputs / "chat.jsonl") | {
        "plugins": [PLUGIN, "counter.Counter"],
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "save_steps": 3,
        "dpo_ext": {"quality": {"holdout": 8}, "reference": reference} if reference else {"quality": {"holdout": 8}},
    }
    return {**made, **more}


def train(made: dict[str, Any], folder: Path, store: Path) -> tuple[list[float], dict[str, Any], str]:
    """Runs `axolotl train`; returns losses and gradient norms, what the counter counted, and the output."""
    folder.mkdir()
    (folder / "counter.py").write_text(COUNTER, encoding="utf-8")
    done = axolotl("train", made, folder, PYTHONPATH=str(folder), AXOLOTL_DPO_EXT_REFERENCE_STORE=str(store))
    assert done.returncode == 0, tail(done)
    counted = json.loads((folder / "counted.json").read_text(encoding="utf-8"))
    return [value for _, *values in steps(folder / "output") for value in values], counted, done.stdout


def precompute(made: dict[str, Any], folder: Path, store: Path, processes: int) -> subprocess.CompletedProcess[str]:
    import yaml

    folder.mkdir()
    (folder / "counter.py").write_text(COUNTER, encoding="utf-8")
    (folder / "sharer.py").write_text(SHARER, encoding="utf-8")
    (folder / "run.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")
    # Where there are no accelerators to count, `accelerate` starts several processes only if told so once more.
    launch = [BIN / "accelerate", "launch", "--num_processes", processes, "--multi_gpu", "--main_process_port", 0]
    starter = launch if processes > 1 else [sys.executable]
    command = [*starter, "-m", "axolotl_dpo_ext", "precompute", "run.yaml", "--json"]
    environment = {
        "PYTHONPATH": str(folder),
        "AXOLOTL_DPO_EXT_REFERENCE_STORE": str(store),
        "ACCELERATE_USE_CPU": "true",
    }
    done = run(command, folder, **environment)
    assert done.returncode == 0, tail(done)
    return done


def shards(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.rglob("shard-*")}


def test_full_fine_tuning_with_values_that_other_processes_prepared(inputs: Path, tmp_path: Path):
    store = tmp_path / "store"
    plain, counted, _ = train(keys(inputs, None), tmp_path / "plain", store)
    assert counted["ref_model"]
    assert counted["all"] == 2 * counted["policy"]

    made = keys(inputs, "precomputed")
    precompute(made, tmp_path / "prepared", store, processes=2 if SEVERAL_PROCESSES else 1)
    stored = shards(store)
    assert stored

    ours, counted, output = train(made, tmp_path / "ours", store)
    assert ours == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert not counted["ref_model"]
    assert counted["all"] == counted["policy"]
    assert "0 answers computed" in output
    assert shards(store) == stored
    report = json.loads((tmp_path / "ours" / "output" / "dpo_report.json").read_text(encoding="utf-8"))
    assert "Reference" in json.dumps(report)

    chosen = {"cpu_offload": False, "gpu": True, "auto": False}  # and whether Axolotl loads a second model for it
    for strategy, second in chosen.items():
        ours, counted, output = train(keys(inputs, strategy), tmp_path / strategy, store)
        assert ours == pytest.approx(plain, rel=1e-4, abs=1e-6), strategy
        assert counted["ref_model"] == second, strategy
    assert "reference = precomputed" in output  # what `auto` makes of a store that is complete
    assert "0 answers computed" in output


@pytest.mark.skipif(not SEVERAL_PROCESSES, reason="Axolotl needs the driver of a CUDA build for several processes")
def test_two_processes_that_accelerate_starts_prepare_the_values_of_one(inputs: Path, tmp_path: Path):
    made = keys(inputs, "precomputed")
    made["plugins"] = [PLUGIN, "sharer.Sharer"]
    found = {}
    for processes in (1, 2):
        folder, store = tmp_path / f"by-{processes}", tmp_path / f"store-{processes}"
        done = precompute(made, folder, store, processes)
        told = json.loads(done.stdout[done.stdout.rindex('{"root"') :].partition("\n")[0])
        assert told["root"] == str(store)
        (path,) = (file.parent for file in store.glob("*/identity.json"))
        found[processes] = path.name, ReferenceStore.at(path).rows()
        by = {file.name: sum(map(int, file.read_text().split())) for file in folder.glob("stored-by-*")}
        assert set(by) == ({"stored-by-one"} if processes == 1 else {"stored-by-0", "stored-by-1"})
        assert (
            sum(by.values()) == sum(each["computed"] for each in told["datasets"].values()) == len(found[processes][1])
        )
        assert min(by.values()) > 100  # each of two its share
    (name, one), (other, two) = found[1], found[2]
    assert name == other
    np.testing.assert_array_equal(one.keys, two.keys)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_allclose(one.logps, two.logps, rtol=1e-5)


def test_a_lora_starts_and_trains_the_same_with_every_strategy(inputs: Path, tmp_path: Path):
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.0}
    found = {
        strategy: train(keys(inputs, strategy, **lora), tmp_path / strategy, tmp_path / "store")
        for strategy in ("auto", "gpu", "precomputed", "cpu_offload")
    }
    expected, counted, output = found["auto"]
    assert "reference = adapter" in output
    assert not counted["ref_model"]
    assert found["gpu"][1]["ref_model"]
    assert not found["cpu_offload"][1]["ref_model"]
    for strategy, (ours, _counted, _output) in found.items():
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6), strategy
