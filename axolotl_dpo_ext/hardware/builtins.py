"""The pack's own hardware presets, registered through the same hook as anybody's."""

from __future__ import annotations

from axolotl_dpo_ext.hardware.presets import HardwarePreset
from axolotl_dpo_ext.hookspecs import hookimpl

CPU = HardwarePreset(
    name="cpu",
    summary="a machine without an accelerator, to try a configuration on a small model",
    axolotl={
        "bf16": False,
        "fp16": False,
        "tf32": False,
        # The 8-bit optimizers of many example configs run on an accelerator only.
        "optimizer": "adamw_torch",
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        # Worker processes cost more than they bring when the same few cores also train.
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    },
)


@hookimpl
def hardware_presets() -> list[HardwarePreset]:
    """Registers ``cpu``."""
    return [CPU]
