"""Starts the real commands in subprocesses, and makes what they train on."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
BIN = Path(sys.executable).parent
# Axolotl 0.21 asks the driver about every pair of processes, which a CUDA build without a driver does not survive.
SEVERAL_PROCESSES = torch.version.cuda is None or torch.cuda.is_available()
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Runs that are compared bit by bit must not differ in how a sum is split over threads.
    "OMP_NUM_THREADS": "1",
}

CHAT_DATASET = {
    "ds_type": "json",
    "split": "train",
    "type": "chat_template.default",
    "field_messages": "messages",
}


def run(
    command: list[object], folder: Path, timeout: int = 900, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, with the environment's commands first on PATH, and returns its output.

    stdout and stderr are one stream, as a user sees them.
    """
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def axolotl(
    command: str, keys: dict[str, Any], folder: Path, *more: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``axolotl COMMAND run.yaml`` on these keys in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    return run([BIN / "axolotl", command, "run.yaml", *more], folder, **environment)


def tail(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the end of a command's output, for the message of a failed assertion."""
    return done.stdout[-6000:]


def base_keys(model: Path, data: Path) -> dict[str, Any]:
    """Returns Axolotl keys of a short DPO run on the CPU, without any key of this pack."""
    return {
        "base_model": str(model),
        "rl": "dpo",
        "rl_beta": 0.1,
        "datasets": [{"path": str(data), **CHAT_DATASET}],
        "dataset_prepared_path": "prepared",
        "output_dir": "output",
        "sequence_len": 256,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "max_steps": 6,
        "learning_rate": 0.0005,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "logging_steps": 1,
        "save_steps": 6,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "dataset_num_proc": 1,
        "seed": 3,
    }


def steps(output_dir: Path) -> list[tuple[int, float, float]]:
    """Returns (step, loss, gradient norm) of every training step, from the last checkpoint's trainer state."""
    checkpoint = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def real_pairs() -> list[dict[str, Any]]:
    """Returns real preference pairs as messages where they are at hand, and made-up ones elsewhere."""
    file = SHARED / "data" / "dpo_en_demo.json.gz"
    if not file.exists():
        return made_pairs()
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        rows = json.load(opened)
    return [
        {
            "messages": [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]],
            "chosen": {"role": "assistant", "content": row["chosen"]["value"]},
            "rejected": {"role": "assistant", "content": row["rejected"]["value"]},
        }
        for row in rows
    ]


def made_pairs() -> list[dict[str, Any]]:
    """Returns the quickstart's pairs as messages."""
    sys.path.insert(0, str(ROOT / "example_configs"))
    try:
        from make_tiny_inputs import make_pairs
    finally:
        sys.path.pop(0)
    return [
        {"messages": pair["prompt"], "chosen": pair["chosen"][0], "rejected": pair["rejected"][0]}
        for pair in make_pairs()
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
