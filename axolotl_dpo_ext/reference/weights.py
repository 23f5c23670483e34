"""Which weights a checkpoint has, without hashing them at each start.

The hub names its large files by their SHA-256, and a local file is hashed once: its digest is remembered with its
path, size and times. Both give the same digest, so a download and a copy of it are the same weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from axolotl_dpo_ext.reference.durable import canonical_json, sealed, unsealed, write_whole
from axolotl_dpo_ext.reference.store import store_root
from axolotl_dpo_ext.vocabulary import RunStopped

logger = logging.getLogger(__name__)

# In the order in which transformers and PEFT look for them: the first that is there is loaded.
_MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_CHUNK = 2**24
_SHOW_PROGRESS_ABOVE = 10**9
# A file system may give two writes within this time the same timestamp; NFS and ext3 count in whole seconds.
_TIMESTAMP_SECONDS = 2.0


class WeightsNotFoundError(RunStopped, ValueError):
    """A checkpoint, or its weight files, are not on this machine."""


def weights_digest(model_name_or_path: str, revision: str | None = None, remember_in: Path | None = None) -> str:
    """Returns the identity of a checkpoint's weight files; their names and content alone decide it.

    Never uses the network: a hub checkpoint must have been downloaded.

    Args:
        model_name_or_path: A folder with a model or a PEFT adapter, or the name of one on the hub.
        revision: Branch, tag or commit of a checkpoint on the hub.
        remember_in: Folder for remembered digests. Default: the reference stores' root.

    Raises:
        WeightsNotFoundError: There is no such checkpoint here, or it has no weight files.
    """
    name = str(model_name_or_path)
    folder = Path(name) if os.path.isdir(name) else _snapshot(name, revision)
    memory = (remember_in or store_root()) / "weights"
    files = weight_files(folder)
    digests = sorted((file.relative_to(folder).as_posix(), _file_digest(file, memory)) for file in files)
    return hashlib.sha256(canonical_json(digests)).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold a checkpoint's weights.

    Args:
        folder: A folder with a model, an adapter, or both: an adapter beside a model is loaded with it.

    Raises:
        WeightsNotFoundError: There are none, or one that an index names is missing.
    """
    names = (*_named_in_config(folder), *_MODEL_FILES)
    found = [*_first_present(folder, names), *_first_present(folder, _ADAPTER_FILES)]
    if not found:
        raise WeightsNotFoundError(
            f"{folder} holds no weights\n    why: it has none of {', '.join(_MODEL_FILES + _ADAPTER_FILES)}\n"
            "    fix: name the folder of a checkpoint that `save_pretrained` wrote; a hub checkpoint must be "
            "downloaded completely first"
        )
    if missing := [file.name for file in found if not file.is_file()]:
        raise WeightsNotFoundError(
            f"{folder} lacks {', '.join(missing)}\n    why: the checkpoint's index names them\n"
            "    fix: copy or download the checkpoint again"
        )
    return found


def _named_in_config(folder: Path) -> list[str]:
    """Returns the file that a model's configuration names instead of the usual ones."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return []
    return [name] if isinstance(name, str) else []


def _first_present(folder: Path, names: tuple[str, ...]) -> list[Path]:
    present = next((folder / name for name in names if (folder / name).is_file()), None)
    if present is None:
        return []
    return _indexed(present) if present.suffix == ".json" else [present]


def _indexed(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsNotFoundError(
            f"{index} names no weight files\n    why: {type(error).__name__}: {error}\n"
            "    fix: copy or download the checkpoint again"
        ) from None


def _snapshot(name: str, revision: str | None) -> Path:
    """Returns the folder of a hub checkpoint in the local cache."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise WeightsNotFoundError(
            f"{name}{f' at revision {revision}' if revision else ''} is not on this machine\n"
            f"    why: it is neither a folder nor in the Hugging Face cache {constants.HF_HUB_CACHE}\n"
            "    fix: correct the name, or load the model once so that it is downloaded"
        ) from None


def _file_digest(path: Path, memory: Path) -> str:
    """Returns the SHA-256 of a file: the hub's, a remembered one, or a new one."""
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name
    facts = _facts(target)
    entry = memory / f"{hashlib.sha256(canonical_json(facts)).hexdigest()[:40]}.json"
    remembered = _remembered(entry, facts)
    if remembered:
        return remembered
    digest = _hash(target)
    # Written just now, or while it was hashed: another write might not show in the times.
    age = time.time() - max(facts["mtime_ns"], facts["ctime_ns"]) / 1e9
    if age > _TIMESTAMP_SECONDS and _facts(target) == facts:
        _remember(entry, {**facts, "sha256": digest})
    return digest


def _facts(path: Path) -> dict[str, Any]:
    """Returns what a file is recognised by. The ctime shows what a restored mtime hides (tar, rsync, images)."""
    status = path.stat()
    return {
        "path": str(path),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _remembered(entry: Path, facts: dict[str, Any]) -> str | None:
    try:
        content = unsealed(entry.read_bytes())
    except (OSError, ValueError):
        # Absent, or damaged: hashed again, and written anew.
        return None
    digest = content.pop("sha256", None)
    return digest if isinstance(digest, str) and content == facts else None


def _remember(entry: Path, content: dict[str, Any]) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_whole(entry, sealed(content))
    except OSError as error:
        logger.info("the digest of %s is not remembered, and it is hashed again next time: %s", content["path"], error)


def _hash(path: Path) -> str:
    from tqdm import tqdm

    digest = hashlib.sha256()
    size = path.stat().st_size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"hashing {path.name}", disable=size <= _SHOW_PROGRESS_ABOVE)
    with path.open("rb") as file, bar:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
