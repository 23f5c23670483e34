"""The audit: score every pair, decide by policy, split off a held-out set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from axolotl_dpo_ext.quality.base import Embedder, PairCheck
from axolotl_dpo_ext.quality.holdout import check_holdout
from axolotl_dpo_ext.quality.pairs import find_columns
from axolotl_dpo_ext.quality.result import AuditResult, QualityStop, decide
from axolotl_dpo_ext.quality.scoring import check_embedder, check_policies, score_pairs
from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem

if TYPE_CHECKING:
    from datasets import Dataset

    from axolotl_dpo_ext.settings import QualitySettings


def audit(
    dataset: Dataset,
    settings: QualitySettings,
    *,
    checks: Sequence[PairCheck] | None = None,
    embedders: Sequence[Embedder] | None = None,
    count_tokens: Callable[[list[str]], list[int]] | None = None,
    holdout: float | None = None,
    sources: str | Sequence[str] | None = None,
    batch_size: int = 1000,
) -> AuditResult:
    """Checks every preference pair, drops what the policies say, and splits off a held-out set.

    Deterministic: the same rows, settings and tokenizer give the same result in any row order.

    Args:
        dataset: Pairs with columns ``chosen`` and ``rejected`` and, unless both contain it, a prompt in
            ``prompt``, ``conversations`` or ``messages``; text, conversations or ShareGPT.
        settings: Thresholds, policies and the embedder's name.
        checks: The checks to run; the built-in ones by default.
        embedders: The embedders to choose from; the built-in one by default.
        count_tokens: Returns the length of each text in tokens. Without it lengths are whitespace words.
        holdout: Size of the held-out split: 0, a fraction below 1, or a number of pairs. Default:
            ``settings.holdout``, and no split if that is not set either.
        sources: Where each row is from, for figures per source: a column's name, or one label per row.
        batch_size: Rows in memory at a time. Has no influence on the result.

    Returns:
        The data to train on, the data held out, and a record of every flagged pair.

    Raises:
        ConfigurationError: If a setting names an unknown check or embedder, a column is missing, or the
            held-out split cannot be made.
        QualityStop: If more than ``max_drop_fraction`` of the pairs would be dropped, or no pair is left.
        CheckFailedError: If a check fails; the message names it and the rows.
    """
    from axolotl_dpo_ext.quality import builtins

    checks = builtins.pair_checks() if checks is None else checks
    embedders = builtins.embedders() if embedders is None else embedders
    wanted = next((size for size in (holdout, settings.holdout) if size is not None), 0.0)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1 row")
    if problems := settings_problems(settings, checks, embedders, wanted):
        raise ConfigurationError(problems)
    find_columns(dataset)
    if len(dataset) == 0:
        raise QualityStop("The dataset has no pairs: nothing to train on. Check its path and its `split`.")
    embedder = next(embedder for embedder in embedders if embedder.name == settings.embedder)
    labels = _labels(dataset, sources)
    scored = score_pairs(dataset, settings, checks, embedder, count_tokens, labels, batch_size)
    return decide(scored, settings, wanted)


def settings_problems(
    settings: QualitySettings, checks: Sequence[PairCheck], embedders: Sequence[Embedder], holdout: float
) -> list[Problem]:
    """Says what is wrong with the settings of an audit, before any data is read.

    Args:
        settings: Policies and the embedder's name.
        checks: The checks there are.
        embedders: The embedders there are.
        holdout: Size of the held-out split.
    """
    return check_policies(settings, checks) + check_embedder(settings, embedders) + check_holdout(holdout)


def _labels(dataset: Dataset, sources: str | Sequence[str] | None) -> Sequence[str] | None:
    labels = [str(label) for label in dataset[sources]] if isinstance(sources, str) else sources
    if labels is not None and len(labels) != len(dataset):
        raise ValueError(f"sources has {len(labels)} labels for {len(dataset)} rows; expected one each")
    return labels
