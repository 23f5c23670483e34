"""What tiny models of every architecture have in common, and TRL's own way to their log-probabilities."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from the usual 0.02, with which a random model's layers change next to nothing.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def trainer_that_scores(model: Any, ld_alpha: float | None = None, autocast: Any = torch.no_grad) -> Any:
    """A ``DPOTrainer`` with no more than ``compute_ref_log_probs`` reads, around a copy of the model."""
    from trl.trainer import utils
    from trl.trainer.dpo_trainer import DPOTrainer

    model = copy.deepcopy(model)
    if hasattr(utils, "add_fused_lm_head"):
        utils.add_fused_lm_head(model)
    trainer: Any = DPOTrainer.__new__(DPOTrainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=autocast, unwrap_model=lambda one: one)
    trainer.model = trainer.ref_model = model
    trainer.args, trainer.ld_alpha = SimpleNamespace(gradient_checkpointing_kwargs=None), ld_alpha
    trainer.use_liger_kernel = False
    return trainer
