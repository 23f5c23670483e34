"""What the tests of the trainer share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
Arguments = Callable[..., dict[str, Any]]


def trajectory(trainer: Any) -> list[float]:
    """Trains, and returns each step's loss and gradient norm, and each evaluation's loss."""
    trainer.train()
    kept = ("loss", "grad_norm", "eval_loss")
    return [entry[name] for entry in trainer.state.log_history for name in kept if name in entry]


def changed_in_memory(model_dir: Path) -> Any:
    torch.manual_seed(9)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model
