"""What the tests of precomputing share: pairs, a scorer that needs no model, and what it must give."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from axolotl_dpo_ext.reference.batching import Row
from axolotl_dpo_ext.reference.precompute import Batching, PairLogProbs, reference_log_probs
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.rows import Answer, LogProbDefinition, answer_key, read_pairs
from axolotl_dpo_ext.reference.store import ReferenceStore

PLAIN = LogProbDefinition()


def tokens_of(answer: Answer) -> Any:
    return -0.1 * (answer.completion % 97) - 0.01 * (answer.prompt.sum() % 89)


def make_dataset(count: int, seed: int = 0) -> Dataset:
    """Different pairs, some of which have their prompt in common with the one before."""
    generator = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [generator.randrange(1, 1000) for _ in range(generator.randrange(least, most + 1))]

    rows: list[dict[str, list[int]]] = []
    for _ in range(count):
        prompt = rows[-1]["prompt_ids"] if rows and generator.random() < 0.3 else tokens(2, 20)
        rows.append({"prompt_ids": prompt, "chosen_ids": tokens(2, 15), "rejected_ids": tokens(2, 15)})
    return Dataset.from_list(rows)


def expected(dataset: Dataset, definition: LogProbDefinition = PLAIN) -> np.ndarray:
    """The sums, one answer at a time."""
    values = []
    for pair in read_pairs(dataset, definition, 0, len(dataset)):
        for answer in (pair.chosen, pair.rejected):
            weights = np.where(np.arange(answer.tokens) < answer.shared, 1.0, definition.ld_alpha or 1.0)
            values.append((tokens_of(answer) * weights).sum())
    return np.array(values).reshape(-1, 2).T


def shards(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.glob("*/shard-*")}


BATCHING = Batching(share_prompts=True, budget=64)


class StandIn:
    """Computes values that depend on an answer and its prompt alone, and counts what it is asked."""

    def __init__(self, value: Callable[[Answer], float] = lambda answer: 1.0) -> None:
        self.scored: list[bytes] = []
        self.calls = 0
        self.prepared = 0
        self._factor = value

    def __call__(self, answers: Sequence[Answer]) -> tuple[StandIn, Batching]:
        self.prepared += 1
        return self, BATCHING

    def token_log_probs(self, rows: Sequence[Row], share_prompts: bool) -> Any:
        assert share_prompts
        self.calls += 1
        self.scored += [answer_key(answer, None) for row in rows for answer in row.answers]
        return np.concatenate([self._factor(answer) * tokens_of(answer) for row in rows for answer in row.answers])


def run(
    dataset: Dataset, root: Path, scorer: Any, definition: LogProbDefinition = PLAIN
) -> tuple[PairLogProbs, ReferenceStore]:
    store = ReferenceStore(root, {"ld_alpha": definition.ld_alpha})
    return reference_log_probs(dataset, definition, store, scorer, Processes()), store
