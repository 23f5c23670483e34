"""The files of a store: what they hold, and how one that is damaged, foreign or of a newer version shows.

A shard is named by its checksum; the other files are JSON with a checksum inside.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from axolotl_dpo_ext.reference.durable import canonical_json, unsealed

FORMAT = 1
KEY_BYTES = 16
IDENTITY_FILE = "identity.json"

# Two honest computations of a sequence (another batch, another GPU, bfloat16) differ by less than one of these.
NOISE_RELATIVE = 0.05
NOISE_NATS = 1.0

_SHARD = re.compile(r"shard-([0-9a-f]{40})\.safetensors")
_METADATA_KEY = "dpo_reference"


class UnusableFileError(Exception):
    """A file of a store that can't be used.

    Attributes:
        newer: It is sound, but a newer version of the package wrote it.
    """

    def __init__(self, reason: str, newer: bool = False) -> None:
        super().__init__(reason)
        self.newer = newer


@dataclass(frozen=True)
class DamagedFile:
    """A file that was found in a store and not used.

    Attributes:
        path: The file.
        reason: Why it was not used.
        newer: It is not damaged: a newer version of the package wrote it.
    """

    path: Path
    reason: str
    newer: bool = False


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a store.

    Attributes:
        keys: Content keys, shape ``(N, 16)``.
        logps: Summed log-probabilities of the answers, shape ``(N,)``.
        tokens: Numbers of tokens of the answers, shape ``(N,)``.
    """

    keys: NDArray[np.uint8]
    logps: NDArray[np.float32]
    tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, which: NDArray[Any]) -> StoredRows:
        return StoredRows(self.keys[which], self.logps[which], self.tokens[which])


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Returns the name of an identity's folder."""
    return hashlib.sha256(canonical_json(identity)).hexdigest()[:32]


def empty_rows() -> StoredRows:
    """Returns no rows."""
    return StoredRows(np.zeros((0, KEY_BYTES), np.uint8), np.zeros(0, np.float32), np.zeros(0, np.int32))


def as_sortable(keys: NDArray[np.uint8]) -> NDArray[Any]:
    """Returns keys of shape ``(N, 16)`` as N byte strings, which numpy sorts and searches faster than anything else."""
    keys = np.ascontiguousarray(keys)
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise ValueError(f"keys must be uint8 of shape (N, {KEY_BYTES}), not {keys.dtype} of shape {keys.shape}")
    return keys.view(f"S{KEY_BYTES}").reshape(-1)


def merge_rows(parts: Sequence[StoredRows]) -> tuple[StoredRows, NDArray[np.uint8]]:
    """Sorts rows by key and keeps the first for each.

    Returns:
        The rows, and the keys whose values differ by more than noise.
    """
    rows = StoredRows(
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.logps for part in parts]),
        np.concatenate([part.tokens for part in parts]),
    )
    # Stable: of equal keys the first given stays first.
    rows = rows[np.argsort(as_sortable(rows.keys), kind="stable")]
    sortable = as_sortable(rows.keys)
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = sortable[1:] != sortable[:-1]
    if is_first.all():
        return rows, rows.keys[:0]
    first = rows[is_first]
    again = rows[~is_first]
    kept = first[np.cumsum(is_first)[~is_first] - 1]
    apart = np.abs(again.logps - kept.logps)
    scale = np.maximum(np.abs(again.logps), np.abs(kept.logps))
    contradicts = (again.tokens != kept.tokens) | (apart > np.maximum(NOISE_NATS, NOISE_RELATIVE * scale))
    return first, np.unique(again.keys[contradicts], axis=0)


def fault_of(rows: StoredRows) -> str:
    """Returns what is wrong with the first row that can't be right, ``""`` where there is none."""
    wrong = np.flatnonzero(~np.isfinite(rows.logps) | (rows.tokens <= 0))
    if not len(wrong):
        return ""
    row = int(wrong[0])
    return f"row {key_text(rows.keys[row])} has log-probability {rows.logps[row]} over {rows.tokens[row]} tokens"


