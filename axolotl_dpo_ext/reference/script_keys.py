"""A TRL script in Axolotl's keys, so that one rule decides for both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from axolotl_dpo_ext.reference.checkpoint_size import QUANTIZED_BYTES
from axolotl_dpo_ext.reference.run_keys import ADAPTER_COPY, FRESH_ADAPTER, KNOWN_WEIGHTS, WEIGHTS_DTYPE


def keys_of_script(given: Mapping[str, Any], known_weights: bool) -> dict[str, Any]:
    """Says what a TRL script does in Axolotl's keys, so that one rule decides for both.

    Four private keys say what Axolotl has no key for: whether an adapter in memory is fresh, whether TRL will keep a
    frozen copy of it, the dtype of the weights, and whether files are known that hold them.

    Args:
        given: The arguments of ``DPOTrainer`` by name; ``model`` and ``args`` are there.
        known_weights: Whether the weights are those of a checkpoint's files, unchanged.
    """
    model, args, peft_config = given["model"], given["args"], given.get("peft_config")
    init = dict(getattr(args, "model_init_kwargs", None) or {})
    return {
        "rl": "dpo",
        "base_model": model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or None,
        "revision_of_model": init.get("revision"),
        WEIGHTS_DTYPE: _script_dtype(model, init),
        KNOWN_WEIGHTS: known_weights,
        "streaming": any(_is_streamed(given.get(name)) for name in ("train_dataset", "eval_dataset")),
        **_quantization_keys(model, init),
        **_adapter_keys(model, peft_config),
        "bf16": args.bf16,
        "fp16": args.fp16,
        "micro_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "sequence_len": args.max_length,
        "num_epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "optimizer": getattr(args.optim, "value", args.optim),
        "gradient_checkpointing": args.gradient_checkpointing,
        "dpo_loss_type": args.loss_type,
        "ld_alpha": args.ld_alpha,
        "dpo_use_liger_kernel": bool(getattr(args, "use_liger_kernel", False)),
        "trl": {"sync_ref_model": bool(getattr(args, "sync_ref_model", False))},
        **_sharding_keys(args),
    }


def _is_streamed(datasets: Any) -> bool:
    sets = datasets.values() if isinstance(datasets, Mapping) and not hasattr(datasets, "column_names") else [datasets]
    return any(dataset is not None and not hasattr(dataset, "__len__") for dataset in sets)


def _script_dtype(model: Any, init: Mapping[str, Any]) -> str:
    if not isinstance(model, str):
        return str(model.dtype)
    # TRL loads a model that is given by name in float32 (trl/trainer/utils.py: create_model_from_path).
    return str(init.get("dtype") or init.get("torch_dtype") or "float32")


def _quantization_keys(model: Any, init: Mapping[str, Any]) -> dict[str, Any]:
    asked = init.get("quantization_config")
    return {
        key: bool(
            init.get(key)
            or getattr(asked, key, False)
            or (isinstance(asked, Mapping) and asked.get(key))
            or getattr(model, f"is_{key.replace('load_', 'loaded_')}", False)
        )
        for key in QUANTIZED_BYTES
    }


def _adapter_keys(model: Any, peft_config: Any) -> dict[str, Any]:
    given = getattr(model, "peft_config", None)
    if given is None and peft_config is None:
        return {"adapter": None}
    adapter = next(iter(given.values())) if given else peft_config
    is_lora = str(getattr(adapter.peft_type, "value", adapter.peft_type)).upper() == "LORA"
    keys = {
        "adapter": "lora" if is_lora else str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower(),
        "lora_r": getattr(adapter, "r", None),
        "lora_target_modules": _names(getattr(adapter, "target_modules", None)),
        "lora_modules_to_save": _names(getattr(adapter, "modules_to_save", None)),
    }
    if given is None:
        return {**keys, "peft_init_lora_weights": getattr(adapter, "init_lora_weights", None)}
    from axolotl_dpo_ext.reference.identity import is_fresh_adapter

    # The weights themselves tell, whatever the configuration says of how they once began.
    fresh = is_fresh_adapter(model)
    init = getattr(adapter, "init_lora_weights", None)
    # TRL copies the adapter, unless PEFT can't (trl/trainer/dpo_trainer.py, peft#3340).
    copied = not fresh and is_lora and not getattr(adapter, "target_parameters", None)
    return {**keys, "peft_init_lora_weights": None if copied else init, FRESH_ADAPTER: fresh, ADAPTER_COPY: copied}


def _names(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value


def _sharding_keys(args: Any) -> dict[str, Any]:
    """Returns what the arguments, or else `accelerate launch` through the environment, say of DeepSpeed and FSDP."""
    environment = os.environ
    deepspeed = getattr(args, "deepspeed", None)
    if deepspeed is None and environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        deepspeed = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or {
            "zero_optimization": {"stage": int(stage) if stage.isdigit() else 2}
        }
    fsdp = None
    if getattr(args, "fsdp", None) or environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        efficient = environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true"
        fsdp = {"cpu_ram_efficient_loading": efficient, **(getattr(args, "fsdp_config", None) or {})}
    return {"deepspeed": deepspeed, "fsdp_config": fsdp}
