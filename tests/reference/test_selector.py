from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl import DPOConfig

from axolotl_dpo_ext.reference import choose_strategy
from axolotl_dpo_ext.reference.builtins import reference_strategies
from axolotl_dpo_ext.reference.estimates import estimate
from axolotl_dpo_ext.reference.script_keys import keys_of_script
from axolotl_dpo_ext.reference.situation import Situation
from axolotl_dpo_ext.reference.store import STORE_VARIABLE, ReferenceStore
from axolotl_dpo_ext.reference.store_files import StoredRows
from axolotl_dpo_ext.reference.weights import weights_digest
from axolotl_dpo_ext.vocabulary import ConfigurationError

STRATEGIES = {strategy.name: strategy for strategy in reference_strategies()}


def save_model(folder: Path, **more: Any) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **more}
    config = AutoConfig.for_model("llama", num_attention_heads=4, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "stores"))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "stores"


def give_accelerator(monkeypatch: pytest.MonkeyPatch, usable: float, name: str = "NVIDIA H200") -> None:
    """Lets torch tell of an accelerator with so many bytes for a run; nothing is computed on it."""
    memory = int(usable / 0.9) + 2**31
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name=name, total_memory=memory)
    )  # fmt: skip


def chosen(config: dict[str, Any]) -> tuple[str, str, str]:
    """What auto chooses, and the two lines that it says."""
    strategy, decision = choose_strategy("auto", {"rl": "dpo", **config}, STRATEGIES)
    assert strategy.name == decision.choice
    why, figures = decision.reason.splitlines()
    assert "auto: " in why
    return decision.choice, why, figures


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "gpu"),
        ({"precompute_ref_log_probs": True}, "gpu"),
        ({"adapter": "lora"}, "adapter"),
        ({"adapter": "lora", "precompute_ref_log_probs": True}, "adapter"),
        ({"adapter": "qlora"}, "adapter"),
        ({"adapter": "lora", "num_epochs": 3}, "adapter"),
        ({"adapter": "lora", "rl_adapter_ref_model": True}, "gpu"),
        ({"adapter": "lora", "peft_init_lora_weights": "pissa"}, "gpu"),
        ({"adapter": "lora", "lora_modules_to_save": ["embed_tokens"]}, "adapter"),
        ({"adapter": "lora", "lora_model_dir": "sft"}, "precomputed"),
        ({"num_epochs": 3}, "precomputed"),
        ({"num_epochs": 3, "max_steps": 100}, "gpu"),
        ({"num_epochs": 3, "rl": "ipo"}, "precomputed"),
        ({"num_epochs": 3, "dpo_loss_type": ["sigmoid_norm", "sft"]}, "precomputed"),
        ({"num_epochs": 3, "dpo_loss_type": ["sigmoid", "one_of_next_year"]}, "gpu"),
        ({"num_epochs": 3, "dpo_use_liger_kernel": True}, "gpu"),
        ({"num_epochs": 3, "precompute_ref_log_probs": True}, "gpu"),
        ({"num_epochs": 3, "trl": {"sync_ref_model": True}}, "gpu"),
        ({"num_epochs": 3, "deepspeed": "zero3.json"}, "gpu"),
        ({"num_epochs": 3, "deepspeed": "zero2.json"}, "precomputed"),
    ],
)
def test_auto_picks_by_rule_where_no_size_is_known(config: dict[str, Any], expected: str):
    choice, _, figures = chosen(config)
    assert choice == expected
    assert figures.startswith("no figures: ")


def test_the_second_line_has_the_figures_of_each_candidate(model_folder: Path):
    choice, why, figures = chosen({"base_model": str(model_folder)})
    assert choice == "gpu"
    assert re.search(r"fits: [\d.]+ MB of [\d.]+ GB", why)
    cost = r"[\d.]+ MB, [\de.-]+ s/step"
    assert re.match(
        rf"gpu {cost}; adapter - \(without `adapter:` \(full fine-tuning\)\); cpu_offload {cost}; precomputed {cost} "
        r"\(up to 1,024 tokens a step and device, [\d.]+ GB usable on the processor, nominal rates\)",
        figures,
    )


def test_a_fresh_adapter_has_its_figures_too(model_folder: Path):
    choice, why, figures = chosen({"base_model": str(model_folder), "adapter": "lora", "num_epochs": 3})
    assert choice == "adapter"
    assert "lora is fresh" in why
    assert re.search(r"adapter [\d.]+ MB, [\de.-]+ s/step;", figures)


def test_a_store_with_rows_of_these_weights_is_used(model_folder: Path, own_store: Path):
    keys = np.random.default_rng(0).integers(0, 256, (1234, 16), np.uint8)
    identity = {"weights": f"files:{weights_digest(str(model_folder))}", "adapter": None}
    ReferenceStore(own_store, identity).append(
        StoredRows(keys, np.full(1234, -5, np.float32), np.ones(1234, np.int32))
    )  # fmt: skip
    choice, why, _ = chosen({"base_model": str(model_folder)})
    assert choice == "precomputed"
    assert "1,234 answers" in why
    assert chosen({"base_model": str(model_folder), "deepspeed": "zero3.json"})[0] == "precomputed", (
        "nothing to compute"
    )
    assert chosen({"base_model": str(model_folder), "dpo_loss_type": ["one_of_next_year"]})[0] == "gpu"


