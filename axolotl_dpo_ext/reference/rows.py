"""What a preference row becomes before a model sees it: two answers to a prompt, as token ids with content keys."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset

KEY_BYTES = 16
PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class LogProbDefinition:
    """What "the log-probability of an answer" means in a run.

    Attributes:
        max_length: Longest sequence in tokens, or ``None``.
        truncation_mode: Which end of a longer sequence is kept, as TRL's ``DPOConfig.truncation_mode``.
        ld_alpha: Weight of the tokens beyond the length of the pair's shorter answer (LD-DPO,
            https://arxiv.org/abs/2409.06411), or ``None`` for the plain sum.
    """

    max_length: int | None = None
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    ld_alpha: float | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """A prompt with one of its answers, as the model sees it.

    Attributes:
        ids: Token ids after truncation, shape ``(length,)``.
        start: Index of the first token of the answer.
        shared: How many of the answer's predicted tokens count fully; any further are weighted with ``ld_alpha``.
    """

    ids: Ids
    start: int
    shared: int

    @property
    def first_predicted(self) -> int:
        """Index of the first token whose log-probability counts: nothing predicts the first token of a sequence."""
        return max(self.start, 1)

    @property
    def tokens(self) -> int:
        """Number of tokens whose log-probability counts."""
        return max(len(self.ids) - self.first_predicted, 0)

    @property
    def prompt(self) -> Ids:
        """What the answer follows: the ids before ``first_predicted``."""
        return self.ids[: self.first_predicted]

    @property
    def completion(self) -> Ids:
        """The tokens whose log-probabilities count."""
        return self.ids[self.first_predicted :]


@dataclass(frozen=True)
class Pair:
    """The two answers of a preference row."""

    chosen: Answer
    rejected: Answer


def make_pair(prompt: Ids, chosen: Ids, rejected: Ids, definition: LogProbDefinition) -> Pair:
    """Joins a prompt with its two answers and truncates as TRL's collator does.

    Args:
        prompt: Token ids of the prompt, shape ``(prompt_length,)``.
        chosen: Token ids of the better answer.
        rejected: Token ids of the worse answer.
        definition: Truncation, and whether the shorter answer's length matters.

    Source:
        ``DataCollatorForPreference.torch_call`` and ``compute_ref_log_probs`` in trl/trainer/dpo_trainer.py.
    """
    answers = [_join(prompt, answer, definition) for answer in (chosen, rejected)]
    if definition.ld_alpha is not None:
        shared = min(answer.tokens for answer in answers)
        answers = [Answer(answer.ids, answer.start, shared) for answer in answers]
    return Pair(*answers)


def _join(prompt: Ids, answer: Ids, definition: LogProbDefinition) -> Answer:
    ids, start = np.concatenate([prompt, answer]), len(prompt)
    limit = definition.max_length
    if limit is not None and len(ids) > limit:
        if definition.truncation_mode == "keep_start":
            ids = ids[:limit]
        else:
            start = max(0, start - (len(ids) - limit))
            ids = ids[-limit:]
    start = min(start, len(ids))
    return Answer(ids, start, shared=len(ids) - max(start, 1))


def answer_key(answer: Answer, ld_alpha: float | None) -> bytes:
    """Returns the content key of an answer: equal keys have equal log-probabilities under one reference.

    Args:
        answer: The answer.
        ld_alpha: As in ``LogProbDefinition``: with it, the length of the pair's shorter answer matters too.

    Returns:
        A BLAKE2b digest of ``KEY_BYTES`` bytes.
    """
    shared = -1 if ld_alpha is None else min(answer.shared, answer.tokens)
    head = np.array([len(answer.ids), answer.first_predicted, shared], dtype="<i8")
    return hashlib.blake2b(head.tobytes() + answer.ids.astype("<i8").tobytes(), digest_size=KEY_BYTES).digest()


def read_pairs(dataset: Dataset, definition: LogProbDefinition, start: int, stop: int) -> Iterator[Pair]:
    """Reads some rows of a dataset that TRL has tokenized.

    Args:
        dataset: A dataset with the columns ``PAIR_COLUMNS``, lists of token ids.
        definition: Truncation and normalisation.
        start: First row.
        stop: Row after the last.

    Yields:
        One pair for each row, in order.
    """
    # select() keeps an indices mapping, and the arrow format hands out the columns without a Python list per row.
    table = dataset.with_format("arrow").select_columns(list(PAIR_COLUMNS))[start:stop]
    columns = [_as_arrays(table.column(name)) for name in PAIR_COLUMNS]
    for prompt, chosen, rejected in zip(*columns, strict=True):
        yield make_pair(prompt, chosen, rejected, definition)


def _as_arrays(column: object) -> list[Ids]:
    rows: list[Ids] = []
    for chunk in column.chunks:  # type: ignore[attr-defined] # a pyarrow.ChunkedArray; pyarrow ships no types
        # Not `values`: that is the whole column's, which would be converted again for every part that is read.
        values = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        offsets = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
        rows += [values[a:b] for a, b in itertools.pairwise(offsets)]
    return rows
