"""How many answers have stored log-probabilities under a run's weights, as far as that is quick to tell."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from axolotl_dpo_ext.reference.checkpoint_size import tensor_shapes
from axolotl_dpo_ext.reference.json_files import read_json
from axolotl_dpo_ext.reference.run_keys import KNOWN_WEIGHTS, WEIGHTS_DTYPE, half_precision, has_fresh_adapter
from axolotl_dpo_ext.vocabulary import RunStopped

# Hashing more than this only to decide would cost more than the decision is worth.
_HASHED_AT_ONCE = 2**26
_HALF = ("torch.bfloat16", "torch.float16")


def stored_rows(config: Mapping[str, Any], folder: Path) -> int:
    """Counts stored answers that a run with these keys may use; 0 where telling would mean to hash much first.

    Whether they are answers of this run's pairs is not known before these are tokenized.

    Args:
        config: The run's keys.
        folder: The folder of its base model.
    """
    if config.get("adapter") and not has_fresh_adapter(config):
        return 0  # a continued adapter is part of the reference, and only loading it tells which it is
    if not config.get(KNOWN_WEIGHTS, True):
        return 0  # they will be identified by their values in memory
    from axolotl_dpo_ext.reference.store import store_root
    from axolotl_dpo_ext.reference.weights import weight_files, weights_digest

    root = store_root(_reference_setting(config, "store"))
    stores = list(_stores_of_files(root, config))
    if not stores:
        return 0
    try:
        if not all(_digest_is_cheap(file, root) for file in weight_files(folder)):
            return 0
        weights = f"files:{weights_digest(str(folder), remember_in=root)}"
    except (RunStopped, OSError, ValueError):
        return 0
    return sum(_rows_of(path) for path, stored in stores if stored == weights)


def _reference_setting(config: Mapping[str, Any], name: str) -> Any:
    """Returns a key of ``dpo_ext.reference``, where both are mappings."""
    found: Any = config.get("dpo_ext")
    for key in ("reference", name):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _stores_of_files(root: Path, config: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    for path in sorted(root.glob("*/identity.json")):
        content = read_json(path) or {}
        identity = content.get("identity")
        weights = identity.get("weights") if isinstance(identity, Mapping) else None
        if isinstance(identity, Mapping) and str(weights).startswith("files:") and _may_serve(identity, config):
            yield path.parent, str(weights)


def _may_serve(identity: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether nothing that the run's keys say speaks against it; loading the model tells the rest."""
    half = bool(identity.get("autocast")) or identity.get("dtype") in _HALF
    wanted = half_precision(config) or f"torch.{config.get(WEIGHTS_DTYPE)}".replace("torch.torch.", "torch.") in _HALF
    attention = config.get("attn_implementation") or identity.get("attention")
    return (
        half == wanted
        and identity.get("adapter") is None
        and identity.get("ld_alpha") == config.get("ld_alpha")
        and identity.get("attention") == attention
    )


def _digest_is_cheap(file: Path, root: Path) -> bool:
    """Whether ``weights_digest`` need not hash much: the file is small, its name is its digest, or it is remembered."""
    target = file.resolve()
    facts = target.stat()
    if facts.st_size <= _HASHED_AT_ONCE or (file.is_symlink() and target.parent.name == "blobs"):
        return True
    entries = ((read_json(entry) or {}) for entry in (root / "weights").glob("*.json"))
    return any(e.get("path") == str(target) and e.get("mtime_ns") == facts.st_mtime_ns for e in entries)


def _rows_of(store: Path) -> int:
    rows = 0
    for shard in store.glob("shard-*.safetensors"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, struct.error):
            rows += tensor_shapes(shard)["keys"][0]
    return rows
