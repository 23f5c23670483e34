"""What the tests of computing log-probabilities share: models of many kinds, rows, TRL's values and ours."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM

from axolotl_dpo_ext.reference.logprobs import AnswerScorer
from axolotl_dpo_ext.reference.precompute import Batching, reference_log_probs
from axolotl_dpo_ext.reference.probe import choose_batching
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.rows import Answer, LogProbDefinition, Pair, answer_key, read_pairs
from axolotl_dpo_ext.reference.store import ReferenceStore
from tests.reference.tiny_models import SMALL, VOCABULARY, trainer_that_scores

WINDOW = 4  # shorter than every sequence that has an answer of more than a few tokens

MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "sliding_window": WINDOW}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

SOFT = {"head_dim": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}

SHARED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2 with windows": {"use_sliding_window": True, **MIXED},
    "qwen3": {"head_dim": 8},
    "mistral with a window": {"sliding_window": WINDOW},
    "gemma2, eager": {**SOFT, "attn_implementation": "eager"},
    "gemma3_text": {"head_dim": 8, **MIXED},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": WINDOW},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.5},
    "cohere": {"logit_scale": 0.5},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
}

LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}

NOT_SHARED: dict[str, dict[str, Any]] = {
    # Without eager attention Gemma 2 leaves its soft-capping out, and so does TRL's value.
    "gemma2, sdpa": {**SOFT, "attn_implementation": "sdpa"},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **MIXED},  # attention sinks
    "qwen3_next": {"head_dim": 8, **EXPERTS, **LINEAR},
    "mamba": {"state_size": 4},
    "bloom": {},
    "falcon with alibi": {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
}

KINDS = {**SHARED, **NOT_SHARED}

PLAIN = LogProbDefinition()

BIG = 2048


def seeded(model: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = model()
        # Biases, norms and sinks too: at zero or one they would show in no value.
        for parameter in made.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval()


def make_model(kind: str = "llama", **more: Any) -> Any:
    name = kind.partition(",")[0].partition(" ")[0]
    options = {**SMALL, **KINDS[kind], **more}
    attention = options.pop("attn_implementation", None)
    if name == "mamba":  # flash-linear-attention, once imported, has its own under this name
        return seeded(lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**options)))
    config = transformers.AutoConfig.for_model(name, **options)
    return seeded(lambda: AutoModelForCausalLM.from_config(config, attn_implementation=attention))


def make_rows_of_dataset() -> list[dict[str, list[int]]]:
    """Pairs with common prompts, very short and long answers, none, and hardly any prompt."""
    generator = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, VOCABULARY) for _ in range(count)]

    first, second = tokens(9), tokens(3)
    lengths = [(first, 12, 5), (first, 1, 7), (second, 2, 1), (tokens(17), 6, 13), ([], 8, 4), (tokens(1), 3, 0)]
    return [
        {"prompt_ids": prompt, "chosen_ids": tokens(chosen), "rejected_ids": tokens(rejected)}
        for prompt, chosen, rejected in lengths
    ]


ROWS = make_rows_of_dataset()

DATASET = Dataset.from_list(ROWS)


def answers_of(definition: LogProbDefinition = PLAIN) -> list[Answer]:
    pairs: list[Pair] = list(read_pairs(DATASET, definition, 0, len(DATASET)))
    return [answer for pair in pairs for answer in (pair.chosen, pair.rejected) if answer.tokens]


ANSWERS = answers_of()


def trl_values(model: Any, definition: LogProbDefinition = PLAIN, autocast: Any = torch.no_grad) -> np.ndarray:
    """TRL's own values of the pairs, chosen and rejected: its collator and its method, on one padded batch."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collator = DataCollatorForPreference(0, definition.max_length, definition.truncation_mode)
    trainer = trainer_that_scores(model, definition.ld_alpha, autocast)
    with autocast():
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, collator(ROWS))
    return torch.stack([chosen, rejected]).float().numpy()


def our_values(
    model: Any, folder: Path, definition: LogProbDefinition = PLAIN, budget: int | None = None, **options: Any
) -> tuple[np.ndarray, Batching]:
    """The values that a fresh store then holds, and how they were computed."""
    used: list[Batching] = []

    def scorer(answers: Sequence[Answer]) -> tuple[AnswerScorer, Batching]:
        one = AnswerScorer(model, **options)
        chosen = choose_batching(one, model, answers)
        used.append(Batching(chosen.share_prompts, budget or chosen.budget))
        return one, used[-1]

    store = ReferenceStore(folder / f"store-{len(list(folder.iterdir()))}", {})
    found = reference_log_probs(DATASET, definition, store, scorer, Processes())
    assert found.computed == len({answer_key(answer, definition.ld_alpha) for answer in answers_of(definition)})
    return np.stack([found.chosen, found.rejected]), used[0]
