"""Writes rows to a file that is there whole or not at all."""

from __future__ import annotations

import codecs
import csv
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH_ROWS = 1000


def write_rows(dataset: Dataset, path: Path) -> None:
    """Writes a dataset by the path's suffix: ``.jsonl``, ``.parquet`` or ``.csv``.

    Others see the whole file or what was there before, also after a crash. JSON keeps all letters as they are;
    only half a surrogate pair is written as an escape, since UTF-8 has none.

    Args:
        dataset: The rows.
        path: Where to; a missing folder is made.

    Raises:
        ConfigurationError: The suffix is another, or a CSV file would have to hold conversations.
        OSError: It cannot be written. Nothing is left behind.
    """
    writers: dict[str, Callable[[Dataset, BinaryIO], None]] = {
        ".jsonl": _write_json_lines,
        ".parquet": _write_parquet,
        ".csv": _write_csv,
    }
    write = writers.get(path.suffix.lower())
    if write is None:
        reason = f"rows are written as {', '.join(writers)}"
        raise ConfigurationError([Problem(str(path), f"the suffix {path.suffix!r}", reason, "choose one of these")])
    if write is _write_csv and (nested := _nested(dataset)):
        found = f"columns that are no plain values: {', '.join(nested)}"
        raise ConfigurationError([Problem(str(path), found, "CSV holds only text and numbers", "write .jsonl instead")])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            write(dataset, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_json_lines(dataset: Dataset, file: BinaryIO) -> None:
    for row in dataset.with_format(None):
        # The backslash escape of half a surrogate pair is also its escape in JSON.
        file.write(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n")


def _write_parquet(dataset: Dataset, file: BinaryIO) -> None:
    dataset.to_parquet(file, batch_size=_BATCH_ROWS)


def _write_csv(dataset: Dataset, file: BinaryIO) -> None:
    writer = csv.writer(codecs.getwriter("utf-8")(file), lineterminator="\n")
    writer.writerow(dataset.column_names)
    for row in dataset.with_format(None):
        writer.writerow(row.values())


def _nested(dataset: Dataset) -> list[str]:
    from datasets import Value

    return [
        name
        for name, feature in dataset.features.items()
        if not isinstance(feature, Value) or feature.dtype == "binary"
    ]
