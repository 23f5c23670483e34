"""One file of rows, and one file that is Arrow already: both give tables and what is wrong in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from axolotl_dpo_ext.quality.columns import PROMPT_COLUMNS
from axolotl_dpo_ext.quality.files.schema import Schema, Survey, find_answers, to_batch
from axolotl_dpo_ext.quality.files.streams import Row, UnusableFileError
from axolotl_dpo_ext.quality.files.types import merge, plain_type, to_array, to_values

if TYPE_CHECKING:
    from datasets import Features

CHUNK_ROWS = 1000
_CHUNK_BYTES = 1 << 24


class SchemaGrewError(Exception):
    """A file has more in it than its first rows showed: what was read has to be read again."""


class Part(NamedTuple):
    """Some rows of a file.

    Attributes:
        table: The rows.
        numbers: Number of each row in the file, as its messages name it.
        faults: What is wrong with rows, by position in the table.
    """

    table: pa.Table
    numbers: list[int] | range
    faults: dict[int, str]


class Source(ABC):
    """A file whose columns are known.

    Attributes:
        path: The file.
        unit: What a row is called in messages: ``line`` or ``row``.
        schema: The columns.
        features: Features of columns that are more than their Arrow type says, such as images.
    """

    path: Path
    unit: str = "row"
    schema: Schema
    features: Mapping[str, Any]

    @abstractmethod
    def parts(self, types: Mapping[str, pa.DataType]) -> Iterator[Part]:
        """Yields all rows in order.

        Args:
            types: Types to give the file's columns; they hold at least what the schema's types hold.

        Raises:
            UnusableFileError: The file is damaged.
            SchemaGrewError: The schema has changed.
        """


class RowSource(Source):
    """A file whose rows are read one by one. Its columns are at first those of its first rows."""

    def __init__(self, path: Path, unit: str, rows: Callable[[], Iterator[Row]]) -> None:
        self.path, self.unit, self.features = path, unit, {}
        self._rows = rows
        self._complete = False
        survey, fault = Survey(), ""
        empty = True
        for chunk in _chunks(rows()):
            survey.add([row.values for row in chunk])
            empty = False
            fault = fault or next((f"{unit} {row.number}: {row.fault}" for row in chunk if row.fault), "")
            if survey.schema.sides:
                break
        if empty:
            raise _empty()
        self.schema = survey.schema
        if not self.schema.sides:
            raise no_answers(survey.columns, fault)

    def parts(self, types: Mapping[str, pa.DataType]) -> Iterator[Part]:
        """Yields all rows in order; see the base class."""
        survey, grown = Survey(), False
        for chunk in _chunks(self._rows()):
            if not self._complete:
                survey.add([row.values for row in chunk])
                grown = grown or survey.schema != self.schema
            if not grown:
                table, faults = to_batch(chunk, self.schema, types)
                yield Part(table, [row.number for row in chunk], faults)
        self._complete = True
        if grown:
            self.schema = survey.schema
            raise SchemaGrewError


class ArrowSource(Source):
    """A file whose columns have types of their own."""

    def __init__(self, path: Path, features: Features, tables: Callable[[], Iterable[pa.Table]]) -> None:
        self.path = path
        arrow = features.arrow_schema
        types = {name: plain_type(arrow.field(name).type) for name in arrow.names}
        self.features = {name: feature for name, feature in features.items() if types[name] == arrow.field(name).type}
        answers = find_answers(dict.fromkeys(types, 1))
        if not answers:
            raise no_answers(list(types), "")
        prompt = [name for name in PROMPT_COLUMNS if name in types][:1]
        self.schema = Schema((*prompt, *answers), types, {})
        self._tables = tables

    def parts(self, types: Mapping[str, pa.DataType]) -> Iterator[Part]:
        """Yields all rows in order; see the base class."""
        number = 0
        for table in self._tables():
            faults: dict[int, str] = {}
            columns = [self._column(table, name, types[name], faults) for name in self.schema.types]
            result = pa.table(columns, names=list(self.schema.types))
            for name in self.schema.sides if faults else ():
                result = _set(result, name, _without(result[name], faults))
            yield Part(result, range(number, number + len(table)), faults)
            number += len(table)
        if not number:
            raise _empty()

    def _column(self, table: pa.Table, name: str, kind: pa.DataType, faults: dict[int, str]) -> pa.ChunkedArray:
        column = table[name]
        if bad := _not_utf8(column):
            column = _without(column, bad)
            if name in self.schema.sides:
                faults.update(dict.fromkeys(bad, f"{name}: it has bytes that are not UTF-8"))
        return convert(column, kind)


def convert(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Returns a column as another type that holds its values."""
    plain = plain_type(column.type)
    if plain != column.type:
        column = column.cast(plain)
    if plain == kind:
        return column
    return pa.chunked_array([to_array(to_values(column), kind)], kind)


def merge_sides(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """Returns a type that holds the messages of both: with all keys that either has."""
    if pa.types.is_list(a):
        return pa.list_(merge_sides(a.value_type, b.value_type))
    if pa.types.is_struct(a):
        names = dict.fromkeys([*a.names, *b.names])
        fields = [[kind.field(name).type for kind in (a, b) if name in kind.names] for name in names]
        return pa.struct([(name, merge(found[0], found[-1])) for name, found in zip(names, fields, strict=True)])
    return merge(a, b)


def no_answers(columns: list[str], fault: str) -> UnusableFileError:
    """Returns the error of a file without answers to compare, which names what it has instead."""
    found = f"columns {', '.join(columns)}" if columns else "no row that could be read"
    return UnusableFileError(
        f"{found}{f'; {fault}' if fault else ''}",
        "pairs need `chosen` and `rejected`, single answers `completion` and `label`",
        "rename the columns; a file that is not what its suffix says needs another suffix",
    )


def damaged(error: Exception) -> UnusableFileError:
    """Returns the error of a file whose bytes are not what its format says."""
    return UnusableFileError("a damaged file", f"it is broken or cut off: {error}", "write or copy it again")


def _empty() -> UnusableFileError:
    return UnusableFileError("no rows", "there is nothing to read", "check how the file was made, or leave it out")


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yields rows in lists, shorter ones where rows are huge."""
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += row.size
        if len(chunk) == CHUNK_ROWS or size > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _not_utf8(column: pa.ChunkedArray) -> list[int]:
    """Returns the rows whose texts are not UTF-8; Parquet and Arrow files are not checked when they are read.

    Raises:
        UnusableFileError: The column is broken in another way.
    """
    try:
        column.validate(full=True)
    except pa.ArrowException as error:
        if "UTF8" not in str(error):
            raise damaged(error) from error
        return [row for row in range(len(column)) if not _is_valid(column.slice(row, 1))]
    return []


def _is_valid(column: pa.ChunkedArray) -> bool:
    try:
        # A slice still refers to its neighbours' texts; combined it has its own only.
        pa.concat_arrays(column.chunks).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _without(column: pa.ChunkedArray, rows: Iterable[int]) -> pa.ChunkedArray:
    """Returns a column with nulls in some rows."""
    gone = set(rows)
    indices = pa.array([None if row in gone else row for row in range(len(column))], pa.int64())
    return column.take(indices)


def _set(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)
