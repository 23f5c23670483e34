"""Puts answers into few, full batches: prompts computed once, rows of equal length together, a token budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from axolotl_dpo_ext.reference.rows import Answer


@dataclass(frozen=True)
class Row:
    """One row of a batch: a prompt followed by one or several of its answers.

    Attributes:
        answers: The answers; all have the same prompt.
        indices: For each answer its position in the list that was given.
    """

    answers: tuple[Answer, ...]
    indices: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of tokens that go through the model: the prompt once, and no answer's last token.

        Nothing after the last token of an answer is asked for, so what the model makes of it is not needed.
        """
        return len(self.answers[0].prompt) + sum(answer.tokens - 1 for answer in self.answers)


def make_rows(answers: Sequence[Answer], share_prompts: bool, budget: int) -> list[Row]:
    """Groups answers by prompt.

    Args:
        answers: The answers; each has at least one token that counts.
        share_prompts: Whether a row may hold several answers.
        budget: Most tokens of a row with several answers.

    Returns:
        Rows from the shortest to the longest; the order depends on the answers alone.
    """
    if not share_prompts:
        rows = [Row((answer,), (index,)) for index, answer in enumerate(answers)]
    else:
        rows = [row for members in _by_prompt(answers) for row in _split(members, answers, budget)]
    return sorted(rows, key=lambda row: (row.length, row.indices))


def _by_prompt(answers: Sequence[Answer]) -> Iterable[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for index, answer in enumerate(answers):
        groups.setdefault(answer.prompt.tobytes(), []).append(index)
    return groups.values()


def _split(members: list[int], answers: Sequence[Answer], budget: int) -> Iterable[Row]:
    prompt = len(answers[members[0]].prompt)
    chosen: list[int] = []
    length = prompt
    for index in members:
        fed = answers[index].tokens - 1
        if chosen and length + fed > budget:
            yield Row(tuple(answers[i] for i in chosen), tuple(chosen))
            chosen, length = [], prompt
        chosen.append(index)
        length += fed
    yield Row(tuple(answers[i] for i in chosen), tuple(chosen))


def make_batches(rows: Iterable[Row], budget: int, padded: bool) -> list[list[Row]]:
    """Cuts a list of rows, sorted by length, into batches.

    Args:
        rows: Rows in ascending length.
        budget: Most tokens of a batch; a longer row is a batch of its own.
        padded: Whether the rows of a batch are padded to the longest, which then counts.

    Returns:
        Batches in the given order. Cutting the rest of the rows after any whole batch gives the same batches again.
    """
    batches: list[list[Row]] = []
    batch: list[Row] = []
    tokens = 0
    for row in rows:
        tokens = (len(batch) + 1) * row.length if padded else tokens + row.length
        if batch and tokens > budget:
            batches.append(batch)
            batch, tokens = [], row.length
        batch.append(row)
    return [*batches, batch] if batch else batches
