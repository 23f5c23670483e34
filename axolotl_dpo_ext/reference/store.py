"""Stored reference log-probabilities: one folder for each identity, append-only shards named by their content.

``<root>/<identity digest>/identity.json`` says what the values depend on. Each ``shard-<sha256>.safetensors`` holds
rows: a sequence's 16-byte content key, the log-probability of its answer, the answer's number of tokens. A shard's
name is its checksum, so a changed or missing byte anywhere in it shows, writers never touch each other's files, and
there is no journal that could be damaged. No locks: a shard appears whole, by a rename.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axolotl_dpo_ext.reference.durable import canonical_json, sealed, temporary_name, write_whole
from axolotl_dpo_ext.reference.store_files import (
    FORMAT,
    IDENTITY_FILE,
    DamagedFile,
    StoredRows,
    UnusableFileError,
    as_sortable,
    empty_rows,
    fault_of,
    identity_digest,
    key_text,
    merge_rows,
    package_version,
    read_identity,
    read_shards,
    shard_file,
    shard_names,
    shards_with,
)
from axolotl_dpo_ext.vocabulary import Problem, RunStopped

__all__ = ["STORE_VARIABLE", "DamagedFile", "ReferenceStore", "StoreError", "StoredRows", "store_root"]

logger = logging.getLogger(__name__)

STORE_VARIABLE = "AXOLOTL_DPO_EXT_REFERENCE_STORE"
STORE_SETTING = "dpo_ext.reference.store"


class StoreError(RunStopped):
    """A store cannot be used or written. The message says which file, why, and what to change."""


def store_root(setting: str | Path | None = None) -> Path:
    """Returns the folder that holds the stores.

    Args:
        setting: What stands under ``dpo_ext.reference.store``; it goes before the environment variable
            ``AXOLOTL_DPO_EXT_REFERENCE_STORE``, and that before ``dpo_reference`` beside the Hugging Face cache.
    """
    chosen = setting or os.environ.get(STORE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "dpo_reference"


def obstacle(folder: Path) -> tuple[str, str] | None:
    """Returns why a folder can neither be read nor made, and what to change; ``None`` where it can.

    One that can be read and not written is none: it may hold all that a run needs.

    Args:
        folder: A folder that may not exist yet.
    """
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        return f"{nearest} is there, and is no folder", "remove or rename it"
    if nearest == folder:
        return None if os.access(folder, os.R_OK | os.X_OK) else (f"{folder} can't be read", "set the rights there")
    if os.access(nearest, os.W_OK | os.X_OK):
        return None
    return f"it does not exist, and {nearest} can't be written", "create it, or set the rights there"


def root_problem(setting: str | None) -> Problem | None:
    """Returns the problem of a folder in which no store can be, ``None`` where one can.

    Args:
        setting: What stands under ``dpo_ext.reference.store``.
    """
    root = store_root(setting)
    if (found := obstacle(root)) is None:
        return None
    return Problem(
        setting=STORE_VARIABLE if not setting and os.environ.get(STORE_VARIABLE) else STORE_SETTING,
        found=f"{root}, where no reference store can be",
        reason=found[0],
        fix=f"{found[1]}, or name another folder with `{STORE_SETTING}` or the environment variable {STORE_VARIABLE}",
    )


class ReferenceStore:
    """The stored values of one identity. Nothing is created before the first write.

    Opening shards whose ``identity.json`` is lost writes that file again.

    Where several shards hold a sequence, the first in the order of their names gives the value, so that every
    process that reads the same shards uses the same values; a value once looked up does not change. Differences
    as other batches or devices make them are expected. Larger ones, or two different token counts, mean that one of
    the shards is wrong and nobody can tell which: reading then raises, naming both.

    Args:
        root: The folder that holds the stores.
        identity: What the values depend on; it decides the folder.
        model: The reference model's name, for people. Not part of the identity: it may be moved or renamed.

    Attributes:
        path: The store's folder.
        identity: What its values depend on.
        damaged: Files that were found and not used. Their rows count as absent, so they are computed again.

    Raises:
        StoreError: The folder's ``identity.json`` is damaged, foreign or of a newer version, or its shards contradict
            each other.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], model: str = "") -> None:
        self._model = model
        self.identity: dict[str, Any] = json.loads(canonical_json(identity))
        self.path = Path(root) / identity_digest(identity)
        self.damaged: list[DamagedFile] = []
        self._index = empty_rows()
        self._pending: list[StoredRows] = []
        self._read: set[str] = set()
        _check_identity(self.path)
        self.refresh()
        # A folder that can only be read is used as it is.
        with contextlib.suppress(OSError):
            if shard_names(self.path):
                self._create()  # where somebody removed the file that says what the values depend on
            os.utime(self.path / IDENTITY_FILE)  # "last used", for pruning

    @classmethod
    def at(cls, path: Path) -> ReferenceStore:
        """Opens the store in a folder, with the identity that it says it has."""
        content = _check_identity(path)
        if content is None:
            raise _stop(
                f"the reference store {path}",
                f"it has no {IDENTITY_FILE}, so nothing says what its values depend on",
                "start a run that uses it, which writes the file again, or remove the store",
            )
        return cls(path.parent, content["identity"], content.get("model", ""))

    def __len__(self) -> int:
        """Returns the number of sequences stored."""
        return len(self.rows())

    def rows(self) -> StoredRows:
        """Returns all rows, sorted by key."""
        if self._pending:
            merged, contradictory = merge_rows([self._index, *self._pending])
            if len(contradictory):
                raise self._contradiction(contradictory)
            self._index = merged
            self._pending = []
        return self._index

    def lookup(self, keys: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.bool_]]:
        """Looks sequences up.

        Args:
            keys: Content keys, shape ``(N, 16)``.

        Returns:
            Log-probabilities, token counts, and which were found; NaN and 0 where not.
        """
        wanted = as_sortable(keys)
        stored = self.rows()
        logps = np.full(len(wanted), np.nan, np.float32)
        tokens = np.zeros(len(wanted), np.int32)
        if not len(stored):
            return logps, tokens, np.zeros(len(wanted), np.bool_)
        sortable = as_sortable(stored.keys)
        place = np.minimum(np.searchsorted(sortable, wanted), len(stored) - 1)
        found = sortable[place] == wanted
        logps[found] = stored.logps[place[found]]
        tokens[found] = stored.tokens[place[found]]
        return logps, tokens, found

    def refresh(self) -> None:
        """Reads the shards that other processes wrote since; none is read twice."""
        try:
            # A damaged one is tried again: another process may have written it anew.
            names = [name for name in shard_names(self.path) if name not in self._read]
        except OSError as error:
            raise _stop(
                f"the reference store {self.path} can't be read",
                f"{type(error).__name__}: {error}",
                f"set the rights there, or name another folder with `{STORE_SETTING}` or {STORE_VARIABLE}",
            ) from error
        shards, damaged = read_shards(self.path, names)
        for file in damaged:
            if file not in self.damaged:
                logger.warning("%s is not used: %s. Its rows are computed again.", file.path, file.reason)
        self.damaged = damaged
        self._read.update(shards)
        self._pending += shards.values()
        self.rows()

    def append(self, rows: StoredRows) -> Path:
        """Stores rows as one shard, safely on the disk when this returns. The same rows make the same file.

        Args:
            rows: The rows, in any order.

        Returns:
            The shard; for no rows the store's folder, in which nothing is then written.

        Raises:
            StoreError: It could not be written, or a value can't be right. What was stored stays valid.
        """
        if not len(rows):
            return self.path
        rows = _as_stored(rows)
        fault = fault_of(rows)
        rows, contradictory = merge_rows([rows])
        if not fault and len(contradictory):
            fault = f"row {key_text(contradictory[0])} is there twice, with different values"
        if fault:
            raise _stop(
                f"values for the reference store {self.path}",
                fault,
                "look for the cause in the reference model or its dtype; none of these rows was stored",
            )
        name, data = shard_file(rows, self.path.name)
        path = self.path / name
        try:
            self._create()
            # Also where the name exists: what has that name may be damaged, and this is what it should be.
            write_whole(path, data)
        except OSError as error:
            raise self._not_written(error) from error
        self.damaged = [file for file in self.damaged if file.path != path]
        self._read.add(path.name)
        self._pending.append(rows)
        return path

    @contextlib.contextmanager
    def marked(self) -> Iterator[str]:
        """Creates the store and, for a while, a file in it: to fail before hours of computing rather than after.

        Yields:
            The file's name, for ``check_shared``.

        Raises:
            StoreError: It can't be written; the message names the folder, the reason and the setting.
        """
        mark = self.path / temporary_name()
        try:
            try:
                self._create()
                mark.write_bytes(bytes(4096))
            except OSError as error:
                raise self._not_written(error) from error
            yield mark.name
        finally:
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)

    def check_shared(self, marks: Sequence[str]) -> None:
        """Checks that other processes write where this one reads.

        Args:
            marks: The names of the files of all processes, in the order of their ranks.

        Raises:
            StoreError: Some of them are elsewhere: nodes with a folder of the same name each.
        """
        unseen = [rank for rank, mark in enumerate(marks) if not (self.path / mark).exists()]
        if unseen:
            raise _stop(
                f"the reference store {self.path} is not one folder for all {len(marks)} processes: on "
                f"{platform.node()} nothing is seen of what processes {', '.join(map(str, unseen))} write",
                "each process computes a share of the values and reads those of the others from the store",
                f"name a folder on a file system that all nodes share with `{STORE_SETTING}` or {STORE_VARIABLE}, or "
                "run `dpo-precompute` on one node and copy the folder to the others",
            )

    def _create(self) -> None:
        path = self.path / IDENTITY_FILE
        if path.exists():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "package": package_version(),
            "model": self._model,
            "identity": self.identity,
        }
        write_whole(path, sealed(content))

    def _not_written(self, error: OSError) -> StoreError:
        _, fix = obstacle(self.path) or ("", "make room or set the rights there")
        return _stop(
            f"the reference store {self.path} can't be written",
            f"{type(error).__name__}: {error}",
            f"{fix}, or name another folder with `{STORE_SETTING}` or the environment "
            f"variable {STORE_VARIABLE}; what is stored already stays valid",
        )

    def _contradiction(self, keys: NDArray[Any]) -> StoreError:
        # Read again: which row came from which shard is not kept, as nobody else asks for it.
        shards, _ = read_shards(self.path, shard_names(self.path))
        names = shards_with(shards, keys)
        return _stop(
            f"the reference store {self.path}: {', '.join(names)}",
            f"they hold different values for the sequence {key_text(keys[0])} ({len(keys)} in all), more than another "
            "batch or device would explain, so at least one of them is wrong",
            f"{_prune(self.path)} removes these files; their rows are then computed again",
        )


