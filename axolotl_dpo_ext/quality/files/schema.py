"""The columns of a file of rows, learnt from its rows, and rows as Arrow batches of these columns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa

from axolotl_dpo_ext.quality.columns import PROMPT_COLUMNS
from axolotl_dpo_ext.quality.files.sides import LABEL, MESSAGE, MESSAGES, TEXT, Side, misfits
from axolotl_dpo_ext.quality.files.streams import LATIN_1_FIX, Row
from axolotl_dpo_ext.quality.files.types import merge, to_array, type_of

PAIR, SINGLE = ("chosen", "rejected"), ("completion", "label")


class Schema(NamedTuple):
    """The columns of a file.

    Attributes:
        sides: Names of the columns that make a pair, or a single answer with its label; the prompt's is first.
        types: Arrow types of all columns, those of the sides included, in the file's order.
        kinds: What the values of each side are, where rows were read one by one.
    """

    sides: tuple[str, ...]
    types: dict[str, pa.DataType]
    kinds: dict[str, str]


class Survey:
    """What all rows of a file hold, so far."""

    def __init__(self) -> None:
        self._rows = 0
        self._present: Counter[str] = Counter()
        self._types: dict[str, pa.DataType] = {}
        self._sides = {name: Side(TEXT, MESSAGE, MESSAGES) for name in (*PROMPT_COLUMNS, *PAIR, "completion")}
        self._sides["label"] = Side(LABEL, "a number")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Learns from more rows; those without any values do not count."""
        self._rows += sum(map(bool, rows))
        keys = Counter(map(tuple, rows))
        for names, count in keys.items():
            self._present.update(dict.fromkeys(names, count))
        for name in dict.fromkeys(chain.from_iterable(keys)):
            values = [row.get(name) for row in rows]
            if name in self._sides:
                self._sides[name].add(values)
            if name not in PAIR:
                self._types[name] = merge(self._types.get(name, pa.null()), type_of(values))

    @property
    def columns(self) -> list[str]:
        """Names of all columns seen."""
        return list(self._present)

    @property
    def schema(self) -> Schema:
        """The columns; without sides where rows have no answers to compare or to label."""
        answers = find_answers(self._present)
        if not answers:
            return Schema((), {}, {})
        # What a few rows have is a fault of those rows; as a column it would be a fault of all others.
        usual = [name for name in PROMPT_COLUMNS if self._present[name] * 2 >= self._rows]
        sides = (*usual[:1], *answers)
        stray = {name for name in PROMPT_COLUMNS if name not in usual} | {name for name in PAIR if name not in answers}
        names = [name for name in self._present if name not in stray]
        types = {name: self._sides[name].type if name in sides else self._types[name] for name in names}
        return Schema(sides, types, {name: self._sides[name].kind for name in sides})


def find_answers(columns: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the columns with the answers of pairs or of labelled single answers, whichever more rows have."""
    pairs, singles = (min(columns.get(name, 0) for name in names) for names in (PAIR, SINGLE))
    if not pairs and not singles:
        return ()
    return PAIR if pairs >= singles else SINGLE


def to_batch(rows: Sequence[Row], schema: Schema, types: Mapping[str, pa.DataType]) -> tuple[pa.Table, dict[int, str]]:
    """Returns rows as a table, and what is wrong with some of them by position.

    Args:
        rows: The rows.
        schema: The file's columns.
        types: Types to give the columns; they hold at least what the schema's types hold.

    Returns:
        All rows; one with a fault has nulls in the columns of the pair and keeps its other values.
    """
    faults = {i: row.fault for i, row in enumerate(rows) if row.fault}
    columns = {name: [row.values.get(name) for row in rows] for name in schema.types}
    for name in schema.sides:
        for i, fault in {**_absent(rows, columns[name], name), **misfits(columns[name], schema.kinds[name])}.items():
            faults.setdefault(i, fault if fault.startswith("no column") else f"{name}: {fault}")
    _blank(columns, schema, faults)
    try:
        arrays = _arrays(columns, types)
    except UnicodeEncodeError:
        for name, values in columns.items():
            columns[name] = _repair(name, values, schema, faults)
        _blank(columns, schema, faults)
        arrays = _arrays(columns, types)
    return pa.table(arrays, names=list(columns)), faults


def _arrays(columns: Mapping[str, list[Any]], types: Mapping[str, pa.DataType]) -> list[pa.Array]:
    return [to_array(values, types[name]) for name, values in columns.items()]


def _absent(rows: Sequence[Row], values: Sequence[Any], name: str) -> dict[int, str]:
    if None not in values:
        return {}
    return {
        i: f"no column {name!r}, only {', '.join(map(repr, row.values)) or 'an empty object'}"
        for i, row in enumerate(rows)
        if name not in row.values and not row.fault
    }


def _blank(columns: Mapping[str, list[Any]], schema: Schema, faults: Mapping[int, str]) -> None:
    for name in schema.sides:
        for i in faults:
            columns[name][i] = None


def _repair(name: str, values: list[Any], schema: Schema, faults: dict[int, str]) -> list[Any]:
    """Finds texts that are not Unicode: faults in a pair, replacement characters elsewhere."""
    repaired = []
    for i, value in enumerate(values):
        text = json.dumps(value, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            faults.setdefault(i, f"{name}: {_not_unicode(text[error.start])}") if name in schema.sides else None
            # Two halves that meet in UTF-16 become the character that they are.
            value = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        repaired.append(value)
    return repaired


def _not_unicode(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        return f"not UTF-8: it has the byte 0x{code - 0xDC00:02x}; {LATIN_1_FIX}"
    return f"half a character: \\u{code:04x} without its other half, as texts have that were cut inside an emoji"
