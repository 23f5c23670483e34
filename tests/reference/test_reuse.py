"""What a run's values depend on makes them be computed again; all else reuses them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from axolotl_dpo_ext.reference import (
    ReferenceDPOTrainer,
)
from axolotl_dpo_ext.reference.identity import reference_identity
from axolotl_dpo_ext.reference.rows import LogProbDefinition
from tests.reference.conftest import make_pairs, reuses
from tests.reference.training import LORA, Arguments, changed_in_memory

pytestmark = pytest.mark.stack


def test_stores_of_the_same_weights_that_cannot_serve_are_named_with_what_differs(
    model_dir: Path, arguments: Arguments, store: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    ReferenceDPOTrainer(str(model_dir), **arguments(ld_alpha=0.5), reference="precomputed")
    (first,) = (path for path in store.iterdir() if path.name != "weights")
    assert "can't serve" not in caplog.text
    ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed")
    assert f"{first} holds values of the same weights, which can't serve: ld_alpha 0.5 (now None)" in caplog.text


def test_a_model_that_brings_its_own_code_is_identified_by_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM):\n    pass\n"
    identities = []
    for text in (code, code, code + "    more = 1\n"):
        (tmp_path / "own_model.py").write_text(text)
        spec = importlib.util.spec_from_file_location("own_model", tmp_path / "own_model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own_model", module)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        model = module.Own(
            LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        )
        identities.append(reference_identity(model, False, LogProbDefinition(), None, None))
    assert identities[0] == identities[1] != identities[2]


def test_another_beta_rate_seed_rank_or_folder_computes_nothing(
    model_dir: Path, arguments: Arguments, store: Path, tmp_path: Path, forwards: list[int]
):
    ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed")
    assert forwards
    forwards.clear()
    changes: list[dict[str, Any]] = [
        {"beta": 0.7}, {"learning_rate": 1e-5}, {"seed": 77}, {"output_dir": str(tmp_path / "elsewhere")},
        {"loss_type": ["ipo"]}, {"per_device_train_batch_size": 1}, {"max_length": 60},
    ]  # fmt: skip
    for change in changes:
        ReferenceDPOTrainer(str(model_dir), **arguments(**change), reference="precomputed")
    for rank in (2, 8):
        peft = LoraConfig(**{**LORA, "r": rank})
        ReferenceDPOTrainer(str(model_dir), **arguments(), peft_config=peft, reference="precomputed")
    given = arguments()
    given["train_dataset"] = given["train_dataset"].shuffle(seed=1).select(range(7))
    ReferenceDPOTrainer(str(model_dir), **given, reference="precomputed")
    assert forwards == []


def test_whatever_the_values_depend_on_makes_them_be_computed_again(
    model_dir: Path, arguments: Arguments, store: Path, forwards: list[int]
):
    def make(model: Any = None, **options: Any) -> Any:
        init = options.pop("init", None)
        given = arguments(**options, **({"model_init_kwargs": init} if init else {}))
        return ReferenceDPOTrainer(model or str(model_dir), **given, reference="precomputed")

    make()
    assert reuses(make, forwards)
    assert not reuses(lambda: make(max_length=8), forwards)
    assert not reuses(lambda: make(max_length=8, truncation_mode="keep_end"), forwards)
    assert not reuses(lambda: make(ld_alpha=0.5), forwards)
    assert not reuses(lambda: make(init={"dtype": "bfloat16"}), forwards)
    assert not reuses(lambda: make(init={"attn_implementation": "eager"}), forwards)
    assert reuses(make, forwards)


def test_one_bit_of_the_weights_makes_them_be_computed_again(
    model_dir: Path, arguments: Arguments, store: Path, forwards: list[int]
):
    def given_as_object(flip: bool) -> Any:
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        if flip:
            bits = model.model.layers[1].mlp.up_proj.weight.data.view(torch.int32)
            bits[0, 0] ^= 1
        return ReferenceDPOTrainer(model, **arguments(), reference="precomputed")

    given_as_object(False)
    assert reuses(lambda: given_as_object(False), forwards)
    assert not reuses(lambda: given_as_object(True), forwards)

    ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed")
    file = model_dir / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert not reuses(lambda: ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed"), forwards)


def test_a_token_a_new_row_or_a_tokenizer_changes_only_the_rows_that_it_changes(
    model_dir: Path, arguments: Arguments, store: Path
):
    def computed(given: dict[str, Any]) -> float:
        trainer = ReferenceDPOTrainer(str(model_dir), **given, reference="precomputed")
        return trainer.reference_record["train"]["computed"]

    assert computed(arguments()) == 24
    given = arguments()
    rows = given["train_dataset"].to_list()
    rows[4]["chosen"] += " w1"
    assert computed(given | {"train_dataset": Dataset.from_list(rows)}) == 1
    assert computed(given | {"train_dataset": make_pairs(14)}) == 4
    swapped = arguments()
    vocabulary = (model_dir / "tokenizer.json").read_text(encoding="utf-8").replace('"w1"', '"swap"')
    (model_dir / "tokenizer.json").write_text(
        vocabulary.replace('"w2"', '"w1"').replace('"swap"', '"w2"'), encoding="utf-8"
    )
    swapped["processing_class"] = type(swapped["processing_class"]).from_pretrained(model_dir)
    assert 0 < computed(swapped) <= 24


def test_a_continued_adapters_scaling_is_part_of_its_identity(
    model_dir: Path, arguments: Arguments, store: Path, forwards: list[int]
):
    def make(alpha: int) -> Any:
        torch.manual_seed(1)
        config = LoraConfig(**LORA, lora_alpha=alpha)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return ReferenceDPOTrainer(model, **arguments(), reference="precomputed")

    make(8)
    assert reuses(lambda: make(8), forwards)
    assert not reuses(lambda: make(32), forwards)


def test_weights_from_a_subfolder_are_not_taken_for_the_folders(
    model_dir: Path, arguments: Arguments, store: Path, forwards: list[int]
):
    changed_in_memory(model_dir).save_pretrained(model_dir / "other")

    def make(**init: Any) -> Any:
        return ReferenceDPOTrainer(str(model_dir), **arguments(model_init_kwargs=init), reference="precomputed")

    make(attn_implementation="sdpa")
    assert not reuses(lambda: make(attn_implementation="sdpa", subfolder="other"), forwards)
