"""What keys of a run say that more than one figure depends on: Axolotl's own, and four for what only a script says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Keys that Axolotl does not have, for what only a script can say.
FRESH_ADAPTER = "_fresh_adapter"
ADAPTER_COPY = "_frozen_adapter_copy"
WEIGHTS_DTYPE = "_weights_dtype"
KNOWN_WEIGHTS = "_known_weights"
# LoRA initialisations that leave the policy equal to its base model; `False` and the named ones do not.
_ZERO_INIT = (None, True, "gaussian")


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Returns a key's value where it is a number above zero, otherwise the default.

    Args:
        config: The run's keys.
        key: The key.
        default: What counts as set where nothing usable is.
    """
    value = config.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return value if usable and value is not None else default


def has_fresh_adapter(config: Mapping[str, Any]) -> bool:
    """Whether switching the adapter off gives the model that training starts from: a LoRA at zero, nothing else.

    Args:
        config: The run's keys.
    """
    return (
        config.get("adapter") in ("lora", "qlora")
        and config.get("peft_init_lora_weights") in _ZERO_INIT
        and not config.get("lora_model_dir")
        and bool(config.get(FRESH_ADAPTER, True))
    )


def half_precision(config: Mapping[str, Any]) -> bool:
    """Whether training is in mixed precision."""
    return any(config.get(key) for key in ("bf16", "bfloat16", "fp16", "float16"))
