"""What a preset is, and how it is laid under the user's own keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from axolotl_dpo_ext.vocabulary import ConfigurationError, Decision, unknown_name

# Older spellings under which a user may already have said what a preset's key says; Axolotl refuses both at once.
OLDER_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "attn_implementation": (
        "flash_attention",
        "sdp_attention",
        "xformers_attention",
        "flex_attention",
        "sage_attention",
        "eager_attention",
    ),
    "bf16": ("bfloat16",),
    "fp16": ("float16",),
}


@dataclass(frozen=True)
class HardwarePreset:
    """A named set of Axolotl keys for a machine.

    Attributes:
        name: What users write under ``hardware:``.
        summary: One sentence: for which machine, and for what.
        axolotl: Axolotl keys and values; the user's own keys win over them.
    """

    name: str
    summary: str
    axolotl: Mapping[str, Any]


def expand_preset(
    name: str, config: Mapping[str, Any], presets: Mapping[str, HardwarePreset]
) -> tuple[dict[str, Any], Decision]:
    """Works out which keys a preset adds to a run.

    Args:
        name: The preset's name.
        config: The run's Axolotl keys, as in its YAML.
        presets: The registered presets by name.

    Returns:
        The keys to add, without those that the user sets, and the decision that names both.

    Raises:
        ConfigurationError: The name is unknown.
    """
    if name not in presets:
        raise ConfigurationError([unknown_name("dpo_ext.hardware", name, presets, "preset")])
    preset = presets[name]
    added = {key: value for key, value in preset.axolotl.items() if not _user_sets(key, config)}
    kept = [key for key in preset.axolotl if key not in added]
    reason = (
        f"{preset.summary}; sets {', '.join(f'{key}: {_yaml(value)}' for key, value in added.items()) or 'nothing'}"
    )
    if kept:
        reason += f"; your own {', '.join(kept)} won"
    return added, Decision("hardware", name, reason)


def _user_sets(key: str, config: Mapping[str, Any]) -> bool:
    return any(config.get(spelling) is not None for spelling in (key, *OLDER_SPELLINGS.get(key, ())))


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
