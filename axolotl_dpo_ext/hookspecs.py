"""Every hook a third-party package can implement, on one page.

A package adds strategies, checks, embedders or presets by decorating functions of these names with
``axolotl_dpo_ext.hookimpl`` and naming their module under the entry-point group ``axolotl_dpo_ext``.
The pack's own are registered in just the same way: see ``axolotl_dpo_ext/plugins.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from axolotl_dpo_ext.hardware import HardwarePreset
    from axolotl_dpo_ext.quality import Check, Embedder
    from axolotl_dpo_ext.reference import ReferenceStrategy

PROJECT = "axolotl_dpo_ext"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def reference_strategies() -> list[ReferenceStrategy]:  # type: ignore[empty-body]
    """Ways to obtain the reference log-probabilities; chosen by `dpo_ext: {reference: NAME}`."""


@hookspec
def pair_checks() -> list[Check]:  # type: ignore[empty-body]
    """Checks that score every preference pair; configured by `dpo_ext: {quality: …}`."""


@hookspec
def embedders() -> list[Embedder]:  # type: ignore[empty-body]
    """Text encoders behind similarity checks; chosen by `dpo_ext: {quality: {embedder: NAME}}`."""


@hookspec
def hardware_presets() -> list[HardwarePreset]:  # type: ignore[empty-body]
    """Named sets of Axolotl keys for a machine; chosen by `dpo_ext: {hardware: NAME}`."""
