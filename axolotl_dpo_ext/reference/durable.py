"""Files that are there whole or not at all, and that tell when a byte of them has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


def temporary_name() -> str:
    """Returns a file name that no other process on any machine uses."""
    return f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that others, also after a crash, see all of it or what was there before.

    Raises:
        OSError: It could not be written. Nothing is left behind.
    """
    temporary = path.with_name(temporary_name())
    try:
        _write_and_sync(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _write_and_sync(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Some network file systems can't; what was written is then as durable as they make it.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def canonical_json(content: Any) -> bytes:
    """Returns the one JSON text of a content: sorted keys, no spaces, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sealed(content: Mapping[str, Any]) -> bytes:
    """Returns readable JSON of the content with a checksum of it."""
    checksum = hashlib.sha256(canonical_json(content)).hexdigest()
    return (json.dumps({**content, "checksum": checksum}, indent=2, ensure_ascii=False) + "\n").encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """Returns what ``sealed`` was given.

    Raises:
        ValueError: Something changed since.
    """
    try:
        content = json.loads(data.decode())
        checksum = content.pop("checksum")
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it has no checksum") from None
    # Written again rather than hashed again: so a space too many or a missing end shows as well.
    if sealed(content) != data:
        raise ValueError(f"it is not what was written with the checksum {checksum}")
    return content  # type: ignore[no-any-return]
