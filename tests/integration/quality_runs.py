"""Runs with `dpo_ext: {quality: …}`, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration import runs

PLUGIN = "axolotl_dpo_ext.DPOExtPlugin"
BATCH = 16
ROWS, SPOILT = 384, 38  # of the quickstart's pairs; all of the spoilt ones are dropped
FLAG_ALL = {"policy": dict.fromkeys(["identical", "same_tokens", "similarity", "length_ratio", "duplicate"], "flag")}
# Axolotl's own hook tells which rows a trainer has. Axolotl gives each of several processes an accelerator, also where
# there is none.
WITNESS = """
import json, os
from axolotl.integrations.base import BasePlugin

class Witness(BasePlugin):
    def load_datasets(self, cfg, preprocess=False):
        if "RANK" in os.environ:
            cfg.device_map = {"": "cpu"}

    def add_callbacks_post_trainer(self, cfg, trainer):
        rows = {"train": trainer.train_dataset, "heldout": trainer.eval_dataset}
        ids = {name: data and [list(prompt) for prompt in data["prompt_ids"]] for name, data in rows.items()}
        with open("rows-of-%s.json" % os.environ.get("RANK", "0"), "w") as file:
            json.dump(ids, file)
        return []
"""


def keys(inputs: Path, quality: Any, **more: Any) -> dict[str, Any]:
    """Returns Axolotl keys of one epoch, with these settings of the audit; without any, of a run without the pack."""
    made = runs.base_keys(inputs / "model", inputs / "chat.jsonl")
    del made["max_steps"]
    parts = {"dpo_ext": {"quality": quality}, "plugins": ["witness.Witness", PLUGIN]} if quality else {}
    return {**made, "micro_batch_size": BATCH, "save_steps": 1000, **parts, **more}


def start(
    command: str, made: dict[str, Any], folder: Path, *more: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command of Axolotl with a plugin that writes which rows the trainer of each process has."""
    folder.mkdir(exist_ok=True)
    (folder / "witness.py").write_text(WITNESS, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return runs.axolotl(command, made, folder, *more, PYTHONPATH=path, **environment)


def load(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Loads configurations as `axolotl train` does, without training; see `loading.py`."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    done = runs.run([sys.executable, Path(__file__).with_name("loading.py"), "jobs.json"], folder)
    assert done.returncode == 0, runs.tail(done)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    found: list[dict[str, Any]] = json.loads(lines[-1])
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
