"""What `auto` sees of a run: sizes of real checkpoints that are not loaded, of Axolotl's keys and of TRL scripts."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig

from axolotl_dpo_ext.reference.bandwidth import active_fraction
from axolotl_dpo_ext.reference.situation import Situation, keys_of_script
from axolotl_dpo_ext.reference.store import STORE_VARIABLE, ReferenceStore
from axolotl_dpo_ext.reference.store_files import StoredRows
from axolotl_dpo_ext.reference.weights import weights_digest

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def model_of(kind: str, **more: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more}))


def saved(folder: Path, kind: str = "llama", **more: Any) -> PreTrainedModel:
    model = model_of(kind, **more)
    model.save_pretrained(folder)
    return model


def looked_at(folder: Path, **keys: Any) -> Situation:
    return Situation.of({"rl": "dpo", "base_model": str(folder), **keys})


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "stores"
    monkeypatch.setenv(STORE_VARIABLE, str(root))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    return root


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}),
    ],
)
def test_the_headers_of_a_checkpoint_tell_its_size(tmp_path: Path, kind: str, more: dict[str, Any]):
    model = saved(tmp_path / "model", kind, **more)
    shape = looked_at(tmp_path / "model").model
    assert shape is not None
    assert shape.parameters == shape.trainable == sum(p.numel() for p in model.parameters())
    assert (shape.vocabulary, shape.hidden, shape.layers) == (96, 32, 3)
    assert shape.active_share == pytest.approx(active_fraction(model))


def test_the_size_is_that_of_all_shards(tmp_path: Path):
    model = model_of("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    shape = looked_at(tmp_path / "model").model
    assert shape is not None
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    assert looked_at(tmp_path / "model").model is None, "half a download must not decide"


def test_a_checkpoint_without_headers_is_built_without_memory(tmp_path: Path):
    model = model_of("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    shape = looked_at(tmp_path).model
    assert shape is not None
    assert shape.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("damage", ["absent", "empty", "no config", "not safetensors", "config is a list"])
def test_what_cannot_be_read_is_unknown_and_no_error(tmp_path: Path, damage: str):
    folder = tmp_path / "model"
    if damage != "absent":
        saved(folder)
    if damage == "empty":
        (folder / "model.safetensors").write_bytes(b"")
    if damage == "not safetensors":
        (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    if damage == "no config":
        (folder / "config.json").unlink()
    if damage == "config is a list":
        (folder / "config.json").write_text("[]", encoding="utf-8")
    assert looked_at(folder).model is None


def test_a_model_that_was_never_downloaded_is_unknown_and_the_network_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert Situation.of({"base_model": "nobody/never-downloaded"}).model is None


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_an_adapters_size_is_what_peft_makes(tmp_path: Path, targets: list[str] | None):
    model = saved(tmp_path)
    keys = {"lora_target_linear": True} if targets is None else {"lora_target_modules": targets}
    shape = looked_at(tmp_path, adapter="lora", lora_r=4, **keys).model
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets or "all-linear"))
    assert shape is not None
    assert shape.trainable == sum(p.numel() for p in peft.parameters() if p.requires_grad)
    assert shape.trainable < shape.parameters


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ({}, 4),
        ({"bf16": True}, 2),
        ({"bf16": "auto"}, 2),
        ({"fp16": True}, 2),
        ({"load_in_8bit": True, "bf16": True}, 1),
        ({"load_in_4bit": True, "bf16": True}, 0.5625),
    ],
)
def test_bytes_of_the_weights_as_axolotl_loads_them(tmp_path: Path, keys: dict[str, Any], size: float):
    saved(tmp_path)
    shape = looked_at(tmp_path, **keys).model
    assert shape is not None
    assert shape.bytes_per_parameter == size


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


ZERO3 = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"stage": 0, "devices": 8, "whole_at_start": True}),
        ({"deepspeed": "deepspeed_configs/zero2.json"}, {"stage": 2, "devices": 8, "whole_at_start": True}),
        ({"deepspeed": "absent/zero3_bf16.json"}, {"stage": 3, "whole_at_start": False, "optimizer_on_host": False}),
        ({"deepspeed": ZERO3}, {"stage": 3, "whole_at_start": False, "optimizer_on_host": True}),
        ({"fsdp_config": {"reshard_after_forward": True}}, {"stage": 3, "devices": 8, "whole_at_start": True}),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True}, "dp_shard_size": 4}, {"devices": 4, "whole_at_start": False}),
    ],
)  # fmt: skip
def test_how_processes_share_the_memory(
    keys: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = dataclasses.asdict(Situation.of(keys).sharding)
    assert {key: found[key] for key in expected} == expected


def test_a_deepspeed_file_is_read(tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(ZERO3), encoding="utf-8")
    assert Situation.of({"deepspeed": str(file)}).sharding == Situation.of({"deepspeed": ZERO3}).sharding


# What is stored already


def store_rows(root: Path, weights: str, rows: int, **more: Any) -> None:
    keys = np.random.default_rng(0).integers(0, 256, (rows, 16), np.uint8)
    store = ReferenceStore(root, {"weights": weights, "adapter": None, **more})
    store.append(StoredRows(keys, np.full(rows, -5, np.float32), np.ones(rows, np.int32)))


def test_rows_are_counted_that_are_stored_for_the_same_weights(tmp_path: Path, own_store: Path):
    saved(tmp_path / "model")
    assert looked_at(tmp_path / "model").stored_rows == 0
    weights = f"files:{weights_digest(str(tmp_path / 'model'))}"
    store_rows(own_store, weights, 7)
    store_rows(own_store, weights, 5, dtype="torch.bfloat16")
    store_rows(own_store, weights, 100, adapter="of a continued adapter")
    store_rows(own_store, "files:of other weights", 100)
    assert looked_at(tmp_path / "model").stored_rows == 12
    assert looked_at(tmp_path / "model", adapter="lora").stored_rows == 12
    assert looked_at(tmp_path / "model", adapter="lora", lora_model_dir="sft").stored_rows == 0
    elsewhere = {"dpo_ext": {"reference": {"strategy": "auto", "store": str(tmp_path / "another")}}}
    assert looked_at(tmp_path / "model", **elsewhere).stored_rows == 0
    for scalar in (True, {"reference": "auto"}, {"reference": None}):
        assert looked_at(tmp_path / "model", dpo_ext=scalar).stored_rows == 12


def test_a_large_checkpoint_is_not_hashed_to_decide(tmp_path: Path, own_store: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    os.utime(file, (time.time() - 100,) * 2)
    monkeypatch.setattr("axolotl_dpo_ext.reference.situation._HASHED_AT_ONCE", 0)
    hashed = []
    monkeypatch.setattr("axolotl_dpo_ext.reference.weights._hash", lambda path: hashed.append(path) or "0" * 64)
    monkeypatch.setattr("axolotl_dpo_ext.reference.weights._TIMESTAMP_SECONDS", -1e9)
    store_rows(own_store, "files:of other weights", 3)
    assert looked_at(tmp_path / "model").stored_rows == 0
    assert hashed == []
    # A run that stored its values has remembered the digest beside them.
    store_rows(own_store, f"files:{weights_digest(str(tmp_path / 'model'))}", 4)
    assert looked_at(tmp_path / "model").stored_rows == 4
    assert hashed == [file.resolve()], "once, by the run"


def test_a_damaged_store_does_not_keep_auto_from_deciding(tmp_path: Path, own_store: Path):
    saved(tmp_path / "model")
    store_rows(own_store, f"files:{weights_digest(str(tmp_path / 'model'))}", 4)
    (own_store / "nonsense").mkdir()
    (own_store / "nonsense" / "identity.json").write_bytes(b"\xff{")
    next(own_store.glob("*/shard-*")).write_bytes(b"short")
    assert looked_at(tmp_path / "model").stored_rows == 0


# TRL scripts


def arguments(folder: Path, **more: Any) -> DPOConfig:
    given = {"bf16": False, "use_cpu": True, "max_length": 64, "per_device_train_batch_size": 2, **more}
    return DPOConfig(output_dir=str(folder / "out"), **given)


def test_a_script_is_seen_as_the_same_axolotl_run(tmp_path: Path):
    saved(tmp_path / "model")
    args = arguments(tmp_path, gradient_accumulation_steps=4, num_train_epochs=2, loss_type=["ipo"])
    seen = Situation.of(keys_of_script(str(tmp_path / "model"), args, None))
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
    keys = keys_of_script(str(tmp_path / "model"), arguments(tmp_path, model_init_kwargs=kwargs), None)
    shape = Situation.of(keys).model
    assert shape is not None
    assert shape.bytes_per_parameter == size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    shape = Situation.of(keys_of_script(loaded, arguments(tmp_path), None)).model
    assert shape is not None
    assert shape.bytes_per_parameter == 2


def test_which_adapters_of_a_script_are_fresh(tmp_path: Path):
    args = arguments(tmp_path)
    lora = LoraConfig(r=4, target_modules="all-linear")

    def seen(model: Any, peft_config: Any = None) -> tuple[str | None, bool, bool]:
        found = Situation.of(keys_of_script(model, args, peft_config))
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
    found = Situation.of(keys_of_script("nobody/model", args, None)).sharding
    assert (found.stage, found.devices, found.whole_at_start) == (3, 2, False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = Situation.of(keys_of_script("nobody/model", args, None)).sharding
    assert (found.stage, found.devices, found.whole_at_start) == (3, 2, True)
