"""What the values depend on, changed piece by piece in real trainers: then they are computed again, and only then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_dpo_ext.reference import Checkpoint, ReferenceDPOTrainer
from axolotl_dpo_ext.reference.identity import reference_identity
from axolotl_dpo_ext.reference.rows import LogProbDefinition
from tests.reference.conftest import make_pairs, reuses

pytestmark = pytest.mark.stack

Arguments = Callable[..., dict[str, Any]]
# The tokenizer splits at spaces, so the markers are words that it knows.
TEMPLATE = (
    "{% for message in messages %}{{ 'w50 ' if message['role'] == 'system' else 'w51 ' if message['role'] == 'user' "
    "else 'w52 ' }}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w52 {% endif %}"
)


def conversations(count: int, with_system: int) -> Dataset:
    """The usual pairs as messages, the first few of which begin with a system message."""

    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content.strip()}

    return Dataset.from_list(
        [
            {
                "prompt": [message("system", "w40 w41")] * (number < with_system) + [message("user", pair["prompt"])],
                "chosen": [message("assistant", pair["chosen"])],
                "rejected": [message("assistant", pair["rejected"])],
            }
            for number, pair in enumerate(make_pairs(count))
        ]
    )


def test_a_changed_chat_template_has_the_rows_computed_again_that_it_renders_differently(
    model_dir: Path, arguments: Arguments, store: Path, forwards: list[int]
):
    pairs = conversations(12, with_system=4)

    def computed(template: str) -> int:
        given = arguments() | {"train_dataset": pairs}
        given["processing_class"].chat_template = template
        trainer = ReferenceDPOTrainer(str(model_dir), **given, reference="precomputed")
        return int(trainer.reference_record["train"]["computed"])

    assert computed(TEMPLATE) == 24
    assert reuses(lambda: computed(TEMPLATE), forwards)
    assert reuses(lambda: computed("{# the same, said otherwise #}" + TEMPLATE), forwards)
    assert computed(TEMPLATE.replace("w50", "w53")) == 2 * 4
    assert computed(TEMPLATE.replace("w51", "w54")) == 24
    assert not reuses(lambda: computed(TEMPLATE.replace("w52", "w55")), forwards)
    assert reuses(lambda: computed(TEMPLATE), forwards)


def test_one_bit_of_a_continued_adapter_makes_them_be_computed_again(
    model_dir: Path, arguments: Arguments, store: Path, forwards: list[int]
):
    def make(flipped: str = "") -> Any:
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if flipped:
            factor = getattr(model.base_model.model.model.layers[1].mlp.up_proj, flipped)["default"]
            factor.weight.data.view(torch.int32)[0, 0] ^= 1
        return ReferenceDPOTrainer(model, **arguments(), reference="precomputed")

    make()
    assert reuses(make, forwards)
    for factor in ("lora_A", "lora_B"):
        assert not reuses(lambda factor=factor: make(factor), forwards), factor
    assert reuses(make, forwards)


def test_autocast_makes_them_be_computed_again(model_dir: Path, arguments: Arguments, store: Path, forwards: list[int]):
    def make(**precision: bool) -> Any:
        trainer = ReferenceDPOTrainer(str(model_dir), **arguments(**precision), reference="precomputed")
        # The weights are float32 either way: it is autocast alone that tells the two apart.
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        return trainer

    make()
    assert not reuses(lambda: make(bf16=True), forwards)
    assert reuses(lambda: make(bf16=True), forwards)
    assert reuses(make, forwards)


QUANTIZATIONS: list[dict[str, Any]] = [
    {"load_in_8bit": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
]


@pytest.mark.parametrize("known", [True, False], ids=["weights from files", "weights in memory"])
def test_every_quantization_of_the_same_checkpoint_is_another_reference(known: bool, model_dir: Path, store: Path):
    pytest.importorskip("bitsandbytes")

    def identity(**quantization: Any) -> dict[str, Any]:
        options = {"quantization_config": BitsAndBytesConfig(**quantization)} if quantization else {}
        model = AutoModelForCausalLM.from_pretrained(model_dir, device_map="cpu", **options)
        is_quantized = type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
        assert is_quantized == bool(quantization)
        checkpoint = Checkpoint(str(model_dir)) if known else None
        return reference_identity(model, False, LogProbDefinition(), None, checkpoint)

    kinds = [{}, *QUANTIZATIONS]
    found = [identity(**kind) for kind in kinds]
    assert [identity(**kind) for kind in kinds] == found
    for number, one in enumerate(found):
        assert one not in found[:number], kinds[number]
    if known:
        assert len({one["weights"] for one in found}) == 1
