"""Hardware presets: named sets of Axolotl keys for a machine."""

from axolotl_dpo_ext.hardware.presets import HardwarePreset, expand_preset

__all__ = ["HardwarePreset", "expand_preset"]
