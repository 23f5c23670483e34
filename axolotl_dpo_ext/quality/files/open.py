"""Opens a preference file by its suffix, or by its content where the suffix leaves that open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from axolotl_dpo_ext.quality.files.csv_rows import CsvFile
from axolotl_dpo_ext.quality.files.json_rows import is_lines, line_rows, text_rows
from axolotl_dpo_ext.quality.files.sources import CHUNK_ROWS, ArrowSource, RowSource, Source, damaged
from axolotl_dpo_ext.quality.files.streams import COMPRESSIONS, Row, UnusableFileError, data_suffix

_TEXTS = (".jsonl", ".json", ".csv", ".tsv")
_SUFFIXES = (*_TEXTS, ".parquet", ".arrow")


def open_source(path: Path) -> Source:
    """Returns a file's columns and access to its rows.

    Raises:
        UnusableFileError: There is no such file, it is of no known kind, damaged or empty, or it has no pairs.
    """
    if path.is_dir():
        return _saved_folder(path)
    if not path.exists():
        raise UnusableFileError("no such file", "there is nothing at this path", "correct the path")
    suffix = data_suffix(path)
    if suffix not in _SUFFIXES or (suffix not in _TEXTS and path.suffix.lower() in COMPRESSIONS):
        known = f"{', '.join(_SUFFIXES)}, and {' or '.join(COMPRESSIONS)} behind {', '.join(_TEXTS)}"
        raise UnusableFileError(
            f"a file with the suffix {path.suffix!r}", f"only these can be read: {known}", "convert or rename it"
        )
    if not path.stat().st_size:
        raise UnusableFileError("0 bytes", "an empty file has no pairs", "write or copy it again, or leave it out")
    if suffix in (".parquet", ".arrow"):
        return _arrow_source(path, _parquet_tables if suffix == ".parquet" else _ipc_tables)
    if suffix in (".csv", ".tsv"):
        return RowSource(path, "line", CsvFile(path).rows)
    return RowSource(path, *_json_rows(path))


def unreadable_rows(path: Path) -> list[str]:
    """Returns what is wrong with the rows of a JSON file that cannot be read, whatever its columns are."""
    try:
        unit, rows = _json_rows(path)
        return [f"{path.name}, {unit} {row.number}: {row.fault}" for row in rows() if row.fault]
    except UnusableFileError as error:
        return [f"{path.name}: {error}"]


def _json_rows(path: Path) -> tuple[str, Callable[[], Iterator[Row]]]:
    """Returns what a row of a JSON file is called, and what yields its rows."""
    if data_suffix(path) == ".jsonl" or is_lines(path):
        return "line", partial(line_rows, path)
    return "row", partial(text_rows, path)


def _arrow_source(path: Path, read: Any) -> ArrowSource:
    from datasets import Features

    tables = partial(_guarded, path, read)
    schema = next(tables()).schema
    try:
        return ArrowSource(path, Features.from_arrow_schema(_plain(schema)), tables)
    except (ValueError, NotImplementedError) as error:
        reason = f"datasets cannot hold it: {error}"
        raise UnusableFileError(f"columns of types {schema.types}", reason, "convert or remove that column") from error


def _plain(schema: pa.Schema) -> pa.Schema:
    from axolotl_dpo_ext.quality.files.types import plain_type

    return pa.schema([field.with_type(plain_type(field.type)) for field in schema], schema.metadata)


def _guarded(path: Path, read: Any) -> Iterator[pa.Table]:
    """Yields a file's tables, first an empty one; errors of pyarrow become ours."""
    try:
        yield from read(path)
    except (pa.ArrowException, OSError) as error:
        raise damaged(error) from error


def _parquet_tables(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        yield pa.Table.from_batches([], file.schema_arrow)
        for batch in file.iter_batches(CHUNK_ROWS):
            yield pa.Table.from_batches([batch])


def _ipc_tables(path: Path) -> Iterator[pa.Table]:
    with pa.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(file)
            batches = iter(reader)
        yield pa.Table.from_batches([], reader.schema)
        for batch in batches:
            for start in range(0, len(batch), CHUNK_ROWS):
                yield pa.Table.from_batches([batch.slice(start, CHUNK_ROWS)])


def _saved_folder(path: Path) -> ArrowSource:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it is no sound dataset of `save_to_disk`: {error}"
        raise UnusableFileError("a folder", reason, "name the files in it, or save the dataset again") from error
    if isinstance(dataset, DatasetDict):
        splits = list(dataset)
        if len(splits) != 1:
            raise UnusableFileError(
                f"a folder with the splits {', '.join(splits)}",
                "which of them is meant cannot be told",
                f"name the split's own folder, such as {path.name}/{splits[0] if splits else 'train'}",
            )
        dataset = dataset[splits[0]]
    return ArrowSource(path, dataset.features, partial(dataset.with_format("arrow").iter, CHUNK_ROWS))
