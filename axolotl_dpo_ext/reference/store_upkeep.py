"""What ``dpo-ref-cache`` does with stores: list, verify, prune, export."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from axolotl_dpo_ext.reference.durable import TEMPORARY_PREFIX, temporary_name
from axolotl_dpo_ext.reference.store import DamagedFile, ReferenceStore, StoreError
from axolotl_dpo_ext.reference.store_files import (
    IDENTITY_FILE,
    StoredRows,
    UnusableFileError,
    empty_rows,
    merge_rows,
    read_identity,
    read_shards,
    shard_names,
    shards_with,
)

DAY = 86_400
_STORE = re.compile(r"[0-9a-f]{32}")
_EXPORT_BATCH = 65_536
_LOST_IDENTITY = "it is missing, so nothing says what the values depend on; the next run that uses them writes it again"


@dataclass(frozen=True)
class StoreSummary:
    """What is in a store.

    Attributes:
        path: Its folder.
        model: The model that its identity names, ``""`` where it names none.
        rows: Number of sequences whose values can be used.
        size: Bytes of all its files.
        shards: Number of shards, damaged ones included.
        damaged: Files that are not used or missing, with the reasons.
        last_used: When a run last opened or extended it, in seconds since 1970.
    """

    path: Path
    model: str
    rows: int
    size: int
    shards: int
    damaged: tuple[DamagedFile, ...]
    last_used: float

    def as_json(self) -> dict[str, Any]:
        """Returns the summary for ``--json``."""
        return {
            "store": self.path.name,
            "model": self.model,
            "rows": self.rows,
            "bytes": self.size,
            "shards": self.shards,
            "last_used": self.last_used,
            "damaged": [{"file": str(file.path), "reason": file.reason} for file in self.damaged],
        }


@dataclass(frozen=True)
class Removal:
    """A file or store to remove.

    Attributes:
        path: What to remove.
        size: Its bytes.
        reason: Why.
    """

    path: Path
    size: int
    reason: str


def store_folders(root: Path) -> list[Path]:
    """Returns the folders of the stores under a root."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path for path in root.iterdir() if is_store(path))
    return []


def is_store(path: Path) -> bool:
    """Whether a folder is a store, by its name."""
    return bool(_STORE.fullmatch(path.absolute().name)) and path.is_dir()


def find_store(root: Path, prefix: str) -> Path:
    """Returns the folder of the one store whose name begins so.

    Raises:
        ValueError: None does, or several do.
    """
    if not prefix:
        raise ValueError("an empty name stands for no store")
    found = [path for path in store_folders(root) if path.name.startswith(prefix)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found or store_folders(root)) or "none"
        raise ValueError(f"{len(found)} stores under {root} begin with {prefix!r}; there are: {names}")
    return found[0]


