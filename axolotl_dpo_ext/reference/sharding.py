"""How DeepSpeed or FSDP spread a run over its processes, as far as its keys tell."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_dpo_ext.reference.json_files import read_json
from axolotl_dpo_ext.reference.run_keys import number


@dataclass(frozen=True)
class Sharding:
    """How the processes of a run share the policy's memory.

    Attributes:
        stage: As DeepSpeed counts: 1 shards optimizer states, 2 gradients too, 3 weights too; FSDP counts as 3.
        devices: Over how many devices.
        master_weights: Whether a float32 copy of bfloat16 weights is kept, as DeepSpeed does.
        optimizer_on_host: Whether optimizer states are in host memory.
        whole_at_start: Whether every process has all weights before training, so that it can compute or copy them.
    """

    stage: int = 0
    devices: int = 1
    master_weights: bool = False
    optimizer_on_host: bool = False
    whole_at_start: bool = True


def sharding_of(config: Mapping[str, Any], bytes_per_parameter: float) -> Sharding:
    """Returns how the processes of a run share the policy's memory.

    Args:
        config: The run's keys.
        bytes_per_parameter: Of the weights as loaded.
    """
    world = int(os.environ.get("WORLD_SIZE") or 1)
    fsdp = config.get("fsdp_config") or ({} if config.get("fsdp") else None)
    if isinstance(fsdp, Mapping):
        efficient = fsdp.get("cpu_ram_efficient_loading") or fsdp.get("fsdp_cpu_ram_efficient_loading")
        return Sharding(
            stage=3,
            devices=int(number(config, "dp_shard_size", world)),
            optimizer_on_host=bool(fsdp.get("offload_params") or fsdp.get("fsdp_offload_params")),
            whole_at_start=not _true(efficient),
        )
    if not config.get("deepspeed"):
        return Sharding(devices=world)
    zero = _zero(config["deepspeed"])
    stage = zero.get("stage")
    stage = stage if isinstance(stage, int) else 0
    offload = zero.get("offload_optimizer")
    return Sharding(
        stage=stage,
        devices=world,
        master_weights=bytes_per_parameter <= 2,
        optimizer_on_host=isinstance(offload, Mapping) and offload.get("device") in ("cpu", "nvme"),
        whole_at_start=stage < 3,
    )


def _true(value: Any) -> bool:
    return value.lower() == "true" if isinstance(value, str) else bool(value)


def _zero(deepspeed: Any) -> Mapping[str, Any]:
    """Returns DeepSpeed's ``zero_optimization``, as far as its configuration can be read."""
    content = deepspeed
    if isinstance(deepspeed, str | os.PathLike):
        content = read_json(Path(deepspeed))
        named = re.search(r"zero([0-3])", os.path.basename(deepspeed))
        if content is None and named:
            return {"stage": int(named[1])}
    found = content.get("zero_optimization") if isinstance(content, Mapping) else None
    return found if isinstance(found, Mapping) else {}
