from __future__ import annotations

from typing import Any

import pytest
from packaging.version import Version

from axolotl_dpo_ext.compatibility import RULES, Run, find_problems
from axolotl_dpo_ext.settings import parse_settings

STACK_A = {"axolotl": Version("0.19.0"), "trl": Version("1.9.0")}
STACK_B = {"axolotl": Version("0.21.0"), "trl": Version("1.14.1")}
OLD = {"axolotl": Version("0.18.0"), "trl": Version("1.8.0")}
NEWEST = {"axolotl": None, "trl": Version("1.16.0")}


def make_run(config: dict[str, Any], dpo_ext: dict[str, Any] | None, versions: dict[str, Any]) -> Run:
    strategy = (dpo_ext or {}).get("reference")
    handing_over = strategy if strategy in ("precomputed", "cpu_offload") else None
    return Run({"rl": "dpo", **config}, parse_settings(dpo_ext or {}), versions, handing_over)


def settings_found(
    config: dict[str, Any], dpo_ext: dict[str, Any] | None = None, versions: dict[str, Any] = STACK_A
) -> list[tuple[str, bool]]:
    run = make_run(config, dpo_ext, versions)
    return [(problem.setting, problem.fatal) for problem in find_problems(run)]


def test_a_plain_run_has_no_problem():
    assert settings_found({"rl_beta": 0.1, "adapter": "lora"}, {"quality": True}) == []
    assert settings_found({"rl": "kto"}, {"quality": True}) == []


