"""The pack's own checks and embedder, registered through the same hooks as a third party's."""

from __future__ import annotations

from axolotl_dpo_ext.hookspecs import hookimpl
from axolotl_dpo_ext.quality import checks
from axolotl_dpo_ext.quality.base import Check, Embedder
from axolotl_dpo_ext.quality.embedders import LexicalEmbedder


@hookimpl
def pair_checks() -> list[Check]:
    """Returns the built-in checks in the order of tables: form, the two answers, the whole set, what else is known."""
    return [
        checks.Malformed(),
        checks.DoubledBos(),
        checks.Truncated(),
        checks.Identical(),
        checks.SameTokens(),
        checks.LengthRatio(),
        checks.Similarity(),
        checks.MinimalEdit(),
        checks.Duplicate(),
        checks.Contradiction(),
        checks.Leakage(),
        checks.LabelNoise(),
        checks.Tie(),
        checks.ReferenceLikelihood(),
    ]


@hookimpl
def embedders() -> list[Embedder]:
    """Returns the built-in embedder."""
    return [LexicalEmbedder()]