def stores_of_weights(root: Path, weights: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the stores under a root whose values were computed with certain weights, and their identities.

    Args:
        root: The folder that holds the stores.
        weights: What stands under ``weights`` in an identity.
    """
    for path in store_folders(root):
        with contextlib.suppress(UnusableFileError):
            content = read_identity(path) or {}
            if content.get("identity", {}).get("weights") == weights:
                yield path, content["identity"]


def list_stores(root: Path) -> list[StoreSummary]:
    """Looks into every store under a root."""
    return [verify_store(path) for path in store_folders(root)]


def verify_store(path: Path) -> StoreSummary:
    """Reads every file of a store and says what is in it."""
    shards, damaged = read_shards(path, shard_names(path))
    merged, contradictory = merge_rows([empty_rows(), *shards.values()])
    for name in shards_with(shards, contradictory):
        damaged.append(DamagedFile(path / name, "it and another shard hold different values for one sequence"))
    content: Mapping[str, Any] | None = {}
    try:
        content = read_identity(path)
    except UnusableFileError as error:
        damaged.append(DamagedFile(path / IDENTITY_FILE, str(error), error.newer))
    if content is None and (shards or damaged):
        damaged.append(DamagedFile(path / IDENTITY_FILE, _LOST_IDENTITY))
    files = _files(path)
    return StoreSummary(
        path=path,
        model=str((content or {}).get("model", "")),
        rows=len(merged) - len(contradictory),
        size=sum(status.st_size for _, status in files),
        shards=len(shard_names(path)),
        damaged=tuple(damaged),
        last_used=max((status.st_mtime for _, status in files), default=path.stat().st_mtime),
    )


def plan_pruning(
    root: Path, stores: Sequence[Path] = (), unused_days: float | None = None, damaged: bool = False
) -> list[Removal]:
    """Says what pruning would remove; files that crashed writers left behind are always among it.

    Args:
        root: The folder of the stores.
        stores: Whole stores to remove; together with either of the others, the stores to which those apply.
        unused_days: Remove stores that no run opened for so many days.
        damaged: Remove damaged files and those of other stores; those of a newer version stay, and what is no file of a
            store.
    """
    chosen = list(stores) or store_folders(root)
    removals: list[Removal] = []
    for path in chosen:
        if stores and unused_days is None and not damaged:
            removals.append(Removal(path, _size(path), "named"))
            continue
        summary = verify_store(path)
        unused = (time.time() - summary.last_used) / DAY
        if unused_days is not None and unused >= unused_days:
            removals.append(Removal(path, summary.size, f"unused for {unused:.0f} days"))
        elif damaged:
            removals += [
                Removal(file.path, _size(file.path), file.reason)
                for file in summary.damaged
                if not file.newer and file.path.exists()
            ]
    whole = {removal.path for removal in removals}
    return removals + [left for left in _left_behind(root) if left.path.parent not in whole]


def remove(removals: Iterable[Removal]) -> None:
    """Removes what pruning planned. A store is gone at once, not file by file.

    Raises:
        StoreError: Something could not be removed.
    """
    for removal in removals:
        try:
            _remove(removal.path)
        except OSError as error:
            raise StoreError(
                f"{removal.path} can't be removed\n    why: {type(error).__name__}: {error}\n"
                "    fix: remove it yourself, with the rights of the user who owns it"
            ) from error


def export_store(path: Path, file: Path) -> tuple[int, list[DamagedFile]]:
    """Writes the rows of a store, sorted by key, as columns ``key`` (hexadecimal), ``logp`` and ``tokens``.

    Args:
        path: The store's folder.
        file: A ``.parquet`` or ``.jsonl`` file; replaced if it exists.

    Returns:
        The number of rows, and the store's files that are not used and so not exported.

    Raises:
        ValueError: The file's suffix is another.
        StoreError: The store can't be used.
        OSError: The file can't be written.
    """
    writers = {".parquet": _write_parquet, ".jsonl": _write_jsonl}
    if file.suffix not in writers:
        raise ValueError(f"{file} ends in {file.suffix!r}; choose from: {', '.join(writers)}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent} for {file.name}; create it, or name another")
    store = ReferenceStore.at(path)
    rows = store.rows()
    temporary = file.with_name(temporary_name())
    try:
        with temporary.open("xb") as output:
            writers[file.suffix](rows, output)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows), store.damaged


def _batches(rows: StoredRows) -> Iterator[dict[str, list[Any]]]:
    for start in range(0, len(rows), _EXPORT_BATCH):
        part = slice(start, start + _EXPORT_BATCH)
        yield {
            "key": [key.tobytes().hex() for key in rows.keys[part]],
            "logp": rows.logps[part].tolist(),
            "tokens": rows.tokens[part].tolist(),
        }


def _write_jsonl(rows: StoredRows, output: IO[bytes]) -> None:
    for batch in _batches(rows):
        for values in zip(*batch.values(), strict=True):
            output.write(json.dumps(dict(zip(batch, values, strict=True))).encode() + b"\n")


def _write_parquet(rows: StoredRows, output: IO[bytes]) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("key", pyarrow.string()), ("logp", pyarrow.float32()), ("tokens", pyarrow.int32())])
    with parquet.ParquetWriter(output, schema) as writer:
        for batch in _batches(rows):
            writer.write_table(pyarrow.table(batch, schema))


def _files(path: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for file in path.iterdir() if path.is_dir() else [path]:
        # Another process may remove one meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found.append((file, file.stat()))
    return found


def _size(path: Path) -> int:
    return sum(status.st_size for _, status in _files(path))


def _left_behind(root: Path) -> Iterator[Removal]:
    """Finds temporary files of writers that were killed, old enough that none is still at work."""
    for folder in [root, root / "weights", *store_folders(root)]:
        for path, status in _files(folder) if folder.is_dir() else []:
            if path.name.startswith(TEMPORARY_PREFIX) and time.time() - status.st_mtime > DAY:
                yield Removal(path, _size(path), "left behind by a process that was killed")


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # Renamed first: nobody reads half a store, and what a crash leaves is found by the next pruning.
    doomed = path.with_name(temporary_name())
    path.rename(doomed)
    shutil.rmtree(doomed)
