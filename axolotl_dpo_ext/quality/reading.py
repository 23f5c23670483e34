"""Reads a dataset batch by batch, as flat text and as the tokens that the run will train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.quality.base import PairBatch
from axolotl_dpo_ext.quality.columns import Columns, find_columns
from axolotl_dpo_ext.quality.pairs import Pair, parse_pair, parse_single
from axolotl_dpo_ext.quality.templates import Rendered, TemplateFaultError, render, tool_text
from axolotl_dpo_ext.quality.tokens import TextTokenizer, TokenIds

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class PairReader:
    """Reads the rows of a dataset.

    Attributes:
        dataset: Pairs, or unpaired data.
        tokenizer: Counts tokens and renders conversations.
        max_length: Tokens of prompt and answer that the run keeps; ``None`` keeps all.
        faults: What is known to be wrong with rows, by row, such as a line that is not JSON.
    """

    dataset: Dataset
    tokenizer: TextTokenizer
    max_length: int | None = None
    faults: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.dataset)

    def batches(self, size: int) -> Iterator[PairBatch]:
        """Yields the rows, ``size`` at a time; only one batch is in memory."""
        columns = find_columns(self.dataset)
        plain = _plain(self.dataset, columns)
        for start in range(0, len(plain), size):
            values = plain[start : start + size]
            pairs = _parse(values, columns)
            known = [self.faults.get(row, "") for row in range(start, start + len(pairs))]
            pairs = [pair._replace(fault=fault) if fault else pair for pair, fault in zip(pairs, known, strict=True)]
            yield self._batch(pairs, values, columns)

    def pairs(self, rows: Iterable[int]) -> list[Pair]:
        """Returns the texts of some rows."""
        return read_pairs(self.dataset, rows)

    def _batch(self, pairs: list[Pair], values: Mapping[str, Sequence[Any]], columns: Columns) -> PairBatch:
        nothing = [None] * len(pairs)
        tools, options = (values[n] if n in columns.template else nothing for n in ("tools", "chat_template_kwargs"))
        rendered = [self._rendered(*row) for row in zip(pairs, tools, options, strict=True)]
        faults = [
            pair.fault or (text if isinstance(text, str) else "") for pair, text in zip(pairs, rendered, strict=True)
        ]
        prompt_ids, chosen_ids, rejected_ids = self._encode(pairs, rendered, faults)
        return PairBatch(
            prompts=[pair.prompt for pair in pairs],
            chosen=[pair.chosen for pair in pairs],
            rejected=[pair.rejected for pair in pairs],
            prompt_ids=prompt_ids,
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            faults=faults,
            tools=[tool_text(each) for each in tools] if "tools" in columns.template else (),
            figures=_figures(values, columns),
            desirable=None if columns.paired else np.array([bool(pair.desirable) for pair in pairs], dtype=np.bool_),
            max_length=self.max_length,
            bos=self.tokenizer.bos,
        )

    def _rendered(self, pair: Pair, tools: Any, options: Any) -> Rendered | str | None:
        """Returns a conversation as text, what is wrong with it, or ``None`` for plain text."""
        if pair.conversation is None or self.tokenizer.tokenizer is None or pair.fault:
            return None
        if not self.tokenizer.tokenizer.chat_template:
            return None  # TRL will ask for one; the texts alone are still worth checking
        try:
            return render(pair, self.tokenizer.tokenizer, tools, options)
        except TemplateFaultError as error:
            return str(error)

    def _encode(
        self, pairs: Sequence[Pair], rendered: Sequence[Rendered | str | None], faults: Sequence[str]
    ) -> tuple[TokenIds, TokenIds, TokenIds]:
        """Tokenizes all texts of the sound rows at once; malformed rows have no tokens."""
        sound = [row for row, fault in enumerate(faults) if not fault]
        seen = [text if isinstance(text, Rendered) else None for text in rendered]
        texts = [getattr(seen[row] or pairs[row], side) for side in ("prompt", "chosen", "rejected") for row in sound]
        ids = self.tokenizer.encode(texts)
        n, empty = len(sound), np.empty(0, dtype=np.int64)
        sides = []
        for number, side in enumerate(("prompt", "chosen", "rejected")):
            sequences = [empty] * len(pairs)
            for place, row in enumerate(sound, number * n):
                sequences[row] = ids[place] if seen[row] else self._framed(side, ids[place], texts[place])
            sides.append(TokenIds.of(sequences))
        return sides[0], sides[1], sides[2]

    def _framed(self, side: str, ids: NDArray[np.int64], text: str) -> NDArray[np.int64]:
        """Adds to a plain text's ids what TRL and the tokenizer add: BOS to prompts, EOS to answers."""
        if side == "prompt":
            begun = self.tokenizer.single_bos and len(ids) > 0 and ids[0] == self.tokenizer.bos
            opening = () if begun else self.tokenizer.opening
            return np.concatenate([opening, ids]).astype(np.int64) if opening else ids
        if self.tokenizer.eos is None or not text or text.endswith(self.tokenizer.eos[1]):
            return ids
        return np.append(ids, self.tokenizer.eos[0])


def read_pairs(dataset: Dataset, rows: Iterable[int]) -> list[Pair]:
    """Returns the texts of some rows."""
    columns = find_columns(dataset)
    return _parse(_plain(dataset, columns)[list(rows)], columns)


def _plain(dataset: Dataset, columns: Columns) -> Dataset:
    # Selecting the columns keeps images and the like from being decoded; a format could make arrays of text.
    return dataset.select_columns(columns.names).with_format(None)


def _parse(values: Mapping[str, Sequence[Any]], columns: Columns) -> list[Pair]:
    first, second = (values[name] for name in columns.sides)
    parse = parse_pair if columns.paired else parse_single
    if columns.prompt is None:
        return [parse(a, b) for a, b in zip(first, second, strict=True)]
    return [parse(a, b, p) for a, b, p in zip(first, second, values[columns.prompt], strict=True)]


def _figures(values: Mapping[str, Sequence[Any]], columns: Columns) -> dict[str, NDArray[np.float64]]:
    read = {
        meaning: np.array([np.nan if v is None else v for v in values[name]], dtype=np.float64)
        for meaning, name in columns.figures.items()
    }
    if "chosen_score" in read:
        read["margin"] = read.pop("chosen_score") - read.pop("rejected_score")
    return read
