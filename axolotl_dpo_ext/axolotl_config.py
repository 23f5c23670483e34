"""An Axolotl configuration for commands that do not train: what shards a model left out, validated on any machine."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from axolotl_dpo_ext.vocabulary import Problem

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault

# What shards a model over processes, or makes optimizer states; a process that only computes does without.
_SHARDING_KEYS = ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "tensor_parallel_size", "context_parallel_size")

# What the machine that will train is taken to have, so that a configuration can be checked on any machine.
ASSUMED_CAPABILITIES = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}


def for_one_process(keys: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    """Returns the keys of a run for a command that does not train: without what shards a model, and without report.

    Args:
        keys: An Axolotl configuration as read from YAML.
        parts: What stands under ``dpo_ext`` instead.
    """
    from axolotl_dpo_ext.hardware import expand_preset
    from axolotl_dpo_ext.plugins import extensions

    given = keys.get("dpo_ext")
    preset = given.get("hardware") if isinstance(given, Mapping) else None
    # What a preset says of dtype and attention belongs to the values; how it shards does not.
    filled = expand_preset(preset, keys, extensions().hardware_presets)[0] if preset else {}
    kept = {key: copy.deepcopy(value) for key, value in {**keys, **filled}.items() if key not in _SHARDING_KEYS}
    others = dict(given) if isinstance(given, Mapping) else {}
    kept["dpo_ext"] = {**others, **parts, "hardware": None, "report": False}
    plugins = kept.get("plugins") or []
    named = "axolotl_dpo_ext.DPOExtPlugin"
    kept["plugins"] = plugins if named in plugins else [*plugins, named]
    return kept


def validate_with_axolotl(keys: Mapping[str, Any]) -> list[Problem]:
    """Runs Axolotl's own validation on a configuration, as ``axolotl train`` would.

    Args:
        keys: An Axolotl configuration as read from YAML.

    Returns:
        A problem for everything that Axolotl's validation refuses.
    """
    from axolotl_dpo_ext.upstream_errors import refusals

    try:
        validated(keys)
    except Exception as error:
        return refusals(error)
    return []


def validated(keys: Mapping[str, Any]) -> DictDefault:
    """Returns a configuration after Axolotl's own validation, as for the machine that will train."""
    import torch
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(copy.deepcopy(dict(keys)))
    environment = {"torch_version": str(torch.__version__).split("+", maxsplit=1)[0]}
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities=ASSUMED_CAPABILITIES, env_capabilities=environment)
