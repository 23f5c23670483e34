"""Preference pairs and models: real ones where they are, otherwise made here. Nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

# Before anything of Hugging Face is imported, as `support.inputs` is.
os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
os.environ.setdefault("WANDB_MODE", "disabled")

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
MULTI_TURN = SHARED / "data" / "dpo_en_demo.json.gz"
SINGLE_TURN = SHARED / "data" / "alpaca_eval_dev.jsonl.gz"
MODEL = SHARED / "models" / "dpo-lab-llama-5m"

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
# How many pairs share a prompt in the pairs made here, as in alpaca_eval_dev.
PAIRS_PER_PROMPT = 7

Message = dict[str, str]
Pair = dict[str, list[Message]]
Row = TypeVar("Row")


def read_pairs(path: Path) -> list[Pair]:
    """Reads a file of preference pairs as conversations.

    Args:
        path: JSON (a list), JSON Lines or Parquet, ``.gz`` or not. A row has ``chosen`` and ``rejected`` as texts or
            messages, with its prompt in ``prompt`` (text or messages), in ``conversations`` (ShareGPT), or at the
            start of both answers' messages.
    """
    return [_as_conversations(row) for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode()
    return (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    )


def _as_conversations(row: dict[str, Any]) -> Pair:
    chosen, rejected = (_messages(row[side], "assistant") for side in ("chosen", "rejected"))
    if "conversations" in row:
        return {"prompt": _messages(row["conversations"], "user"), "chosen": chosen, "rejected": rejected}
    if "prompt" in row:
        return {"prompt": _messages(row["prompt"], "user"), "chosen": chosen, "rejected": rejected}
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _messages(value: Any, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    return [_message(message) for message in value]


def _message(message: Message) -> Message:
    if "from" in message:
        return {"role": ROLES[message["from"]], "content": message["value"]}
    return {"role": message["role"], "content": message["content"]}


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Returns a number of rows, evenly spread over all."""
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def whole_prompts(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Returns all pairs of the first prompts, in sorted order, that together have at least a number of pairs."""
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(json.dumps(pair["prompt"]), []).append(pair)
    taken: list[Pair] = []
    for prompt in sorted(by_prompt):
        if len(taken) >= count:
            break
        taken += by_prompt[prompt]
    return taken


def multi_turn_pairs() -> list[Pair]:
    """Returns conversations of several turns: those of ``shared/``, otherwise made from the quickstart's pairs."""
    if MULTI_TURN.exists():
        return read_pairs(MULTI_TURN)
    made = list(_make_tiny_inputs().make_pairs())
    return [_conversation(made, start, turns=start % 9) for start in range(300)]


def _conversation(made: list[Pair], start: int, turns: int) -> Pair:
    earlier = [made[(start + turn) % len(made)] for turn in range(1, turns + 1)]
    before = [message for pair in earlier for message in (*pair["prompt"], *pair["chosen"])]
    return {**made[start], "prompt": [*before, *made[start]["prompt"]]}


def single_turn_pairs() -> list[Pair]:
    """Returns short prompts with long answers, several pairs to a prompt: from ``shared/``, otherwise made."""
    if SINGLE_TURN.exists():
        return read_pairs(SINGLE_TURN)
    made = list(_make_tiny_inputs().make_pairs())
    return [pair for start in range(64) for pair in _same_prompt(made, start)]


def _same_prompt(made: list[Pair], start: int) -> Iterator[Pair]:
    for number in range(PAIRS_PER_PROMPT):
        sides = {side: [_long_answer(made, side, start + bool(side == "rejected") * number)] for side in SIDES}
        yield {"prompt": made[start]["prompt"], **sides}


SIDES = ("chosen", "rejected")
SENTENCES = 12


def _long_answer(made: list[Pair], side: str, start: int) -> Message:
    sentences = [made[(start * SENTENCES + number) % len(made)][side][0]["content"] for number in range(SENTENCES)]
    return {"role": "assistant", "content": " ".join(sentences)}


def model_folder(given: Path | None, scratch: Path) -> Path:
    """Returns the folder of a model: the one given, that of ``shared/``, or one made with random weights.

    Args:
        given: What ``--model`` says.
        scratch: Where a model is made: a Llama with 6 layers of width 256, as small as the one in ``shared/``.
    """
    if given is not None:
        return given
    return MODEL if MODEL.exists() else make_model(scratch / "model")


def make_model(folder: Path) -> Path:
    """Makes a Llama with random weights, and a tokenizer of the quickstart's words."""
    _make_tiny_inputs().make_model(
        make_tokenizer(folder),
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return folder


def make_tokenizer(folder: Path) -> Path:
    """Makes the quickstart's tokenizer; what its words lack becomes bytes."""
    tiny = _make_tiny_inputs()
    folder.mkdir(parents=True, exist_ok=True)
    texts = [message["content"] for pair in tiny.make_pairs() for side in pair.values() for message in side]
    tiny.make_tokenizer(texts, folder)
    return folder


def _make_tiny_inputs() -> ModuleType:
    """Imports the example script, which is not part of the package."""
    spec = importlib.util.spec_from_file_location("make_tiny_inputs", ROOT / "example_configs" / "make_tiny_inputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
