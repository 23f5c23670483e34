"""Rows of CSV and TSV files.

Python's own reader: it knows the line of each row and the number of its fields. pandas fills rows that are too
short with nothing, and pyarrow stops at the first that is too long.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from axolotl_dpo_ext.quality.files.json_rows import CUT_OFF
from axolotl_dpo_ext.quality.files.streams import (
    LATIN_1_FIX,
    CutOffError,
    Row,
    UnusableFileError,
    data_suffix,
    is_name,
    read_lines,
)

_TEXT_COLUMNS = {"prompt", "conversations", "messages", "chosen", "rejected", "completion"}
# No leading zeros and no spaces: `007` is a name, not a number.
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})\Z")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?\Z|-?inf\Z|nan\Z", re.IGNORECASE)
_BOOLEAN = re.compile(r"true\Z|false\Z", re.IGNORECASE)


class CsvFile:
    """A CSV or TSV file whose first line names the columns.

    A column's cells are numbers or true/false if all of them can be; else, and always in the columns of a pair,
    they are text. Empty cells are nulls, in the columns of a pair empty texts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tabs = data_suffix(path) == ".tsv"

    def rows(self) -> Iterator[Row]:
        """Yields the rows; their numbers are those of the lines in which they begin.

        Raises:
            UnusableFileError: Nothing of the file can be read.
        """
        readers = self._readers
        for number, cells, fault in self._records():
            values = {} if fault else {name: read(cell) for (name, read), cell in zip(readers, cells, strict=True)}
            yield Row(number, values, fault, sum(map(len, cells)))

    @cached_property
    def _readers(self) -> list[tuple[str, Callable[[str], Any]]]:
        """How to read the cells of each column: by the narrowest form that all of them have."""
        names = self._header()
        forms = [[] if name in _TEXT_COLUMNS else [_BOOLEAN, _INTEGER, _NUMBER] for name in names]
        for _, cells, fault in self._records():
            if not fault:
                forms = [
                    [form for form in possible if form.match(cell)] if possible and cell else possible
                    for possible, cell in zip(forms, cells, strict=True)
                ]
        return [
            (name, str if name in _TEXT_COLUMNS else _READERS[possible[0] if possible else None])
            for name, possible in zip(names, forms, strict=True)
        ]

    def _header(self) -> list[str]:
        try:
            names: list[str] = next(self._reader(), [])
        except (csv.Error, CutOffError) as error:
            raise UnusableFileError("a broken first line", str(error) or CUT_OFF, "correct or copy the file") from None
        if not is_name("".join(names)):
            reason = "columns need names in UTF-8 without NUL bytes"
            raise UnusableFileError(f"the first line {names}", reason, LATIN_1_FIX)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            fix = "rename or remove one of them"
            raise UnusableFileError(f"two columns {twice!r}", "which one is meant cannot be told", fix)
        return names

    def _records(self) -> Iterator[tuple[int, list[str], str]]:
        """Yields each record's line, cells and fault."""
        reader = self._reader()
        width = len(next(reader))
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except CutOffError:
                yield line, [], CUT_OFF
                return
            except csv.Error as error:
                yield line, [], self._fault(error, line)
                continue
            if cells:  # a blank line has none
                yield line, cells, "" if len(cells) == width else f"{len(cells)} fields, but the first line has {width}"

    def _reader(self) -> Any:
        # The limit is one of the process; rows of many megabytes are rare but sound.
        csv.field_size_limit(sys.maxsize)
        lines = (line.decode("utf-8", "surrogateescape") for line in read_lines(self._path))
        return csv.reader(lines, delimiter="\t" if self._tabs else ",", strict=True)

    @staticmethod
    def _fault(error: csv.Error, line: int) -> str:
        if "unexpected end of data" in str(error):
            raise UnusableFileError(
                f"a quotation mark that is opened in line {line} and never closed",
                "all that follows would be one cell",
                "close it, or write quotation marks inside a cell twice",
            )
        return f"not CSV: {error}"


_READERS: dict[re.Pattern[str] | None, Callable[[str], Any]] = {
    None: lambda cell: cell or None,
    _BOOLEAN: lambda cell: cell.lower() == "true" if cell else None,
    _INTEGER: lambda cell: int(cell) if cell else None,
    _NUMBER: lambda cell: float(cell) if cell else None,
}
