"""Tiny models and micro-batches that references in host memory are tried with, and TRL's own values of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.reference.tiny_models import SMALL, VOCABULARY, trainer_that_scores

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
    },
    "phi": {},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1},
    "bloom": {},
    "falcon": {"new_decoder_architecture": True},
    # Does not get along without a mask of the padding.
    "doge": {},
    # Layers that read the keys and values of others: they pass through arguments, so streaming keeps them.
    "gemma3n_text": {
        **{
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
        },
        **{"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
        **{"laurel_rank": 4, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4},
    },
    "lfm2": {},  # convolutions between attention
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def make_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **CONFIGS[kind], **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


def make_batch(lengths: list[int], seed: int = 0, prompt: int = 3) -> dict[str, Tensor]:
    """What TRL's collator makes of half as many pairs: chosen rows first, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    answers = mask.clone()
    answers[:, :prompt] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "completion_mask": answers}


BATCHES = [make_batch([11, 8, 13, 5]), make_batch([7, 9], seed=1), make_batch([13, 13], seed=2, prompt=0)]


def trl_values(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """TRL's per-token values, asked for one token at a time: it returns sums over the completion mask only."""
    trainer = trainer_that_scores(model)
    rows, columns = batch["completion_mask"][:, 1:].nonzero(as_tuple=True)
    one_token = torch.zeros(len(rows), batch["input_ids"].shape[1], dtype=torch.long)
    one_token[torch.arange(len(rows)), columns + 1] = 1
    inputs = {name: batch[name][rows] for name in ("input_ids", "attention_mask")}
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, {**inputs, "completion_mask": one_token})
    values = torch.zeros(batch["input_ids"][:, 1:].shape)
    values[rows, columns] = torch.cat([chosen, rejected])
    return values
