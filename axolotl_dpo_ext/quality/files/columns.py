"""The columns of several files together: as they are where the files agree, flat text where they do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from axolotl_dpo_ext.quality.columns import PROMPT_COLUMNS
from axolotl_dpo_ext.quality.files.schema import PAIR, SINGLE
from axolotl_dpo_ext.quality.files.sides import style
from axolotl_dpo_ext.quality.files.sources import Part, Source, merge_sides
from axolotl_dpo_ext.quality.files.types import JSON, merge, to_values
from axolotl_dpo_ext.quality.pairs import parse_pair
from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem

if TYPE_CHECKING:
    from datasets import Features

_FLAT = ("prompt", *PAIR)


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of all files.

    Attributes:
        types: Arrow type of each column.
        features: The same as features.
        flat: Whether the pairs are brought to flat text.
    """

    types: dict[str, pa.DataType]
    features: Features
    flat: bool

    @property
    def schema(self) -> pa.Schema:
        """The columns in Arrow's words."""
        return pa.schema(list(self.types.items()))

    def types_for(self, source: Source) -> dict[str, pa.DataType]:
        """Returns the types in which to read a file's columns."""
        own = source.schema.types
        if not self.flat:
            return {name: self.types[name] for name in own}
        return {n: own[n] if n in source.schema.sides else self.types.get(n, kind) for n, kind in own.items()}

    def bring(self, source: Source, part: Part) -> tuple[pa.Table, dict[int, str]]:
        """Returns rows of a file with the columns of all files, and what is wrong with them by position."""
        columns, faults = {name: part.table[name] for name in part.table.column_names}, part.faults
        if self.flat:
            texts, faults = _flat_texts(source, part)
            columns = {**columns, **texts}
        size = len(part.table)
        arrays = [columns[name] if name in columns else pa.nulls(size, kind) for name, kind in self.types.items()]
        return pa.table(arrays, schema=self.schema), faults


def agree(sources: Sequence[Source]) -> Columns:
    """Returns the columns that hold the rows of all files.

    Raises:
        ConfigurationError: Some have pairs and others labelled single answers, or labelled answers in unlike form.
    """
    singles = [source for source in sources if set(SINGLE) <= set(source.schema.sides)]
    if 0 < len(singles) < len(sources):
        raise ConfigurationError([_mixed(source) for source in singles])
    styles = [{name: style(source.schema.types[name]) for name in source.schema.sides} for source in sources]
    flat = any(found != styles[0] for found in styles)
    if flat and singles:
        raise ConfigurationError([_unlike(sources)])
    sides = {} if flat else _merged(sources, merge_sides, sources[0].schema.sides)
    names = dict.fromkeys(name for source in sources for name in source.schema.types)
    others = [name for name in names if name not in sides and not (flat and name in (*PROMPT_COLUMNS, *PAIR))]
    found = {**dict.fromkeys(_FLAT if flat else (), pa.string()), **sides, **_merged(sources, merge, others)}
    # In the order of the files; the flat columns that none has come first.
    types = {name: found[name] for name in [*(n for n in found if n not in names), *names] if name in found}
    return Columns(types, _features(sources, types), flat)


def _merged(sources: Sequence[Source], merger: Any, names: Iterable[str]) -> dict[str, pa.DataType]:
    present = {name: [s.schema.types[name] for s in sources if name in s.schema.types] for name in names}
    return {name: reduce(merger, found) for name, found in present.items()}


def _features(sources: Sequence[Source], types: Mapping[str, pa.DataType]) -> Features:
    from datasets import Features

    features = Features.from_arrow_schema(pa.schema(list(types.items())))
    for name in features:
        own = [source.features.get(name) for source in sources if name in source.schema.types]
        if own and own[0] is not None and all(feature == own[0] for feature in own) and types[name] != JSON:
            features[name] = own[0]
    return features


def _flat_texts(source: Source, part: Part) -> tuple[dict[str, pa.ChunkedArray], dict[int, str]]:
    """Returns prompt, chosen and rejected of each row as text, and all faults."""
    *prompt, chosen, rejected = (to_values(part.table[name]) for name in source.schema.sides)
    pairs = [parse_pair(*sides) for sides in zip(chosen, rejected, *prompt, strict=True)]
    faults = {i: pair.fault or "no prompt, and both answers begin differently" for i, pair in enumerate(pairs)}
    faults = {i: fault for i, fault in faults.items() if pairs[i].fault or not pairs[i].prompt} | part.faults
    texts = {
        name: pa.array([None if i in faults else getattr(pair, name) for i, pair in enumerate(pairs)], pa.string())
        for name in _FLAT
    }
    return texts, faults


def _mixed(source: Source) -> Problem:
    return Problem(
        setting=str(source.path),
        found="labelled single answers (`completion` and `label`), but other files have pairs",
        reason="a run trains on one or the other: `rl: kto` on labelled answers, all other kinds on pairs",
        fix="read them apart",
    )


def _unlike(sources: Sequence[Source]) -> Problem:
    return Problem(
        setting=", ".join(str(source.path) for source in sources),
        found="labelled answers that are text in one file and messages in another, or with unlike prompt columns",
        reason="no single column holds both",
        fix="bring them to one form, or read them apart",
    )