def test_a_second_copy_that_does_not_fit_is_streamed_where_that_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Deep and narrow, so that a whole copy needs more than two layers and a step's hidden states do.
    save_model(tmp_path / "deep", num_hidden_layers=64, intermediate_size=512)
    run = {"base_model": str(tmp_path / "deep"), "sequence_len": 16, "bf16": True}
    enough, too_few = {**run, "gradient_accumulation_steps": 300}, {**run, "gradient_accumulation_steps": 100}
    give_accelerator(monkeypatch, 1e9)
    assert chosen(enough)[0] == chosen(too_few)[0] == "gpu"
    needed = {name: figure.bytes_per_device for name, figure in estimate(Situation.of(enough)).items()}
    assert needed["precomputed"] < needed["cpu_offload"] < needed["gpu"]
    give_accelerator(monkeypatch, (needed["gpu"] + needed["cpu_offload"]) / 2)
    choice, why, figures = chosen(enough)
    assert choice == "cpu_offload"
    assert "a second copy does not fit" in why
    assert "behind a step of 9,600 tokens" in why
    assert "does not fit" in figures.split(";")[0]
    assert "hides from 9,000 tokens" in figures
    assert "NVIDIA H200" in figures
    choice, why, _ = chosen(too_few)
    assert choice == "precomputed"
    assert "a step has 3,200 of 9,000 tokens" in why


def test_where_streaming_cannot_serve_the_values_are_computed_before(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    run = {"base_model": str(model_folder), "gradient_accumulation_steps": 1000}
    give_accelerator(monkeypatch, 1e5)
    choice, why, _ = chosen(run)
    assert choice == "precomputed"
    assert "neither does a streamed one" in why
    choice, why, figures = chosen({**run, "adapter": "qlora", "load_in_4bit": True, "peft_init_lora_weights": "loftq"})
    assert choice == "precomputed"
    assert "adapter - (with peft_init_lora_weights: loftq)" in figures
    assert "cpu_offload - (with load_in_4bit: true)" in figures
    choice, why, _ = chosen({**run, "deepspeed": "zero3.json"})
    assert choice == "precomputed"
    assert "axolotl dpo-precompute" in why
    choice, why, _ = chosen({**run, "dpo_loss_type": ["one_of_next_year"]})
    assert choice == "gpu"
    assert "no other strategy can serve" in why


def test_a_continued_adapter_of_a_script_refers_to_its_frozen_copy(tmp_path: Path, model_folder: Path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(r=2))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(0.1)
    once = DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, num_train_epochs=1)
    choice, why, figures = chosen(keys_of_script({"model": model, "args": once}, True))
    assert choice == "adapter"
    assert "frozen copy" in why
    assert "gpu - (a copy of the base model lacks the continued adapter)" in figures
    often = DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, num_train_epochs=2)
    assert chosen(keys_of_script({"model": model, "args": often}, True))[0] == "precomputed"


def test_every_process_decides_the_same(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    runs = [
        {"rl": "dpo", "base_model": str(model_folder), **more}
        for more in ({}, {"adapter": "lora"}, {"num_epochs": 2}, {"fsdp_config": {"offload_params": False}})
    ]
    here = [choose_strategy("auto", run, STRATEGIES)[1].reason for run in runs]
    assert here == [choose_strategy("auto", run, STRATEGIES)[1].reason for run in runs]
    code = """
import json, sys
from axolotl_dpo_ext.reference import choose_strategy
from axolotl_dpo_ext.reference.builtins import reference_strategies
strategies = {strategy.name: strategy for strategy in reference_strategies()}
print(json.dumps([choose_strategy("auto", run, strategies)[1].reason for run in json.loads(sys.argv[1])]))
"""
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(runs)], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == here


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("adapter", {}, "full fine-tuning"),
        ("adapter", {"adapter": "lora", "rl_adapter_ref_model": True}, "rl_adapter_ref_model"),
        ("gpuu", {}, "did you mean 'gpu'?"),
        ("zzz", {}, "choose from: auto, gpu, adapter, cpu_offload, precomputed"),
    ],
)
def test_what_cannot_serve_is_refused_by_name(name: str, config: dict[str, Any], words: str):
    with pytest.raises(ConfigurationError, match=r"dpo_ext\.reference") as caught:
        choose_strategy(name, {"rl": "dpo", **config}, STRATEGIES)
    assert words in str(caught.value)


def test_a_second_copy_with_an_adapter_tells_axolotl_to_load_it():
    strategy, _ = choose_strategy("gpu", {"rl": "dpo", "adapter": "lora"}, STRATEGIES)
    assert strategy.axolotl_keys({"rl": "dpo", "adapter": "lora"}) == {"rl_adapter_ref_model": True}
    assert strategy.axolotl_keys({"rl": "dpo"}) == {}