def shard_names(path: Path) -> list[str]:
    """Returns the names of a store's shards, sorted."""
    try:
        return sorted(name for name in os.listdir(path) if _SHARD.fullmatch(name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_shards(path: Path, names: Iterable[str]) -> tuple[dict[str, StoredRows], list[DamagedFile]]:
    """Reads shards of a store.

    Returns:
        The rows of those that are sound, and the others. One that somebody removed meanwhile is neither.
    """
    sound: dict[str, StoredRows] = {}
    damaged: list[DamagedFile] = []
    for name in names:
        try:
            sound[name] = read_shard(path / name, path.name)
        except FileNotFoundError:
            continue
        except UnusableFileError as error:
            damaged.append(DamagedFile(path / name, str(error), error.newer))
        except OSError as error:
            damaged.append(DamagedFile(path / name, f"it can't be read: {error}"))
    return sound, damaged


def read_shard(path: Path, digest: str) -> StoredRows:
    """Reads one shard.

    Args:
        path: The file.
        digest: The digest of the identity that it must belong to.

    Raises:
        UnusableFileError: It is damaged, foreign or of a newer version.
        OSError: It can't be read.
    """
    data = path.read_bytes()
    match = _SHARD.fullmatch(path.name)
    if match is None or match[1] != _checksum(data):
        raise UnusableFileError("damaged: its content does not have the checksum in its name")
    try:
        description = _description(data)
        _check_origin(description, digest)
        tensors = load(data)
        rows = StoredRows(tensors["keys"], tensors["logps"], tensors["tokens"])
        return _sound(rows)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UnusableFileError(f"damaged: it is no shard ({error})") from None


def shards_with(shards: Mapping[str, StoredRows], keys: NDArray[np.uint8]) -> list[str]:
    """Returns the names of the shards that hold any of the keys."""
    wanted = as_sortable(keys)
    return [name for name, rows in shards.items() if np.isin(as_sortable(rows.keys), wanted).any()]


def shard_file(rows: StoredRows, digest: str) -> tuple[str, bytes]:
    """Returns the name and the content of a shard: the same for the same rows.

    Args:
        rows: Rows, sorted by key.
        digest: The digest of the identity that they belong to.
    """
    # One metadata entry: safetensors writes several in a random order.
    metadata = {_METADATA_KEY: canonical_json({"format": FORMAT, "store": digest}).decode()}
    data = save({"keys": rows.keys, "logps": rows.logps, "tokens": rows.tokens}, metadata)
    return f"shard-{_checksum(data)}.safetensors", data


def read_identity(path: Path) -> dict[str, Any] | None:
    """Reads what a store's folder says about itself, ``None`` where it says nothing.

    Raises:
        UnusableFileError: The file is damaged, foreign or of a newer version.
    """
    try:
        data = (path / IDENTITY_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UnusableFileError(f"it can't be read: {error}") from None
    content = _unsealed(data)
    if identity_digest(content.get("identity", {})) != path.name:
        raise UnusableFileError("foreign: its identity does not belong to the folder it is in")
    return content


def _unsealed(data: bytes) -> dict[str, Any]:
    """Returns the content of a sealed file of this format or an older one."""
    # The version first: a newer one may seal in another way.
    try:
        version = json.loads(data.decode())["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    _check_format(version)
    try:
        return unsealed(data)
    except ValueError as error:
        raise UnusableFileError(f"damaged: {error}") from None


def _check_format(version: Any) -> None:
    if isinstance(version, int) and version > FORMAT:
        raise _newer(version)


def _newer(version: int) -> UnusableFileError:
    return UnusableFileError(f"its format version is {version}; {package_version()} knows up to {FORMAT}", newer=True)


def _check_origin(description: Mapping[str, Any], digest: str) -> None:
    _check_format(description["format"])
    if description["store"] != digest:
        raise UnusableFileError(f"foreign: it belongs to the store {description['store']}")


def _description(data: bytes) -> dict[str, Any]:
    """Returns what a shard says about itself. Its header is JSON after its length in eight bytes."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length].decode())
    description = json.loads(header["__metadata__"][_METADATA_KEY])
    if not isinstance(description, dict):
        raise ValueError("its metadata is no mapping")
    return description


def _sound(rows: StoredRows) -> StoredRows:
    """Returns the rows of a shard as they are, if they are as ``append`` writes them."""
    types = [values.dtype.name for values in (rows.keys, rows.logps, rows.tokens)]
    shapes = {rows.logps.shape, rows.tokens.shape, (len(as_sortable(rows.keys)),)}
    if types != ["uint8", "float32", "int32"] or len(shapes) != 1:
        raise ValueError("its tensors have other types or shapes")
    if fault := fault_of(rows):
        raise ValueError(fault)
    return rows


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:40]


def key_text(key: NDArray[np.uint8]) -> str:
    """Returns a key as people see it."""
    return key.tobytes().hex()


def package_version() -> str:
    """Returns what is written into a store as its author."""
    from axolotl_dpo_ext import __version__

    return f"axolotl-dpo-ext {__version__}"