def _stop(found: str, reason: str, fix: str) -> StoreError:
    return StoreError(f"{found}\n    why: {reason}\n    fix: {fix}")


def _prune(store: Path) -> str:
    return f"`axolotl dpo-ref-cache prune --root {store.parent} --store {store.name} --damaged --yes`"


def _check_identity(path: Path) -> dict[str, Any] | None:
    try:
        return read_identity(path)
    except UnusableFileError as error:
        raise _unusable(path / IDENTITY_FILE, error) from None


def _unusable(path: Path, error: UnusableFileError) -> StoreError:
    remove = f"{_prune(path.parent)} removes this file; no computed value is lost with it"
    update = f"update the package, or name another folder with `{STORE_SETTING}` or {STORE_VARIABLE}"
    return _stop(f"{path} of the reference store", str(error), update if error.newer else remove)


def _as_stored(rows: StoredRows) -> StoredRows:
    """Returns the rows in the types of the store, if their shapes fit together."""
    converted = StoredRows(
        np.asarray(rows.keys), np.asarray(rows.logps).astype(np.float32), np.asarray(rows.tokens).astype(np.int32)
    )
    shape = (len(as_sortable(converted.keys)),)
    if converted.logps.shape != shape or converted.tokens.shape != shape:
        raise ValueError(f"{shape[0]} keys, but logps {converted.logps.shape} and tokens {converted.tokens.shape}")
    return converted
