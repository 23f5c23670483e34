"""Tiny checkpoints of several architectures, and what `auto` sees of a run with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from axolotl_dpo_ext.reference.situation import Situation

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def model_of(kind: str, **more: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more}))


def saved(folder: Path, kind: str = "llama", **more: Any) -> PreTrainedModel:
    model = model_of(kind, **more)
    model.save_pretrained(folder)
    return model


def looked_at(folder: Path, **keys: Any) -> Situation:
    return Situation.of({"rl": "dpo", "base_model": str(folder), **keys})
