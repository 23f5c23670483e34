"""What `auto` looks at to choose a reference strategy. Everything is the same on every rank, so the choice is too.

Nothing is downloaded, loaded or measured: sizes come from the headers of the weight files that are on this machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_dpo_ext.reference.checkpoint_size import ModelShape, checkpoint_folder, model_shape
from axolotl_dpo_ext.reference.run_keys import ADAPTER_COPY, half_precision, has_fresh_adapter, number
from axolotl_dpo_ext.reference.sharding import Sharding, sharding_of
from axolotl_dpo_ext.reference.stored_rows import stored_rows

# Axolotl's own default.
_SEQUENCE_LEN = 512


@dataclass(frozen=True)
class Device:
    """What a process computes on.

    Attributes:
        name: The accelerator's name, or ``None`` without one.
        memory: The accelerator's memory in bytes, or ``None`` without one.
        host_memory: A process's share of the machine's memory in bytes.
    """

    name: str | None
    memory: int | None
    host_memory: int


@dataclass(frozen=True)
class Situation:
    """What the choice between the strategies depends on.

    Attributes:
        base_model: Name of the base model.
        adapter: Kind of adapter, or ``None`` in full fine-tuning.
        fresh_adapter: Whether the adapter changes nothing before the first step.
        adapter_copy: Whether TRL keeps a frozen copy of a continued adapter beside it.
        losses: Names of the losses, as TRL has them.
        epochs: How often each pair is trained on; 1 where ``max_steps`` leaves that open.
        micro_tokens: Most tokens of a micro-batch, both answers of each pair.
        step_tokens: Most tokens of an optimizer step on one device.
        checkpointing: Whether activations are computed again in the backward pass.
        activation_bytes: Bytes of an activation: 2 in mixed precision.
        optimizer: Name of the optimizer.
        sharding: How processes share the policy's memory.
        device: What a process computes on.
        stored_rows: How many answers have stored log-probabilities under these weights.
        model: The model's size, or ``None`` where it cannot be known without a download.
    """

    base_model: str | None
    adapter: str | None
    fresh_adapter: bool
    adapter_copy: bool
    losses: tuple[str, ...]
    epochs: float
    micro_tokens: int
    step_tokens: int
    checkpointing: bool
    activation_bytes: int
    optimizer: str
    sharding: Sharding
    device: Device
    stored_rows: int
    model: ModelShape | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Situation:
        """Looks at a run.

        Args:
            config: The run's Axolotl keys, as in its YAML, or as ``keys_of_script`` returns them. Values that Axolotl
                will refuse count as not set.
        """
        name = config.get("base_model")
        name = name if isinstance(name, str) and name else None
        micro_batch = number(config, "micro_batch_size", 1)
        micro_tokens = int(2 * micro_batch * number(config, "sequence_len", _SEQUENCE_LEN))
        folder = checkpoint_folder(name, config.get("revision_of_model"))
        model = None if folder is None else model_shape(folder, config)
        return cls(
            base_model=name,
            adapter=config.get("adapter") or None,
            fresh_adapter=has_fresh_adapter(config),
            adapter_copy=bool(config.get(ADAPTER_COPY)),
            losses=_losses(config),
            epochs=1.0 if number(config, "max_steps", 0) else number(config, "num_epochs", 1.0),
            micro_tokens=micro_tokens,
            step_tokens=micro_tokens * _accumulation(config, micro_batch),
            checkpointing=_checkpoints(config),
            activation_bytes=2 if half_precision(config) else 4,
            optimizer=str(config.get("optimizer") or "adamw_torch_fused"),
            sharding=sharding_of(config, 0.0 if model is None else model.bytes_per_parameter),
            device=_device(needed=model is not None),
            stored_rows=0 if folder is None else stored_rows(config, folder),
            model=model,
        )


def _accumulation(config: Mapping[str, Any], micro_batch: float) -> int:
    # Axolotl works it out of `batch_size` where only that is set (utils/config: normalize_config).
    return int(number(config, "gradient_accumulation_steps", number(config, "batch_size", 0) // micro_batch or 1))


def _losses(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("rl") == "ipo":
        return ("ipo",)
    given = config.get("dpo_loss_type") or "sigmoid"
    return (given,) if isinstance(given, str) else tuple(str(loss) for loss in given)


def _checkpoints(config: Mapping[str, Any]) -> bool:
    fsdp = config.get("fsdp_config")
    in_fsdp = isinstance(fsdp, Mapping) and (
        fsdp.get("activation_checkpointing") or fsdp.get("fsdp_activation_checkpointing")
    )
    return bool(config.get("gradient_checkpointing") or config.get("activation_offloading") or in_fsdp)


def _device(needed: bool) -> Device:
    """Looks at the device. Without a size to compare with there is no need to, nor to import torch for it."""
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    host = _host_memory() // processes
    if not needed:
        return Device(None, None, host)
    import torch

    if not torch.cuda.is_available():
        return Device(None, None, host)
    # The first device, not this process's: every rank must see the same.
    found = torch.cuda.get_device_properties(0)
    return Device(str(found.name), int(found.total_memory), host)


def _host_memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max" where the container has no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return memory
