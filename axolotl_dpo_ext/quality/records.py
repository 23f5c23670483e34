"""Writes the records of an audit, as Parquet or as JSON lines, in one step."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECORDS_FILE = "dpo_quality_records.jsonl"

# Excerpts may hold half of a character that was cut in two upstream; it has no UTF-8.
_UTF8, _REPLACE = "utf-8", "replace"
_ROWS_AT_A_TIME = 10_000


def write_records(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes records under a name that ends in ``.parquet`` as Parquet, else as JSON lines.

    Raises:
        OSError: It could not be written. What was there before still is.
    """
    write = _write_parquet if path.suffix == ".parquet" else _write_lines
    with _replacing(path) as temporary:
        write(records, temporary)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_lines(records: Iterable[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding=_UTF8, errors=_REPLACE) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _write_parquet(records: Iterable[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            **{"row": pa.int64(), "source": pa.string(), "source_row": pa.int64(), "check": pa.string()},
            **{"score": pa.float64(), "threshold": pa.float64(), "matched_row": pa.int64(), "action": pa.string()},
            **dict.fromkeys(("reason", "prompt", "chosen", "rejected"), pa.string()),
        }
    )
    remaining = iter(records)
    with pq.ParquetWriter(path, schema) as writer:
        while some := list(itertools.islice(remaining, _ROWS_AT_A_TIME)):
            writer.write_table(pa.Table.from_pylist([_encodable(record) for record in some], schema))


def _encodable(record: dict[str, Any]) -> dict[str, Any]:
    return {key: v.encode(_UTF8, _REPLACE).decode() if isinstance(v, str) else v for key, v in record.items()}
