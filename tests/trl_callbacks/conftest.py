"""A tiny preference run that the tests of this folder train for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tests.tiny_llama import WORDS, save_llama
from trl_callbacks import PreferenceLogCallback


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama on disk: DPOTrainer loads its reference from the folder the policy came from."""
    return save_llama(
        tmp_path_factory.mktemp("model"),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


def pairs(count: int) -> Dataset:
    """Pairs in which the chosen answer is always ``w1`` and the rejected one ``w2``."""
    prompts = [f"{WORDS[10 + number % 50]} {WORDS[10 + number * 7 % 50]} " for number in range(count)]
    return Dataset.from_list([{"prompt": p, "chosen": "w1 w1", "rejected": "w2 w2"} for p in prompts])


@pytest.fixture
def trainer_of(model_dir: Path, tmp_path: Path) -> Callable[..., DPOTrainer]:
    """Builds a trainer: 8 training pairs, 4 a step; evaluated on 4 pairs, first and then every 3 steps."""

    def build(
        *callbacks: TrainerCallback,
        log: PreferenceLogCallback | None = None,
        eval_dataset: Any = "default",
        **options: Any,
    ) -> DPOTrainer:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "eval_on_start": True,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            "beta": 0.5,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 0,
        }
        return DPOTrainer(
            model=LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            args=DPOConfig(**(defaults | options)),
            train_dataset=pairs(8),
            eval_dataset=pairs(4) if isinstance(eval_dataset, str) else eval_dataset,
            processing_class=PreTrainedTokenizerFast.from_pretrained(model_dir),
            # the log comes first, as in an Axolotl run, so that it cannot rely on what later callbacks decide
            callbacks=[log or PreferenceLogCallback(), *callbacks],
        )

    return build


def read(path: Path) -> list[dict[str, Any]]:
    """Reads a log; every line must be JSON as the standard has it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture
def log_of(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """Reads the log of the test's run."""
    return lambda: read(tmp_path / "run" / "preference_log.jsonl")
