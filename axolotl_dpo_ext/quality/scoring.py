"""Scores every pair once; everything that is decided afterwards needs no second reading."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np

from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck
from axolotl_dpo_ext.quality.holdout import group_key
from axolotl_dpo_ext.quality.pairs import iter_pairs, to_batch
from axolotl_dpo_ext.quality.text import count_words
from axolotl_dpo_ext.settings import Policy
from axolotl_dpo_ext.vocabulary import Problem, RunStopped, unknown_name

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from axolotl_dpo_ext.quality.pairs import CountTokens, Pair
    from axolotl_dpo_ext.settings import Policy, QualitySettings

logger = logging.getLogger(__name__)
_POLICIES = get_args(Policy)


class CheckFailedError(RunStopped, RuntimeError):
    """A check raised, or did not return one score for each pair."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A dataset's pairs with all that the audit decides from. Arrays have one entry per row, shape ``(n,)``.

    Attributes:
        dataset: The data as it was given.
        checks: All checks known, run or not, in the order in which they are shown.
        scores: Scores by check, float64, NaN where a check does not apply; only checks that were run.
        faults: What is wrong with malformed rows, by row.
        log_ratio: Natural logarithm of chosen : rejected length, NaN for malformed rows.
        keys: Group key of the prompt.
        unit: What lengths were counted in, such as ``tokens``.
        embedder: Name of the embedder.
        sources: Where each row is from, or ``None``.
    """

    dataset: Dataset
    checks: tuple[PairCheck, ...]
    scores: dict[str, NDArray[np.float64]]
    faults: dict[int, str]
    log_ratio: NDArray[np.float64]
    keys: NDArray[np.uint64]
    unit: str
    embedder: str
    sources: Sequence[str] | None = None


def policy_of(check: PairCheck, settings: QualitySettings) -> Policy:
    """Returns what happens to pairs that a check flags: the user's policy, else the check's own."""
    return settings.policy.get(check.name, check.default_policy)


def threshold_of(check: PairCheck, settings: QualitySettings) -> float:
    """Returns the score above which a check flags a pair.

    Raises:
        CheckFailedError: The check raised, or named no finite number.
    """
    try:
        threshold = float(check.threshold(settings))
        if not math.isfinite(threshold):
            raise ValueError(f"{threshold} is no threshold")
    except Exception as error:
        raise CheckFailedError(_failure(check, "its threshold", error)) from error
    return threshold


def _failure(check: PairCheck, where: str, error: Exception) -> str:
    return (
        f"quality check {check.name!r} of {type(check).__module__} failed on {where}: {type(error).__name__}: {error}\n"
        f"    fix: mend or uninstall it, or leave it out with `policy: {{{check.name}: keep}}`"
    )


def check_policies(settings: QualitySettings, checks: Sequence[PairCheck]) -> list[Problem]:
    """Returns a problem for every policy of an unknown check, and for checks that cannot be used."""
    names = [check.name for check in checks]
    problems = [
        unknown_name(f"dpo_ext.quality.policy.{name}", name, names, "check")
        for name in settings.policy
        if name not in names
    ]
    problems += _twice(names, "check")
    return problems + [_bad_policy(check) for check in checks if check.default_policy not in _POLICIES]


def check_embedder(settings: QualitySettings, embedders: Sequence[Embedder]) -> list[Problem]:
    """Returns a problem if the embedder of the settings is unknown, or if two have the same name."""
    names = [embedder.name for embedder in embedders]
    problems = _twice(names, "embedder")
    if settings.embedder not in names:
        problems.append(unknown_name("dpo_ext.quality.embedder", settings.embedder, names, "embedder"))
    return problems


def score_pairs(
    dataset: Dataset,
    settings: QualitySettings,
    checks: Sequence[PairCheck],
    embedder: Embedder,
    count_tokens: CountTokens | None,
    sources: Sequence[str] | None,
    batch_size: int,
) -> Scored:
    """Runs every check that is not switched off over every pair, a batch of rows in memory at a time."""
    from datasets.utils import tqdm  # honours the user's wish to see no progress bars

    n, started = len(dataset), time.perf_counter()
    active = [check for check in checks if policy_of(check, settings) != "keep"]
    scores = {check.name: np.full(n, np.nan) for check in active}
    log_ratio, keys = np.full(n, np.nan), np.zeros(n, dtype=np.uint64)
    faults: dict[int, str] = {}
    start = 0
    # `delay`: small sets are done before a bar is worth showing.
    with tqdm(total=n, desc="Auditing pairs", unit=" pairs", delay=2.0) as bar:
        for pairs in iter_pairs(dataset, batch_size):
            rows = slice(start, start + len(pairs))
            batch = to_batch(pairs, count_tokens or count_words)
            for check in active:
                scores[check.name][rows] = _score(check, batch, settings, embedder, start)
            log_ratio[rows] = _log_ratio(batch)
            keys[rows] = [group_key(pair) for pair in pairs]
            faults.update(_faults(pairs, start))
            start += len(pairs)
            bar.update(len(pairs))
    seconds = time.perf_counter() - started
    logger.info("audited %d pairs in %.1f s with %s", n, seconds, ", ".join(scores) or "no check")
    unit = "tokens" if count_tokens else "whitespace words"
    return Scored(dataset, tuple(checks), scores, faults, log_ratio, keys, unit, embedder.name, sources)


def _score(
    check: PairCheck, batch: PairBatch, settings: QualitySettings, embedder: Embedder, start: int
) -> NDArray[np.float64]:
    """Returns a check's scores of a batch; malformed pairs are shown only to checks that ask for them."""
    rows = [row for row, fault in enumerate(batch.faults) if check.sees_malformed or not fault]
    scores = np.full(len(batch), np.nan)
    if not rows:
        return scores
    seen = batch if len(rows) == len(batch) else batch.take(rows)
    try:
        found = np.asarray(check.score(seen, settings, embedder), dtype=np.float64)
        if found.shape != (len(rows),):
            raise ValueError(f"it returned shape {found.shape} for {len(rows)} pairs, not one score each")
    except Exception as error:
        where = f"rows {start} to {start + len(batch) - 1}"
        raise CheckFailedError(_failure(check, where, error)) from error
    scores[rows] = found
    return scores


def _log_ratio(batch: PairBatch) -> NDArray[np.float64]:
    chosen, rejected = np.maximum(batch.chosen_tokens, 1), np.maximum(batch.rejected_tokens, 1)
    malformed = np.array([bool(fault) for fault in batch.faults])
    return np.where(malformed, np.nan, np.log(chosen / rejected))


def _faults(pairs: Sequence[Pair], start: int) -> dict[int, str]:
    return {row: pair.fault for row, pair in enumerate(pairs, start) if pair.fault}


def _twice(names: Sequence[str], kind: str) -> list[Problem]:
    return [
        Problem(
            setting="dpo_ext.quality",
            found=f"two {kind}s named {name!r}",
            reason=f"settings name a {kind}, so each name must be used once",
            fix="uninstall or rename one of them",
        )
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]


def _bad_policy(check: PairCheck) -> Problem:
    return Problem(
        setting=f"dpo_ext.quality.policy.{check.name}",
        found=f"default policy {check.default_policy!r} of {type(check).__qualname__}",
        reason=f"a policy is one of {', '.join(_POLICIES)}",
        fix="correct the check's `default_policy`",
    )
