"""A complete third-party plugin: a reference strategy, a pair check, a set check, an embedder, a hardware preset."""

from __future__ import annotations

import math
import zlib

import numpy as np

from axolotl_dpo_ext import hookimpl
from axolotl_dpo_ext.hardware import HardwarePreset
from axolotl_dpo_ext.quality import PairCheck, Scores, SetCheck
from axolotl_dpo_ext.reference import Reference, ReferenceStrategy
from axolotl_dpo_ext.vocabulary import Problem

REFUSALS = ("i cannot", "i can't", "i'm sorry, but", "as an ai")


class RefusalPreferred(PairCheck):
    """Flags pairs whose chosen answer opens with a refusal while the rejected one answers."""

    name = "refusal_preferred"
    summary = "chosen refuses, rejected answers"
    default_policy = "flag"

    def threshold(self, settings):
        return 0.5

    def score(self, batch, settings, embedder):
        refuses = [[text.lower().startswith(REFUSALS) for text in side] for side in (batch.chosen, batch.rejected)]
        return np.asarray(refuses[0], dtype=float) - np.asarray(refuses[1], dtype=float)


class StockAnswer(SetCheck):
    """Flags pairs whose chosen answer is the chosen one of other pairs too, word for word."""

    name = "stock_answer"
    summary = "the same chosen answer as in other pairs"

    def threshold(self, settings):
        return 1.0

    def sketch(self, batch, settings):
        return np.array([zlib.crc32(text.strip().lower().encode()) for text in batch.chosen])

    def compare(self, sketches, settings, read):
        _, first, group, counts = np.unique(sketches, return_index=True, return_inverse=True, return_counts=True)
        earlier = np.where(first[group] < np.arange(len(group)), first[group], -1)
        return Scores(counts[group].astype(float), earlier)


class FirstLetters:
    """A toy embedder: how often each letter begins a word, shape ``(n, 26)``."""

    name = "first_letters"

    def encode(self, texts):
        counts = np.zeros((len(texts), 26))
        for row, text in enumerate(texts):
            for word in text.lower().split():
                if "a" <= word[0] <= "z":
                    counts[row, ord(word[0]) - ord("a")] += 1
        return counts


class UniformReference(Reference):
    """Gives every token of the vocabulary the same probability."""

    def __init__(self, vocabulary):
        self.token_log_prob = -math.log(vocabulary)

    def for_batches(self, batches):
        tokens = [batch["completion_mask"][:, 1:].sum(1) for batch in batches]
        return [(self.token_log_prob * count.float()).chunk(2) for count in tokens]


class Uniform(ReferenceStrategy):
    """No reference model at all: DPO then pulls the policy towards higher entropy instead of towards a model."""

    name = "uniform"
    summary = "every token equally likely, so that no reference model is needed"
    hands_over = True
    is_initial_policy = False

    def problems(self, config):
        if not config.get("load_in_4bit"):
            return []
        return [
            Problem(
                setting="dpo_ext.reference",
                found=f"{self.name}, with load_in_4bit: true",
                reason="this sample also shows how a strategy refuses a configuration",
                fix="remove load_in_4bit",
            )
        ]

    def reference(self, policy):
        return UniformReference(policy.model.config.vocab_size)


@hookimpl
def pair_checks():
    return [RefusalPreferred(), StockAnswer()]


@hookimpl
def embedders():
    return [FirstLetters()]


@hookimpl
def reference_strategies():
    return [Uniform()]


@hookimpl
def hardware_presets():
    return [HardwarePreset("laptop", "a laptop without a GPU", {"bf16": False, "optimizer": "adafactor"})]
