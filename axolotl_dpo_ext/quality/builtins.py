"""The pack's own checks and embedder, registered through the same hooks as a third party's."""

from __future__ import annotations

from axolotl_dpo_ext.hookspecs import hookimpl
from axolotl_dpo_ext.quality.base import Embedder, PairCheck
from axolotl_dpo_ext.quality.checks import Identical, LengthRatio, Malformed, Similarity
from axolotl_dpo_ext.quality.embedders import LexicalEmbedder


@hookimpl
def pair_checks() -> list[PairCheck]:
    """Returns the built-in checks; ``malformed`` comes first."""
    return [Malformed(), Identical(), LengthRatio(), Similarity()]


@hookimpl
def embedders() -> list[Embedder]:
    """Returns the built-in embedder."""
    return [LexicalEmbedder()]
