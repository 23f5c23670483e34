"""Real preference pairs where they are at hand, generated ones otherwise."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from example_configs.make_tiny_inputs import make_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared"
REAL_DATA = SHARED / "data"
_WORDS = """
    river stone window candle garden letter mountain silver bridge orange winter simple machine yellow pencil
    forest kitchen travel music answer question model number paper ocean summer island farmer doctor engine
""".split()  # noqa: SIM905 - a list of thirty strings is harder to read


def sentence(seed: int, words: int = 40) -> str:
    """Returns words in an order that depends on the seed: texts of different seeds are not alike."""
    rng = random.Random(seed)
    return " ".join(rng.choices(_WORDS, k=words))


def make_pairs(n: int, prompts: int | None = None) -> dict[str, list[str]]:
    """Returns sound pairs over ``prompts`` prompts: different answers, equally long to within a fifth."""
    prompts = prompts or n
    return {
        "prompt": [f"Question {i % prompts}: what is a {_WORDS[i % prompts % len(_WORDS)]}?" for i in range(n)],
        "chosen": [sentence(2 * i, 40 + i % 7) for i in range(n)],
        "rejected": [sentence(2 * i + 1, 40 + i // 7 % 7) for i in range(n)],
    }


def of_lengths(length: Callable[[str], int]) -> Callable[..., dict[str, list[list[int]]]]:
    """Returns a tokenizer that gives every text as many tokens as this says, and different texts different ones."""
    return lambda texts, **_: {
        "input_ids": [[zlib.crc32(text.encode()) + i for i in range(length(text))] for text in texts]
    }


@pytest.fixture
def sound() -> Dataset:
    """200 sound pairs over 200 prompts."""
    return Dataset.from_dict(make_pairs(200))


@pytest.fixture(scope="session")
def sharegpt() -> Dataset:
    """Multi-turn ShareGPT pairs: ``conversations``, ``chosen`` and ``rejected``."""
    path = REAL_DATA / "dpo_en_demo.json.gz"
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return Dataset.from_list(json.load(file))
    pairs = make_pairs(300)
    rows = zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True)
    return Dataset.from_list(
        [
            {
                "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": p}],
                "chosen": {"from": "gpt", "value": c},
                "rejected": {"from": "gpt", "value": f"{r} " * (1 if i % 4 else 3)},
            }
            for i, (p, c, r) in enumerate(rows)
        ]
    )


@pytest.fixture(scope="session")
def judged() -> Dataset:
    """Judged pairs, seven for each prompt: ``prompt``, ``chosen``, ``rejected``, ``source``."""
    path = REAL_DATA / "alpaca_eval_dev.jsonl.gz"
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return Dataset.from_list([json.loads(line) for line in file][:1400])
    return Dataset.from_dict({**make_pairs(1400, prompts=200), "source": [f"model-{i % 7}" for i in range(1400)]})


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A fast tokenizer with a chat template that puts its BOS, ``<s>``, in front of plain text, as Llama's does."""
    folder = SHARED / "models" / "dpo-lab-llama-5m"
    if not folder.exists():
        folder = tmp_path_factory.mktemp("tokenizer")
        make_tokenizer([sentence(seed) for seed in range(50)], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="<s>")
    opening = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = opening
    return tokenizer