# (config, dpo_ext, versions) that must be refused or advised on, and the key that the problem is about.
CASES = [
    ({"rl": None}, {}, STACK_A, "dpo_ext", True),
    ({"rl": "grpo"}, {}, STACK_A, "dpo_ext", True),
    ({"rl": "kto"}, {"reference": "auto"}, STACK_A, "dpo_ext.reference", True),
    ({"rl": "orpo"}, {"reference": "auto"}, STACK_A, "dpo_ext.reference", True),
    ({"rl": "orpo", "orpo_alpha": 0.1, "rl_beta": 0.2}, {}, STACK_A, "rl_beta", True),
    ({"adapter": "lora", "precompute_ref_log_probs": True, "dpo_use_liger_kernel": True}, {}, STACK_A, "dpo_use_liger_kernel", True),
    ({"trl": {"sync_ref_model": True}, "adapter": "lora"}, {}, STACK_A, "trl.sync_ref_model", True),
    ({"trl": {"sync_ref_model": True}}, {}, STACK_A, "trl.sync_ref_model", True),
    ({"streaming": True, "precompute_ref_log_probs": True, "adapter": "lora"}, {}, STACK_A, "streaming", True),
    ({"streaming": True}, {"quality": True}, STACK_A, "streaming", True),
    ({"processor_type": "AutoProcessor", "adapter": "lora", "precompute_ref_log_probs": True}, {}, STACK_A, "precompute_ref_log_probs", True),
    ({"processor_type": "AutoProcessor"}, {"quality": True}, STACK_A, "dpo_ext.quality", True),
    ({"rl_beta": 0.1, "trl": {"beta": 0.1}}, {}, STACK_A, "rl_beta", True),
    ({"rl_beta": 0.1, "dpo_beta": 0.2}, {}, STACK_A, "rl_beta", True),
    ({"pad_to_multiple_of": 8}, {}, STACK_A, "pad_to_multiple_of", True),
    ({"adapter": "lora", "precompute_ref_log_probs": True, "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}, {}, STACK_B, "precompute_ref_log_probs", True),
    ({"adapter": "lora", "precompute_ref_log_probs": True, "fsdp_config": {"version": 2}}, {}, STACK_A, "precompute_ref_log_probs", True),
    ({"adapter": "lora", "precompute_ref_log_probs": True, "fsdp_config": {"offload_params": True}}, {}, STACK_B, "precompute_ref_log_probs", True),
    ({"adapter": "lora", "precompute_ref_log_probs": True, "deepspeed": "zero3.json"}, {}, OLD, "precompute_ref_log_probs", True),
    ({"deepspeed": "zero3.json"}, {}, STACK_A | {"deepspeed": None}, "deepspeed", True),
    ({"precompute_ref_log_probs": True}, {}, STACK_A, "precompute_ref_log_probs", False),
    ({"rl": "orpo", "precompute_ref_log_probs": True}, {}, STACK_A, "precompute_ref_log_probs", True),
    ({"adapter": "lora", "lora_model_dir": "sft"}, {"reference": "auto"}, STACK_A, "lora_model_dir", True),
    ({"dpo_use_liger_kernel": True}, {"reference": "precomputed"}, STACK_A, "dpo_use_liger_kernel", True),
    ({"streaming": True}, {"reference": "precomputed"}, STACK_A, "streaming", True),
    ({"processor_type": "AutoProcessor"}, {"reference": "cpu_offload"}, STACK_A, "dpo_ext.reference", True),
    ({"precompute_ref_log_probs": True}, {"reference": "precomputed"}, STACK_A, "precompute_ref_log_probs", True),
    ({"trainer_cls": "mine.Trainer"}, {"reference": "gpu"}, STACK_A, "trainer_cls", True),
    ({"dpo_padding_free": True}, {}, STACK_A, "dpo_padding_free", False),
    ({"early_stopping_patience": 3}, {}, STACK_A, "early_stopping_patience", False),
    ({"test_datasets": [{"path": "x"}]}, {"quality": {"holdout": 0.1}}, STACK_A, "dpo_ext.quality.holdout", True),
    ({"val_set_size": 0.2}, {"quality": {"holdout": 0.1}}, STACK_A, "dpo_ext.quality.holdout", True),
    *[({"val_set_size": wrong}, {"quality": True}, STACK_A, "val_set_size", True)
      for wrong in ("abc", [], {}, True, -1, float("nan"), float("inf"), 10**400)],
    ({"val_set_size": 0.2}, {"quality": {"holdout": 0}}, STACK_A, "dpo_ext.quality.holdout", True),
]  # fmt: skip


@pytest.mark.parametrize(("config", "dpo_ext", "versions", "setting", "fatal"), CASES)
def test_each_combination_is_found_and_nothing_else(
    config: dict[str, Any], dpo_ext: dict[str, Any], versions: dict[str, Any], setting: str, fatal: bool
):
    assert settings_found(config, dpo_ext, versions) == [(setting, fatal)]


# The same keys where they do work: a version that mended it, or the clashing key taken away.
@pytest.mark.parametrize(
    ("config", "dpo_ext", "versions"),
    [
        ({"adapter": "lora", "precompute_ref_log_probs": True, "dpo_use_liger_kernel": True}, {}, STACK_B),
        ({"adapter": "lora", "precompute_ref_log_probs": True, "fsdp_config": {"version": 2}}, {}, NEWEST),
        (
            {"adapter": "lora", "precompute_ref_log_probs": True, "fsdp_config": {"offload_params": True}},
            {},
            STACK_A,
        ),
        ({"adapter": "lora", "precompute_ref_log_probs": True, "deepspeed": "zero3.json"}, {}, STACK_A),
        ({"deepspeed": "zero3.json"}, {}, STACK_A | {"deepspeed": Version("0.19.6")}),
        ({"val_set_size": 0.1}, {"quality": {"holdout": 0.1}}, STACK_A),
        ({"val_set_size": 0.1}, {"quality": True}, STACK_A),
        ({"test_datasets": [{"path": "x"}]}, {"quality": True}, STACK_A),
        ({"trl": {"beta": 0.1}}, {}, STACK_A),
        ({"dpo_beta": 0.1}, {}, STACK_A),
        ({"rl": "orpo"}, {"quality": True}, STACK_A),
        ({"rl": "orpo", "adapter": "lora", "lora_model_dir": "sft"}, {"quality": True}, STACK_A),
        # Their trainers still make the columns that Axolotl's collator expects.
        ({"rl": "simpo", "pad_to_multiple_of": 8}, {}, STACK_A),
        ({"rl": "kto"}, {"hardware": "cpu"}, STACK_A),
        ({"val_set_size": 0}, {"quality": {"holdout": 0.1}}, STACK_A),
        # Wrong types elsewhere are Axolotl's to report; they must not make a rule fail.
        (
            {"val_set_size": "abc", "trl": [1], "fsdp_config": "x", "fsdp_version": "two", "fsdp": [1], "plugins": 5},
            {},
            STACK_A,
        ),
        ({"fsdp_config": {"version": "two"}, "precompute_ref_log_probs": True, "adapter": 3}, {}, STACK_A),
        ({"test_datasets": [{"path": "x"}]}, {"quality": {"holdout": 0}}, STACK_A),
        ({"processor_type": "AutoProcessor"}, {}, STACK_A),
        ({"streaming": True}, {"reference": "cpu_offload"}, STACK_A),
        ({"dpo_use_liger_kernel": True}, {"reference": "precomputed"}, STACK_B),
    ],
)
def test_what_works_is_left_alone(config: dict[str, Any], dpo_ext: dict[str, Any], versions: dict[str, Any]):
    assert settings_found(config, dpo_ext, versions) == []


def test_every_rule_names_its_source_and_has_a_case():
    covered = set()
    for config, dpo_ext, versions, _setting, _fatal in CASES:
        run = make_run(config, dpo_ext, versions)
        covered |= {rule.__name__ for rule in RULES if list(rule(run))}
    assert covered == {rule.__name__ for rule in RULES}


def test_problems_say_what_was_set_why_and_what_to_change():
    run = Run({"rl": "dpo", "pad_to_multiple_of": 8}, parse_settings({}), STACK_A)
    text = str(find_problems(run)[0])
    assert "pad_to_multiple_of: 8" in text
    assert "why:" in text
    assert "fix: remove pad_to_multiple_of" in text
