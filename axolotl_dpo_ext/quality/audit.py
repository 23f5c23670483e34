"""The audit: score every pair, decide by policy, split off a held-out set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.quality.arguments import (
    check_extensions,
    check_numbers,
    check_tokenizer,
    known_faults,
    quality_settings,
    source_labels,
)
from axolotl_dpo_ext.quality.base import Check, Embedder
from axolotl_dpo_ext.quality.cache import score_once, scores_key
from axolotl_dpo_ext.quality.columns import find_columns
from axolotl_dpo_ext.quality.decisions import decide
from axolotl_dpo_ext.quality.embedding import embedder_problems, find_embedder
from axolotl_dpo_ext.quality.holdout import check_holdout
from axolotl_dpo_ext.quality.policies import check_policies, check_serving
from axolotl_dpo_ext.quality.reading import PairReader
from axolotl_dpo_ext.quality.result import AuditResult, QualityStop
from axolotl_dpo_ext.quality.scoring import Findings, PromptKeys, Scored, batch_keys, score_pairs
from axolotl_dpo_ext.quality.tokens import TextTokenizer
from axolotl_dpo_ext.settings import QualitySettings
from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem

if TYPE_CHECKING:
    from datasets import Dataset


def audit(
    dataset: Dataset,
    tokenizer: Any = None,
    settings: QualitySettings | Mapping[str, Any] | None = None,
    *,
    checks: Sequence[Check] | None = None,
    embedders: Sequence[Embedder] | None = None,
    max_length: int | None = None,
    single_bos: bool = False,
    holdout: float | None = None,
    test: Dataset | None = None,
    sources: str | Sequence[str] | None = None,
    faults: Mapping[int, str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    batch_size: int = 1000,
) -> AuditResult:
    """Checks every preference pair, drops what the policies say, and splits off a held-out set.

    Deterministic: the same rows, settings and tokenizer give the same result in any row order. Only of rows with
    exactly the same texts the first one stays, whatever else (a source, a score) tells them apart.

    Args:
        dataset: Pairs with columns ``chosen`` and ``rejected`` and, unless both contain it, a prompt in
            ``prompt``, ``conversations`` or ``messages``; text, conversations or ShareGPT; perhaps ``tools``. Or
            unpaired data with ``completion`` and ``label``, on which the checks run that fit there.
        tokenizer: The run's tokenizer. Lengths are counted in its tokens, after its chat template where the data
            are conversations. Without it lengths are words.
        settings: Thresholds, policies and the embedder's name, also as a mapping; the defaults if not given.
        checks: The checks to run; the built-in ones by default.
        embedders: The embedders that settings can name besides models; the built-in one by default.
        max_length: Tokens of prompt and answer that the run keeps (TRL's ``max_length``, Axolotl's
            ``sequence_len``). Without it nothing is truncated.
        single_bos: Whether the trainer puts BOS in front of a text only where it has none, as TRL's trainers for ORPO
            and CPO (SimPO) do. The others tokenize with all special tokens and may train on two.
        holdout: Size of the held-out split: 0, a fraction below 1, or a number of pairs. Default:
            ``settings.holdout``, and no split if that is not set either.
        test: Test data that the run will evaluate on; pairs whose prompt is there too are flagged.
        sources: Where each row is from, for figures per source and a held-out split that takes from each its share:
            a column's name, or one label per row.
        faults: What is known to be wrong with rows, by row, from whoever read the files.
        cache: Folder for scores. An audit of the same rows with the same tokenizer and checks reads them there, also
            with other thresholds; of several processes one computes them and the others wait and read.
        batch_size: Rows in memory at a time. Has no influence on the result.

    Returns:
        The data to train on, the data held out, the data dropped, and a record of every flagged pair.

    Raises:
        ConfigurationError: If a setting names an unknown check or embedder, or one that does not serve this data, a
            column is missing, or the held-out split cannot be made.
        TypeError: If an argument is of a kind that it cannot be; the message says what to pass.
        QualityStop: If more than ``max_drop_fraction`` of the pairs would be dropped, or no pair is left.
        CheckFailedError: If a check fails; the message names it and the rows.
    """
    from axolotl_dpo_ext.quality import builtins

    settings = quality_settings(settings)
    check_tokenizer(tokenizer)
    check_numbers(max_length, holdout, batch_size)
    checks = builtins.pair_checks() if checks is None else checks
    embedders = builtins.embedders() if embedders is None else embedders
    check_extensions(checks, embedders)
    wanted = next((size for size in (holdout, settings.holdout) if size is not None), 0.0)
    paired = find_columns(dataset).paired
    serving = tuple(check for check in checks if paired or check.on_singles)
    problems = settings_problems(settings, checks, embedders, wanted)
    if problems := problems + check_serving(settings, checks, serving):
        raise ConfigurationError(problems)
    if len(dataset) == 0:
        raise QualityStop("The dataset has no pairs: nothing to train on. Check its path and its `split`.")
    labels = source_labels(dataset, sources)
    reader = PairReader(dataset, TextTokenizer.of(tokenizer, single_bos), max_length, known_faults(faults, dataset))
    embedder = find_embedder(settings.embedder, embedders)
    keys = None if test is None else prompt_keys(test, batch_size)

    def score() -> Findings:
        return score_pairs(reader, settings, serving, embedder, keys, batch_size)

    found = (
        score()
        if cache is None
        else score_once(Path(cache), scores_key(reader, settings, serving, embedder, keys), score)
    )
    scored = Scored(
        **vars(found),
        dataset=dataset,
        checks=tuple(checks),
        unit=reader.tokenizer.unit,
        embedder=settings.embedder,
        similar_prompts=settings.group_similar_prompts,
        sources=labels,
        paired=paired,
        unreadable=frozenset(reader.faults),
    )
    return decide(scored, settings, wanted)


def settings_problems(
    settings: QualitySettings, checks: Sequence[Check], embedders: Sequence[Embedder], holdout: float
) -> list[Problem]:
    """Says what is wrong with the settings of an audit, before any data is read.

    Args:
        settings: Policies and the embedder's name.
        checks: The checks there are.
        embedders: The embedders there are.
        holdout: Size of the held-out split.
    """
    return check_policies(settings, checks) + embedder_problems(settings.embedder, embedders) + check_holdout(holdout)


def prompt_keys(dataset: Dataset, batch_size: int = 1000) -> PromptKeys:
    """Reads the prompts of test data.

    Raises:
        ConfigurationError: If it holds no preference data.
    """
    find_columns(dataset, "test")
    reader = PairReader(dataset, TextTokenizer.of(None))
    keys = [batch_keys(batch) for batch in reader.batches(batch_size)]
    return PromptKeys(np.concatenate([np.empty(0, dtype=np.uint64), *keys]))
