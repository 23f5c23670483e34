"""A TRL script is seen as the Axolotl run that does the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from axolotl_dpo_ext.reference.script_keys import keys_of_script
from axolotl_dpo_ext.reference.situation import Situation
from tests.reference.checkpoints import looked_at, model_of, saved

pytestmark = pytest.mark.usefixtures("store", "undistributed")


def of(model: Any, args: Any, peft_config: Any = None) -> dict[str, Any]:
    return keys_of_script({"model": model, "args": args, "peft_config": peft_config}, known_weights=True)


def arguments(folder: Path, **more: Any) -> DPOConfig:
    given = {"bf16": False, "use_cpu": True, "max_length": 64, "per_device_train_batch_size": 2, **more}
    return DPOConfig(output_dir=str(folder / "out"), **given)


def test_a_script_is_seen_as_the_same_axolotl_run(tmp_path: Path):
    saved(tmp_path / "model")
    args = arguments(tmp_path, gradient_accumulation_steps=4, num_train_epochs=2, loss_type=["ipo"])
    seen = Situation.of(of(str(tmp_path / "model"), args))
    same = looked_at(
        tmp_path / "model",
        **{"micro_batch_size": 2, "gradient_accumulation_steps": 4, "sequence_len": 64, "num_epochs": 2},
        **{"gradient_checkpointing": True, "dpo_loss_type": ["ipo"]},
    )
    assert seen == same


@pytest.mark.parametrize(
    ("kwargs", "size"), [(None, 4), ({"dtype": "bfloat16"}, 2), ({"dtype": torch.float16}, 2), ({"dtype": "auto"}, 2)]
)
def test_the_dtype_that_trl_loads_a_name_in(tmp_path: Path, kwargs: dict[str, Any] | None, size: int):
    model_of("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    keys = of(str(tmp_path / "model"), arguments(tmp_path, model_init_kwargs=kwargs))
    shape = Situation.of(keys).model
    assert shape is not None
    assert shape.bytes_per_parameter == size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    shape = Situation.of(of(loaded, arguments(tmp_path))).model
    assert shape is not None
    assert shape.bytes_per_parameter == 2


def test_which_adapters_of_a_script_are_fresh(tmp_path: Path):
    args = arguments(tmp_path)
    lora = LoraConfig(r=4, target_modules="all-linear")

    def seen(model: Any, peft_config: Any = None) -> tuple[str | None, bool, bool]:
        found = Situation.of(of(model, args, peft_config))
        return found.adapter, found.fresh_adapter, found.adapter_copy

    assert seen(model_of("llama")) == (None, False, False)
    assert seen(model_of("llama"), lora) == ("lora", True, False)
    assert seen(model_of("llama"), LoraConfig(init_lora_weights="pissa")) == ("lora", False, False)
    assert seen(model_of("llama"), LoraConfig(modules_to_save=["lm_head"])) == ("lora", True, False)
    model = get_peft_model(model_of("llama"), lora)
    assert seen(model) == ("lora", True, False)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(0.1)
    assert seen(model) == ("lora", False, True)


def test_a_script_under_accelerate_launch_says_so_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = arguments(tmp_path)  # before: with the variables set it would look for the packages
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    found = Situation.of(of("nobody/model", args)).sharding
    assert (found.stage, found.devices, found.whole_at_start) == (3, 2, False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = Situation.of(of("nobody/model", args)).sharding
    assert (found.stage, found.devices, found.whole_at_start) == (3, 2, True)
