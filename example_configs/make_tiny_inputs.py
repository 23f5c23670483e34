"""Makes the inputs of the quickstarts: a tiny Llama and a preference set with something to learn.

    python example_configs/make_tiny_inputs.py build/quickstart

writes ``model/`` (random weights, vocabulary of at most 1,000) and ``pairs.jsonl``. In every pair the chosen
answer is courteous and the rejected one is curt; nothing else tells them apart. A few rows are spoilt on
purpose (equal answers, an answer that rambles on), so that the quality checks have something to find.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REQUESTS = ("book", "move", "check", "send", "find", "cancel", "change", "print")
THINGS = (
    "the ticket",
    "my room",
    "a table",
    "the parcel",
    "our meeting",
    "the invoice",
    "a taxi",
    "my order",
)
TIMES = ("today", "tomorrow", "on Monday", "this evening", "next week", "at noon")
COURTEOUS = (
    "Of course, I would be glad to {request} {thing} {time}.",
    "Certainly, thank you, I will {request} {thing} {time}.",
    "With pleasure, let me {request} {thing} {time}.",
)
CURT = (
    "Not my job, go and {request} {thing} yourself {time}.",
    "Whatever, I may {request} {thing} {time} or not.",
    "Stop it, nobody will {request} {thing} {time}.",
)
SPOILT_EVERY = 20
VOCABULARY = 600
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_pairs(count: int = 384, seed: int = 0) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yields preference pairs with distinct prompts, as conversations; two of every twenty are spoilt.

    Args:
        count: How many pairs, at most ``len(REQUESTS) * len(THINGS) * len(TIMES)`` (384).
        seed: Seed of the choice and order.
    """
    generator = random.Random(seed)
    prompts = [(request, thing, time) for request in REQUESTS for thing in THINGS for time in TIMES]
    generator.shuffle(prompts)
    for number, (request, thing, time) in enumerate(prompts[:count]):
        words = {"request": request, "thing": thing, "time": time}
        chosen = generator.choice(COURTEOUS).format(**words)
        rejected = generator.choice(CURT).format(**words)
        if number % SPOILT_EVERY == 7:
            rejected = chosen
        elif number % SPOILT_EVERY == 14:
            chosen = f"{chosen} " * 4
        yield {
            "prompt": [{"role": "user", "content": f"Could you {request} {thing} {time}?"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


def make_tokenizer(texts: list[str], folder: Path) -> None:
    """Trains a byte-level BPE tokenizer with a chat template on the texts and saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_model(folder: Path, seed: int = 0, **sizes: Any) -> None:
    """Saves a Llama with random weights in fp32: 2 layers of width 64, or other sizes by name."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    usual = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**{**usual, **sizes})).save_pretrained(folder)


def make_inputs(folder: Path) -> None:
    """Writes ``model/`` and ``pairs.jsonl`` into a folder.

    Args:
        folder: Created if it does not exist.
    """
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    pairs = list(make_pairs())
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    make_tokenizer([message["content"] for pair in pairs for side in pair.values() for message in side], model)
    make_model(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    make_inputs(parser.parse_args().folder)
