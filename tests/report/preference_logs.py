"""Writes logs as `trl_callbacks.PreferenceLogCallback` does, with figures that a test chooses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

BETA = 0.1


def start(**changes: Any) -> dict[str, Any]:
    fields = {"beta": BETA, "loss_type": ["sigmoid"], "max_steps": 20, "num_train_epochs": 1, "resumed_at": 0}
    return {"event": "start", **fields, "time": 1_700_000_000.0, **changes}


def measured(event: str, step: int, accuracy: float, margin: float, chosen: float = 0.5, **more: Any) -> dict[str, Any]:
    """A record; ``margin`` and ``chosen`` are in nats, as divided by beta."""
    return {
        "event": event,
        "step": step,
        "epoch": step / 20,
        "time": 1_700_000_000.0 + step,
        "loss": math.log1p(math.exp(-BETA * margin)),
        "rewards/accuracies": accuracy,
        "rewards/margins": BETA * margin,
        "rewards/margins_per_beta": margin,
        "rewards/chosen": BETA * chosen,
        "rewards/rejected": BETA * (chosen - margin),
        **more,
    }


def end(step: int = 20, **changes: Any) -> dict[str, Any]:
    return {
        "event": "end",
        "step": step,
        "epoch": 1.0,
        "time": 1_700_000_065.0,
        "reason": "finished",
        **changes,
    }


def good_run() -> list[dict[str, Any]]:
    return [
        start(),
        measured("eval", 0, 0.0, 0.0, 0.0),
        *(measured("train", step, 0.5 + step / 50, step * 0.6) for step in (5, 10)),
        measured("eval", 10, 0.8125, 5.25),
        *(measured("train", step, 0.5 + step / 50, step * 0.6) for step in (15, 20)),
        measured("eval", 20, 0.9375, 11.75),
        {"event": "summary", "step": 20, "time": 1_700_000_064.0, "train_loss": 0.5, "train_runtime": 60.0},
        end(),
    ]


def write(folder: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    path = folder / "preference_log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")
    return path
