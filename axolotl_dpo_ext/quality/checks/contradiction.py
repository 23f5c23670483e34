"""Preferences that contradict one another: A over B and B over A, or A over B over C over A."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import PairBatch, ReadTexts, Scores, SetCheck
from axolotl_dpo_ext.quality.text import collapse, prompt_key, stable_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import QualitySettings

_MIX = np.uint64(0x9E3779B97F4A7C15)


class Contradiction(SetCheck):
    """Finds pairs that are part of a cycle of preferences among the answers to one prompt.

    In unpaired data: answers to one prompt that are labelled as desirable here and as undesirable there.
    """

    name = "contradiction"
    summary = "another pair, or a chain of pairs, says the opposite"
    on_singles = True

    def threshold(self, settings: QualitySettings) -> float:
        """Returns 1: a cycle has two answers or more (in unpaired data, two labels)."""
        return 1.0

    def sketch(self, batch: PairBatch, settings: QualitySettings) -> NDArray[np.uint64]:
        """Returns hashes of the prompt with each answer, and the label, shape ``(n, 3)``; 2 is no label."""
        prompts = _hashes([prompt_key(text) for text in batch.prompts]) * _MIX
        if batch.tools:  # with other tools another answer may be the better one
            prompts ^= _hashes(list(batch.tools))
        chosen = prompts ^ _hashes([collapse(text) for text in batch.chosen])
        rejected = prompts ^ _hashes([collapse(text) for text in batch.rejected])
        labels = np.full(len(batch), 2) if batch.desirable is None else batch.desirable
        return np.column_stack([chosen, rejected, labels.astype(np.uint64)])

    def compare(self, sketches: NDArray[np.uint64], settings: QualitySettings, read: ReadTexts) -> Scores:
        """Returns how many answers the cycles connect that a pair is part of, 0 if it is part of none.

        The matched row is one that prefers what this pair rejects, within the cycle: the reverse pair if there is one.
        """
        if (sketches[:, 2] == 2).all():
            return _cycles(sketches[:, :2])
        return _labelled_twice(sketches[:, 0], sketches[:, 2])


def _hashes(texts: list[str]) -> NDArray[np.uint64]:
    return np.array([stable_hash(text) for text in texts], dtype=np.uint64)


def _cycles(sides: NDArray[np.uint64]) -> Scores:
    """Finds the strongly connected answers of the graph of preferences; rows are edges from chosen to rejected."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    answers, flat = np.unique(sides, return_inverse=True)
    edges = flat.reshape(sides.shape)
    graph = csr_matrix((np.ones(len(edges), dtype=np.int8), (edges[:, 0], edges[:, 1])), shape=(len(answers),) * 2)
    component = connected_components(graph, directed=True, connection="strong")[1]
    within = component[edges]
    in_cycle = (within[:, 0] == within[:, 1]) & (edges[:, 0] != edges[:, 1])
    rows = np.flatnonzero(in_cycle)
    values = np.where(in_cycle, np.bincount(component)[within[:, 0]], 0).astype(np.float64)
    matched = np.full(len(edges), -1, dtype=np.int64)
    matched[rows] = _opposing(edges[rows], rows)
    return Scores(values, matched)


def _opposing(edges: NDArray[np.intp], rows: NDArray[np.intp]) -> list[int]:
    """Returns for each edge of a cycle the row of the reverse edge, else of one that goes on from its end."""
    at: dict[tuple[int, int], int] = {}
    onward: dict[int, int] = {}
    # Answers are numbered by their hashes: in this order, which edge goes on does not depend on row order.
    order = np.lexsort((edges[:, 1], edges[:, 0]))
    for row, (chosen, rejected) in zip(rows[order].tolist(), edges[order].tolist(), strict=True):
        at.setdefault((chosen, rejected), row)
        onward.setdefault(chosen, row)
    return [at.get((rejected, chosen), onward[rejected]) for chosen, rejected in edges.tolist()]


def _labelled_twice(answers: NDArray[np.uint64], labels: NDArray[np.uint64]) -> Scores:
    """Finds answers that have both labels; the matched row is the first with the other one."""
    values, matched = np.zeros(len(answers)), np.full(len(answers), -1, dtype=np.int64)
    for label in (0, 1):
        mine, others = np.flatnonzero(labels == label), np.flatnonzero(labels != label)
        keys, first = np.unique(answers[others], return_index=True)
        place = np.clip(np.searchsorted(keys, answers[mine]), 0, max(len(keys) - 1, 0))
        found = keys[place] == answers[mine] if len(keys) else np.zeros(len(mine), dtype=np.bool_)
        values[mine[found]] = 2.0
        matched[mine[found]] = others[first[place[found]]]
    return Scores(values, matched)
