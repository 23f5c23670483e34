"""What `auto` sees of a run's own keys."""

from __future__ import annotations

from typing import Any

import pytest

from axolotl_dpo_ext.reference.situation import Situation

pytestmark = pytest.mark.usefixtures("store", "undistributed")


def test_tokens_of_a_step():
    found = Situation.of({"micro_batch_size": 2, "sequence_len": 1000, "gradient_accumulation_steps": 8})
    assert (found.micro_tokens, found.step_tokens) == (4_000, 32_000)
    assert Situation.of({"micro_batch_size": 2, "batch_size": 16, "sequence_len": 1000}).step_tokens == 32_000
    assert Situation.of({}).step_tokens == 1_024
    assert Situation.of({"micro_batch_size": "2", "sequence_len": -1, "num_epochs": True}) == Situation.of({})


@pytest.mark.parametrize(
    ("keys", "fresh"),
    [
        ({"adapter": "lora"}, True),
        ({"adapter": "qlora", "peft_init_lora_weights": True}, True),
        ({"adapter": "lora", "peft_init_lora_weights": "gaussian"}, True),
        ({"adapter": "lora", "peft_init_lora_weights": "pissa"}, False),
        ({"adapter": "lora", "peft_init_lora_weights": False}, False),
        ({"adapter": "lora", "lora_model_dir": "sft"}, False),
        ({"adapter": "lora", "lora_modules_to_save": ["embed_tokens"]}, True),
        ({"adapter": "llama-adapter"}, False),
        ({}, False),
    ],
)
def test_which_adapters_are_fresh(keys: dict[str, Any], fresh: bool):
    assert Situation.of(keys).fresh_adapter is fresh


@pytest.mark.parametrize(
    ("keys", "losses"),
    [
        ({}, ("sigmoid",)),
        ({"dpo_loss_type": "hinge"}, ("hinge",)),
        ({"dpo_loss_type": ["sigmoid", "sft"]}, ("sigmoid", "sft")),
        ({"rl": "ipo"}, ("ipo",)),
    ],
)
def test_the_losses_of_a_run(keys: dict[str, Any], losses: tuple[str, ...]):
    assert Situation.of(keys).losses == losses


def test_epochs_count_unless_max_steps_ends_the_run():
    assert Situation.of({"num_epochs": 3}).epochs == 3
    assert Situation.of({"num_epochs": 3, "max_steps": 10}).epochs == 1
    assert Situation.of({}).epochs == 1
