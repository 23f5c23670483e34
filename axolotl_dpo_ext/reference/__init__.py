"""Where the frozen reference model's log-probabilities come from.

``ReferenceDPOTrainer`` and ``ReferenceMixin`` bring the strategies to TRL scripts. They are imported when first asked
for: this package itself loads neither torch nor trl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl_dpo_ext.reference.selector import choose_strategy
from axolotl_dpo_ext.reference.strategies import Policy, Reference, ReferenceStrategy

if TYPE_CHECKING:
    from axolotl_dpo_ext.reference.identity import Checkpoint
    from axolotl_dpo_ext.reference.precompute import PairLogProbs
    from axolotl_dpo_ext.reference.trainer import ReferenceDPOTrainer, ReferenceMixin

__all__ = [
    "Checkpoint",
    "PairLogProbs",
    "Policy",
    "Reference",
    "ReferenceDPOTrainer",
    "ReferenceMixin",
    "ReferenceStrategy",
    "choose_strategy",
]

_LATE = {
    "Checkpoint": "identity",
    "PairLogProbs": "precompute",
    "ReferenceDPOTrainer": "trainer",
    "ReferenceMixin": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
