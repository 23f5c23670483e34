"""Rows of JSON files, however broken some of them are.

The JSON readers of pyarrow and datasets refuse a whole file for one bad line, a number for a text, or a
conversation where other rows have text. An audit has to name that row and go on, so Python's own parser reads
one row at a time here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from json.decoder import JSONDecoder
from pathlib import Path
from typing import Any

from axolotl_dpo_ext.quality.files.streams import (
    LATIN_1_FIX,
    CutOffError,
    Row,
    UnusableFileError,
    is_name,
    read_all,
    read_lines,
)

CUT_OFF = "the compressed file ends here: it was cut off, so what came after is lost; copy or compress it again"
_DEEPEST = 64  # Python's recursion limit would be met somewhere later, in a place that depends on the caller
_SPACE = " \t\r\n"


class _FaultError(ValueError):
    """One row cannot be read."""


def line_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a file with one JSON object a line; blank lines are no rows.

    Raises:
        UnusableFileError: Nothing of the file can be read.
    """
    number = 0
    try:
        for number, line in enumerate(read_lines(path), 1):
            if not line.isspace():
                yield _line_row(number, line)
    except CutOffError:
        yield Row(number + 1, {}, CUT_OFF)


def text_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a JSON text: an array of rows, an object of columns, or objects one after the other.

    The text is in memory as a whole, the rows are not.

    Raises:
        UnusableFileError: The text is broken other than by ending too early.
    """
    text, whole = read_all(path)
    rows = _array_rows(text) if text.lstrip(_SPACE).startswith("[") else _object_rows(text)
    for row in rows:
        yield row if whole or not row.fault.startswith("the file ends") else row._replace(fault=CUT_OFF)


def is_lines(path: Path) -> bool:
    """Tells whether a ``.json`` file holds one object a line, by its first two lines with content.

    Raises:
        UnusableFileError: Nothing of the file can be read.
    """
    lines = (line.strip() for line in read_lines(path))
    try:
        first = next(filter(None, lines), b"")
        if not first.startswith(b"{") or first == b"{":
            return False
        # A single line may be an object of columns.
        return bool(next(filter(None, lines), b""))
    except CutOffError:
        return True


def _line_row(number: int, line: bytes) -> Row:
    try:
        value = _loads(line)
    except _FaultError as fault:
        return Row(number, {}, str(fault))
    except json.JSONDecodeError as error:
        return Row(number, {}, _not_json(error, line))
    return _as_row(number, value, len(line))


def _loads(line: bytes) -> Any:
    try:
        text = line.decode()
        value = _STRICT.decode(text)
    except UnicodeDecodeError as error:
        bad = line[error.start]
        raise _FaultError(f"not UTF-8: byte {error.start + 1} of the line is 0x{bad:02x}; {LATIN_1_FIX}") from None
    except RecursionError:
        raise _FaultError(_TOO_DEEP) from None
    _check_depth(value, line.count(b"[") + line.count(b"{"))
    return value


def _not_json(error: json.JSONDecodeError, line: bytes) -> str:
    fault = f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    if b"\0" in line:
        return fault + "; it has NUL bytes, as files have that were being written when a machine or disk failed"
    return fault if line.endswith(b"\n") else fault + "; it is the last line and has no end: the file may be cut off"


def _as_row(number: int, value: Any, size: int) -> Row:
    if isinstance(value, dict):
        return Row(number, value, "", size)
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return Row(number, {}, f"{names.get(type(value), 'a number')}, not an object with columns")


def _array_rows(text: str) -> Iterator[Row]:
    at, number = _skip(text, text.index("[") + 1), 0
    while text[at : at + 1] != "]":
        try:
            row, at = _element(text, at, number)
            at = _skip(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        except json.JSONDecodeError as error:
            yield _cut_off(error, number)
            return
        yield row
        if text[at] == ",":
            at = _skip(text, at + 1)
        number += 1
    rest = text[at + 1 :].strip(_SPACE)
    if rest:
        raise _broken(json.JSONDecodeError("Extra data", text, _skip(text, at + 1)), number)


def _object_rows(text: str) -> Iterator[Row]:
    at, number = _skip(text, 0), 0
    while at < len(text):
        try:
            row, at = _element(text, at, number)
        except json.JSONDecodeError as error:
            yield _cut_off(error, number)
            return
        at = _skip(text, at)
        if number == 0 and at == len(text) and _is_columns(row.values):
            yield from _rows_of_columns(row.values)
            return
        yield row
        number += 1


def _element(text: str, at: int, number: int) -> tuple[Row, int]:
    """Returns the row that begins at a position, and the position of its end."""
    try:
        value, end = _STRICT.raw_decode(text, at)
        _check_depth(value, text.count("[", at, end) + text.count("{", at, end))
    except _FaultError as fault:
        return Row(number, {}, str(fault)), _LENIENT.raw_decode(text, at)[1]
    except RecursionError:
        reason = f"row {number} is {_TOO_DEEP}, and where the next row begins cannot be told"
        raise UnusableFileError("JSON", reason, "remove that row") from None
    return _as_row(number, value, end - at), end


def _cut_off(error: json.JSONDecodeError, number: int) -> Row:
    """Returns the row at which a text ends too early; what is broken elsewhere leaves no rows to find.

    Raises:
        UnusableFileError: The text goes on after the error.
    """
    # A word such as `false` or an escape that was cut is reported at its beginning, up to six characters back.
    if error.msg.startswith("Unterminated string") or len(error.doc.rstrip(_SPACE)) - error.pos <= 6:
        return Row(number, {}, f"the file ends in the middle ({error.msg}, line {error.lineno}): it was cut off")
    raise _broken(error, number)


def _broken(error: json.JSONDecodeError, number: int) -> UnusableFileError:
    return UnusableFileError(
        f"broken JSON in line {error.lineno}, column {error.colno} (row {number})",
        f"{error.msg}, and where the next row begins cannot be told",
        "correct that place, or save the data as JSON lines (.jsonl), where one bad row spoils no other",
    )


def _is_columns(values: dict[str, Any]) -> bool:
    """Tells an object of columns from a single row, whose sides may be lists too, but only of messages."""
    lists = [value for value in values.values() if isinstance(value, list)]
    if not lists or len(lists) < len(values) or len(set(map(len, lists))) > 1:
        return False
    # One message a row and a conversation look the same; but conversations of one row differ in length or text.
    return not all(isinstance(item, dict) for column in lists for item in column)


def _rows_of_columns(columns: dict[str, list[Any]]) -> Iterator[Row]:
    for number, values in enumerate(zip(*columns.values(), strict=True)):
        yield Row(number, dict(zip(columns, values, strict=True)))


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in _SPACES:
        at += 1
    return at


def _check_depth(value: Any, brackets: int) -> None:
    """Raises _FaultError if a value is nested too deep; ``brackets`` is the most its depth can be."""
    if brackets <= _DEEPEST:
        return
    level = [value]
    for _ in range(_DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
    if any(isinstance(item, dict | list) for item in level):
        raise _FaultError(_TOO_DEEP)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _FaultError(f"the key {twice!r} is there twice in one object, and which one is meant cannot be told")
    if not is_name("".join(values)):
        raise _FaultError(f"a key is not Unicode text, or has a NUL: {list(values)}")
    return values


def _integer(digits: str) -> int | float:
    # Arrow's integers have 64 bits; and Python refuses to read more than a few thousand digits.
    if len(digits) < 19:
        return int(digits)
    number = float(digits)
    return int(digits) if abs(number) < 2.0**63 else number


_TOO_DEEP = f"nested deeper than {_DEEPEST} levels"
_SPACES = frozenset(_SPACE)
_STRICT = JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
_LENIENT = JSONDecoder(parse_int=_integer)
