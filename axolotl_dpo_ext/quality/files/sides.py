"""What the sides of a pair may be, which of these most rows of a file have, and what does not fit in there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

from axolotl_dpo_ext.quality.files.types import JSON, merge, type_of

TEXT, MESSAGE, MESSAGES = "text", "a message", "a list of messages"
LABEL = "true or false"
_NUMBER = "a number"
_SCALARS = {str: TEXT, bool: LABEL, int: _NUMBER, float: _NUMBER}
_NAMES = ("role", "from")
_CONTENTS = ("content", "value")


class Side:
    """One column of a pair, as all rows of a file have it so far."""

    def __init__(self, *allowed: str) -> None:
        self._allowed = allowed
        self._kinds: Counter[str] = Counter()
        self._fields: dict[str, dict[str, pa.DataType]] = {MESSAGE: {}, MESSAGES: {}}

    def add(self, values: Sequence[Any]) -> None:
        """Learns from more rows."""
        self._kinds.update(kinds := _kinds(values))
        for kind in (MESSAGE, MESSAGES):
            if kind in kinds:
                self._add_messages(kind, _messages(values, kind))

    def _add_messages(self, kind: str, messages: list[dict[str, Any]]) -> None:
        fields = self._fields[kind]
        for key in dict.fromkeys(chain.from_iterable(dict.fromkeys(map(tuple, messages)))):
            fields[key] = merge(fields.get(key, pa.null()), _field_type(key, [m.get(key) for m in messages]))

    @property
    def kind(self) -> str:
        """What most rows have; what is not allowed is a fault, however often it is there."""
        allowed = [kind for kind in self._kinds if kind in self._allowed]
        return max(allowed, key=self._kinds.__getitem__, default=self._allowed[0])

    @property
    def type(self) -> pa.DataType:
        """The type of the column's array."""
        if self.kind in (TEXT, LABEL, _NUMBER):
            return {TEXT: pa.string(), LABEL: pa.bool_(), _NUMBER: pa.float64()}[self.kind]
        fields = self._fields[self.kind] or dict.fromkeys(("role", "content"), pa.string())
        # A key without a value anywhere still was there: as a text, which it would have been.
        message = pa.struct([(k, pa.string() if pa.types.is_null(t) else t) for k, t in fields.items()])
        return message if self.kind == MESSAGE else pa.list_(message)


def misfits(values: Sequence[Any], kind: str) -> dict[int, str]:
    """Returns what is wrong with values that are not of a kind, by position."""
    kinds = _kinds(values)
    if not kinds.keys() - {kind} and (kind not in (MESSAGE, MESSAGES) or _all_texts(_messages(values, kind))):
        return {}
    found = ((i, _misfit(value, kind)) for i, value in enumerate(values) if value is not None)
    return {i: fault for i, fault in found if fault}


def style(kind: pa.DataType) -> tuple[str, str]:
    """Returns what a column's values are and how messages in it name their sender; equal for columns that agree."""
    if pa.types.is_list(kind):
        return MESSAGES, style(kind.value_type)[1]
    if pa.types.is_struct(kind):
        return MESSAGE, next((name for name in _NAMES if name in kind.names), "")
    return str(kind), ""


def _kinds(values: Sequence[Any]) -> Counter[str]:
    if set(map(type, values)) <= {str, type(None)}:
        return Counter({TEXT: sum(value is not None for value in values)}) if any(values) else Counter()
    return Counter(_kind(value) for value in values if value is not None)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return MESSAGE if "role" in value or "from" in value else "an object that is no message: it has no role"
    if isinstance(value, list):
        return next((f"a list that holds {k}" for k in map(_kind_in_list, value) if k != MESSAGE), MESSAGES)
    return _SCALARS[type(value)]


def _kind_in_list(value: Any) -> str:
    if value is None:
        return "null"
    return "a list" if isinstance(value, list) else _kind(value)


def _misfit(value: Any, kind: str) -> str:
    if (found := _kind(value)) != kind:
        return f"{found}, but it has to be {kind}, as in most rows of the file"
    messages = _messages([value], kind) if kind in (MESSAGE, MESSAGES) else []
    for place, message in enumerate(messages):
        for key in (*_NAMES, *_CONTENTS):
            part = message.get(key)
            if not (part is None or isinstance(part, str) or (key in _CONTENTS and _is_parts(part))):
                return f"message {place}: its {key!r} is {_kind_in_list(part)}, not text"
    return ""


def _messages(values: Sequence[Any], kind: str) -> list[dict[str, Any]]:
    """Returns the messages of all values that are of a kind."""
    found = [value for value in values if value is not None and _kind(value) == kind]
    return found if kind == MESSAGE else list(chain.from_iterable(found))


def _all_texts(messages: list[dict[str, Any]]) -> bool:
    keys = (*_NAMES, *_CONTENTS)
    return {type(message.get(key)) for key in keys for message in messages} <= {str, type(None)}


def _field_type(key: str, values: list[Any]) -> pa.DataType:
    """Returns the type of a message's key; one wrong message must not change what the others have."""
    if key in _NAMES:
        return pa.string()
    if key in _CONTENTS:
        return JSON if any(map(_is_parts, values)) else pa.string()
    return type_of(values)


def _is_parts(content: Any) -> bool:
    """Tells whether a message's content is a list of parts, such as ``{type: text, text: …}``."""
    return isinstance(content, list) and bool(content) and all(isinstance(part, dict) for part in content)
