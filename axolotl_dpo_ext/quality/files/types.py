"""Which Arrow type holds given Python values, and values as arrays of such a type.

Values that no plain type holds together (a number and a text, objects with different keys) are JSON: datasets
has a feature for it, which gives them back as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

JSON = pa.json_()
_SCALARS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
_EXACT = 2**53  # up to which a float64 holds every integer


def type_of(values: Iterable[Any]) -> pa.DataType:
    """Returns the narrowest type that holds all values; that of nothing but nulls is null."""
    values = [value for value in values if value is not None]
    kinds = set(map(type, values))
    if len(kinds) < 2:
        return _type_of_kind(next(iter(kinds), None), values)
    if kinds == {int, float} and all(abs(value) <= _EXACT for value in values if type(value) is int):
        return pa.float64()
    return JSON


def _type_of_kind(kind: type | None, values: list[Any]) -> pa.DataType:
    if kind is None:
        return pa.null()
    if kind is list:
        return pa.list_(type_of(chain.from_iterable(values)))
    if kind is dict:
        keys = set(map(tuple, values))
        if len(keys) > 1 or keys == {()}:
            return JSON
        return pa.struct([(key, type_of([value[key] for value in values])) for key in next(iter(keys))])
    return _SCALARS.get(kind, JSON)


def merge(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """Returns the narrowest type that holds the values of both."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if {a, b} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(a) and pa.types.is_list(b):
        return pa.list_(merge(a.value_type, b.value_type))
    if pa.types.is_struct(a) and pa.types.is_struct(b) and a.names == b.names:
        return pa.struct([(name, merge(a.field(name).type, b.field(name).type)) for name in a.names])
    return JSON


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type that datasets knows for the same values: no dictionaries, views or 64-bit offsets."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if kind in (pa.large_string(), pa.string_view()):
        return pa.string()
    if kind in (pa.large_binary(), pa.binary_view()):
        return pa.binary()
    if any(is_kind(kind) for is_kind in _LISTS):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, plain_type(field.type)) for field in kind])
    return kind


_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)


def to_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Returns Python values as an array.

    Args:
        values: Values that the type holds; keys that it lacks are left out.
        kind: A type from ``type_of`` and ``merge``, or one of messages.

    Raises:
        UnicodeEncodeError: A text has half a surrogate pair, which Arrow's UTF-8 cannot hold.
    """
    if not _has(kind, JSON) and not _has(kind, pa.float64()):
        return pa.array(values, kind)
    storage = pa.array([_stored(value, kind) for value in values], _storage_type(kind))
    return pa.ExtensionArray.from_storage(kind, storage) if kind == JSON else storage.cast(kind)


def to_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Returns an array's values as Python has them, JSON decoded."""
    values = array.to_pylist()
    return [_loaded(value, array.type) for value in values] if _has(array.type, JSON) else values


def _has(kind: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _has(kind.value_type, wanted)
    if pa.types.is_struct(kind):
        return any(_has(field.type, wanted) for field in kind)
    return bool(kind == wanted)


def _storage_type(kind: pa.DataType) -> pa.DataType:
    if kind == JSON:
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_storage_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _storage_type(field.type)) for field in kind])
    return kind


def _stored(value: Any, kind: pa.DataType) -> Any:
    """Returns a value with JSON as text, and integers among floats as floats, which Arrow does not convert."""
    if value is None:
        return None
    if kind == JSON:
        return json.dumps(value, ensure_ascii=False, default=str)
    if pa.types.is_list(kind):
        return [_stored(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        return {field.name: _stored(value.get(field.name), field.type) for field in kind}
    return float(value) if kind == pa.float64() else value


def _loaded(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if kind == JSON:
        return json.loads(value)
    if pa.types.is_list(kind):
        return [_loaded(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        return {field.name: _loaded(value[field.name], field.type) for field in kind}
    return value
