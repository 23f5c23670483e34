"""What the tests of the store share: an identity, rows, and stores of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from axolotl_dpo_ext.reference.store import (
    ReferenceStore,
    StoredRows,
)

IDENTITY = {
    "model": {"name": "lab/llama", "weights": "ab" * 32},
    "max_length": 512,
    "ld_alpha": None,
    "dtype": "bfloat16",
}


def some_rows(count: int, seed: int = 0) -> StoredRows:
    random = np.random.default_rng(seed)
    return StoredRows(
        keys=random.integers(0, 256, (count, 16), dtype=np.uint8),
        logps=(-100 * random.random(count)).astype(np.float32),
        tokens=random.integers(1, 500, count).astype(np.int32),
    )


def a_store(root: Path, *seeds: int, count: int = 8) -> ReferenceStore:
    store = ReferenceStore(root, IDENTITY)
    for seed in seeds:
        store.append(some_rows(count, seed))
    return store


def held(store: ReferenceStore, rows: StoredRows) -> bool:
    """Whether the store returns all of the rows with their values, or none of them."""
    logps, tokens, found = store.lookup(rows.keys)
    assert found.all() == found.any()
    assert not found.any() or ((logps == rows.logps).all() and (tokens == rows.tokens).all())
    return bool(found.all())
