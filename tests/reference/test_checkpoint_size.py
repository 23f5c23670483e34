"""Sizes of real checkpoints that are not loaded are those of the loaded models."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from axolotl_dpo_ext.reference.bandwidth import active_fraction
from axolotl_dpo_ext.reference.situation import Situation
from tests.reference.checkpoints import looked_at, model_of, saved

pytestmark = pytest.mark.usefixtures("store", "undistributed")


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
