"""Loads configurations as ``axolotl train`` does, one after the other, and says what came of each.

    python loading.py JOBS.json

``JOBS.json`` is a list of jobs ``{"keys": …}``; with ``"trainer": true`` the trainer is made too. The last line of the
output is a JSON list with what ``load`` returns for each.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_dpo_ext.plugins import extensions
from axolotl_dpo_ext.quality import PairCheck
from axolotl_dpo_ext.vocabulary import RunStopped

# Column names of the trainers for DPO and IPO, and for KTO; those for ORPO and SimPO mask labels of whole sequences.
TRAINED = {"prompt": ("prompt_ids",), "chosen": ("chosen_ids", "completion_ids"), "rejected": ("rejected_ids",)}


class Observer(PairCheck):
    """Keeps the batches that a check is shown."""

    name = "observer"
    summary = "nothing"
    on_singles = True
    sees_malformed = True

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def threshold(self, settings: Any) -> float:
        return 1.0

    def score(self, batch: Any, settings: Any, embedder: Any) -> Any:
        self.batches.append(batch)
        return np.zeros(len(batch))


class Messages(logging.Handler):
    """Keeps what the pack logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def load(keys: dict[str, Any], trainer: bool, observer: Observer) -> dict[str, Any]:
    """Returns the rows to train on and to evaluate on as ``[prompt, answer]``, the steps, and what was logged.

    With a trainer also the token ids of each row, as the audit and as the trainer has them.
    """
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import setup_model_and_trainer
    from axolotl.utils.dict import DictDefault

    observer.batches.clear()
    PluginManager.get_instance().plugins.clear()
    messages = Messages()
    logging.getLogger("axolotl_dpo_ext").addHandler(messages)
    try:
        cfg = load_cfg(DictDefault(keys))
        loaded = PluginManager.get_instance().load_datasets(cfg, preprocess=False) or load_preference_datasets(cfg=cfg)
    except RunStopped as stop:
        return {"stopped": str(stop)}
    finally:
        logging.getLogger("axolotl_dpo_ext").removeHandler(messages)
    found = {
        "train": texts(loaded.train_dataset),
        "heldout": texts(loaded.eval_dataset),
        "steps": loaded.total_num_steps,
        "log": messages.lines,
    }
    if trainer:
        cfg.device_map = {"": "cpu"}
        made = setup_model_and_trainer(cfg, loaded)[0]
        (batch,) = observer.batches
        sides = {side: getattr(batch, f"{side}_ids") for side in TRAINED}
        found["faults"] = [fault for fault in batch.faults if fault]
        found["audit"] = {side: [ids[row].tolist() for row in range(len(batch))] for side, ids in sides.items()}
        found["trainer"] = trained(made.train_dataset)
    return found


def texts(rows: Any) -> list[list[str]] | None:
    """Returns prompt and (chosen) answer of each row."""
    if rows is None:
        return None
    answer = "chosen" if "chosen" in rows.column_names else "completion"
    return [[row["prompt"], row[answer]] for row in rows]


def trained(rows: Any) -> dict[str, list[list[int]]]:
    """Returns the token ids of prompts and answers as a trainer has them."""
    found = {side: name for side, names in TRAINED.items() for name in names if name in rows.column_names}
    if found:
        return {side: list(rows[name]) for side, name in found.items()}
    sides: dict[str, list[list[int]]] = {"prompt": [], "chosen": [], "rejected": []}
    for row in rows:
        answers = {side: sum(label != -100 for label in row[f"{side}_labels"]) for side in ("chosen", "rejected")}
        sides["prompt"].append(row["chosen_input_ids"][: -answers["chosen"]])
        for side, count in answers.items():
            sides[side].append(row[f"{side}_input_ids"][-count:])
    return sides


if __name__ == "__main__":
    watching = Observer()
    extensions().pair_checks[watching.name] = watching
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = [load(job["keys"], job.get("trainer", False), watching) for job in jobs]
    sys.stdout.write(f"\n{json.dumps(found)}\n")
