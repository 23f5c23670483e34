"""The built-in checks, one file each."""

from __future__ import annotations

from axolotl_dpo_ext.quality.checks.identical import Identical
from axolotl_dpo_ext.quality.checks.length_ratio import LengthRatio
from axolotl_dpo_ext.quality.checks.malformed import Malformed
from axolotl_dpo_ext.quality.checks.similarity import Similarity

__all__ = ["Identical", "LengthRatio", "Malformed", "Similarity"]
