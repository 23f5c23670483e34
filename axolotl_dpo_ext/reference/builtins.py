"""The pack's own reference strategies, registered through the same hook as anybody's."""

from __future__ import annotations

from axolotl_dpo_ext.hookspecs import hookimpl
from axolotl_dpo_ext.reference.strategies import (
    AdapterStrategy,
    CpuOffloadStrategy,
    GpuStrategy,
    PrecomputedStrategy,
    ReferenceStrategy,
)


@hookimpl
def reference_strategies() -> list[ReferenceStrategy]:
    """Registers ``gpu``, ``adapter``, ``cpu_offload`` and ``precomputed``."""
    return [GpuStrategy(), AdapterStrategy(), CpuOffloadStrategy(), PrecomputedStrategy()]
