"""What is stored already under a run's weights is counted where that is quick to tell."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axolotl_dpo_ext.reference.run_keys import KNOWN_WEIGHTS
from axolotl_dpo_ext.reference.store import ReferenceStore
from axolotl_dpo_ext.reference.store_files import StoredRows
from axolotl_dpo_ext.reference.weights import weights_digest
from tests.reference.checkpoints import looked_at, saved

pytestmark = pytest.mark.usefixtures("store", "undistributed")


def store_rows(root: Path, weights: str, rows: int, **more: Any) -> None:
    keys = np.random.default_rng(0).integers(0, 256, (rows, 16), np.uint8)
    opened = ReferenceStore(root, {"weights": weights, "adapter": None, "attention": "sdpa", **more})
    opened.append(StoredRows(keys, np.full(rows, -5, np.float32), np.ones(rows, np.int32)))


def test_rows_are_counted_that_are_stored_for_the_same_weights(tmp_path: Path, store: Path):
    saved(tmp_path / "model")
    assert looked_at(tmp_path / "model").stored_rows == 0
    weights = f"files:{weights_digest(str(tmp_path / 'model'))}"
    store_rows(store, weights, 7)
    store_rows(store, weights, 5, dtype="torch.bfloat16", attention="eager")
    store_rows(store, weights, 2, autocast="torch.bfloat16")
    store_rows(store, weights, 100, ld_alpha=0.5)
    store_rows(store, weights, 100, adapter="of a continued adapter")
    store_rows(store, "files:of other weights", 100)
    assert looked_at(tmp_path / "model").stored_rows == 7
    assert looked_at(tmp_path / "model", bf16=True).stored_rows == 7
    assert looked_at(tmp_path / "model", bf16=True, attn_implementation="eager").stored_rows == 5
    assert looked_at(tmp_path / "model", adapter="lora").stored_rows == 7
    assert looked_at(tmp_path / "model", **{KNOWN_WEIGHTS: False}).stored_rows == 0
    assert looked_at(tmp_path / "model", adapter="lora", lora_model_dir="sft").stored_rows == 0
    elsewhere = {"dpo_ext": {"reference": {"strategy": "auto", "store": str(tmp_path / "another")}}}
    assert looked_at(tmp_path / "model", **elsewhere).stored_rows == 0
    for scalar in (True, {"reference": "auto"}, {"reference": None}):
        assert looked_at(tmp_path / "model", dpo_ext=scalar).stored_rows == 7


def test_a_large_checkpoint_is_not_hashed_to_decide(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    os.utime(file, (time.time() - 100,) * 2)
    monkeypatch.setattr("axolotl_dpo_ext.reference.stored_rows._HASHED_AT_ONCE", 0)
    hashed = []
    monkeypatch.setattr("axolotl_dpo_ext.reference.weights._hash", lambda path: hashed.append(path) or "0" * 64)
    monkeypatch.setattr("axolotl_dpo_ext.reference.weights._TIMESTAMP_SECONDS", -1e9)
    store_rows(store, "files:of other weights", 3)
    assert looked_at(tmp_path / "model").stored_rows == 0
    assert hashed == []
    # A run that stored its values has remembered the digest beside them.
    store_rows(store, f"files:{weights_digest(str(tmp_path / 'model'))}", 4)
    assert looked_at(tmp_path / "model").stored_rows == 4
    assert hashed == [file.resolve()], "once, by the run"


def test_a_damaged_store_does_not_keep_auto_from_deciding(tmp_path: Path, store: Path):
    saved(tmp_path / "model")
    store_rows(store, f"files:{weights_digest(str(tmp_path / 'model'))}", 4)
    (store / "nonsense").mkdir()
    (store / "nonsense" / "identity.json").write_bytes(b"\xff{")
    next(store.glob("*/shard-*")).write_bytes(b"short")
    assert looked_at(tmp_path / "model").stored_rows == 0
