"""The built-in checks, one file each."""

from __future__ import annotations

from axolotl_dpo_ext.quality.checks.contradiction import Contradiction
from axolotl_dpo_ext.quality.checks.doubled_bos import DoubledBos
from axolotl_dpo_ext.quality.checks.duplicate import Duplicate
from axolotl_dpo_ext.quality.checks.identical import Identical
from axolotl_dpo_ext.quality.checks.label_noise import LabelNoise, Tie
from axolotl_dpo_ext.quality.checks.leakage import Leakage
from axolotl_dpo_ext.quality.checks.length_ratio import LengthRatio
from axolotl_dpo_ext.quality.checks.malformed import Malformed
from axolotl_dpo_ext.quality.checks.minimal_edit import MinimalEdit
from axolotl_dpo_ext.quality.checks.reference_likelihood import ReferenceLikelihood
from axolotl_dpo_ext.quality.checks.same_tokens import SameTokens
from axolotl_dpo_ext.quality.checks.similarity import Similarity
from axolotl_dpo_ext.quality.checks.truncated import Truncated

__all__ = [
    "Contradiction",
    "DoubledBos",
    "Duplicate",
    "Identical",
    "LabelNoise",
    "Leakage",
    "LengthRatio",
    "Malformed",
    "MinimalEdit",
    "ReferenceLikelihood",
    "SameTokens",
    "Similarity",
    "Tie",
    "Truncated",
]
