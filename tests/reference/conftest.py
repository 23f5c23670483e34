"""A tiny preference run for the tests of this folder: a Llama on disk, pairs, and trainers around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig

from axolotl_dpo_ext.reference.logprobs import AnswerScorer
from tests.tiny_llama import WORDS, save_llama


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models only lose by threads, and other jobs may run beside the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A random Llama whose layers matter, with its tokenizer, in a folder of its own."""
    return save_llama(
        tmp_path / "model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )


@pytest.fixture
def pairs() -> Dataset:
    return make_pairs(12)


def make_pairs(count: int, first: int = 0) -> Dataset:
    def words(start: int, number: int) -> str:
        return " ".join(WORDS[(start * 7 + i * i) % len(WORDS)] for i in range(number))

    return Dataset.from_list(
        [
            {
                # Every third pair asks what the one before it asked.
                "prompt": words(i - (i % 3 == 2), 5 + i % 3) + " ",
                "chosen": words(i + 11, 4 + i % 5),
                "rejected": words(i + 23, 3 + i % 4),
            }
            for i in range(first, first + count)
        ]
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stored values, for this test alone."""
    monkeypatch.setenv("AXOLOTL_DPO_EXT_REFERENCE_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def undistributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever started the tests, what they look at is started alone."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def arguments(model_dir: Path, pairs: Dataset, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Returns a function that makes the arguments of a DPO trainer; its own arguments go to ``DPOConfig``."""

    def make(**options: Any) -> dict[str, Any]:
        given = {
            "output_dir": str(tmp_path / "output"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "seed": 5,
            "max_length": 64,
        }
        return {
            "args": DPOConfig(**{**given, **options}),
            "train_dataset": pairs,
            "processing_class": AutoTokenizer.from_pretrained(model_dir),
        }

    return make


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the batches that are computed for a store."""
    counted: list[int] = []
    compute = AnswerScorer.token_log_probs

    def count(self: AnswerScorer, rows: Any, share_prompts: bool) -> Any:
        counted.append(len(rows))
        return compute(self, rows, share_prompts)

    monkeypatch.setattr(AnswerScorer, "token_log_probs", count)
    return counted


def reuses(make: Callable[[], Any], forwards: list[int]) -> bool:
    """Whether what is made computes nothing, as all its values are stored."""
    forwards.clear()
    make()
    return not forwards
