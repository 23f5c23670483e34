"""Two processes over gloo train with each strategy as TRL does, and refuse what not all of them hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from axolotl_dpo_ext.reference import ReferenceDPOTrainer
from axolotl_dpo_ext.vocabulary import RunStopped
from tests.reference.conftest import make_pairs

model_dir, output = Path(sys.argv[1]), Path(sys.argv[2])
rank = int(os.environ["RANK"])
pairs = make_pairs(16)
tokenizer = AutoTokenizer.from_pretrained(model_dir)

def arguments():
    args = DPOConfig(str(output / "run"), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
                     learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
                     use_cpu=True, bf16=False, seed=5, max_length=64)
    return {"args": args, "train_dataset": pairs, "processing_class": tokenizer}

def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

found = {"trl": losses(DPOTrainer(str(model_dir), **arguments()))}
for strategy in ("precomputed", "cpu_offload", "gpu"):
    found[strategy] = losses(ReferenceDPOTrainer(str(model_dir), **arguments(), reference=strategy))

# What FSDP's CPU-efficient loading leaves in every process but the first.
for strategy in ("precomputed", "cpu_offload"):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    if rank:
        for parameter in model.parameters():
            parameter.data.zero_()
    try:
        ReferenceDPOTrainer(model, **arguments(), reference=strategy)
    except RunStopped as error:
        found[f"refused {strategy}"] = str(error)
(output / f"rank-{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.stack
def test_two_processes_train_as_with_trl_and_refuse_a_model_that_one_of_them_lacks(
    model_dir: Path, store: Path, tmp_path: Path
):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DPO_EXT_REFERENCE_STORE": str(store),
    }  # fmt: skip
    done = subprocess.run(
        [*launcher, str(script), str(model_dir), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=450, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8"))
        for strategy in ("precomputed", "cpu_offload", "gpu"):
            assert found[strategy] == pytest.approx(found["trl"], rel=1e-4, abs=1e-6), strategy
            if strategy != "gpu":
                assert "not every process holds the whole model" in found[f"refused {strategy}"]
