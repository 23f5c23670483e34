"""Copies of a policy that stay as they are while it is trained."""

from __future__ import annotations

import copy
from typing import Any

from axolotl_dpo_ext.reference.logprobs import causal_model_of
from axolotl_dpo_ext.reference.randomness import random_state_kept


def frozen_copy(model: Any, keep_adapter: bool) -> Any:
    """Returns a copy of a model without adapter modules, in evaluation mode, that takes no gradients.

    Args:
        model: A causal language model, or a PEFT model around one.
        keep_adapter: Whether a PEFT model's adapter is merged into the copy; otherwise it is left out.
    """
    with random_state_kept():
        frozen = copy.deepcopy(model)
        # TRL 1.16 gives a model a forward of its own that calls the original model's, also in a copy.
        vars(causal_model_of(frozen)).pop("forward", None)
        if hasattr(frozen, "peft_config"):
            frozen = frozen.merge_and_unload() if keep_adapter else frozen.unload()
        frozen.requires_grad_(False)
        frozen.gradient_checkpointing_disable()
        return frozen.eval()
