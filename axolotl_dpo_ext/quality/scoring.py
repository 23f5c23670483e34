"""Scores every pair once; everything that is decided afterwards needs no second reading."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from axolotl_dpo_ext.quality import near_duplicates
from axolotl_dpo_ext.quality.base import Check, Embedder, PairBatch, PairCheck, ReadTexts, Scores, SetCheck
from axolotl_dpo_ext.quality.checks.reference_likelihood import log_likelihoods
from axolotl_dpo_ext.quality.holdout import group_key
from axolotl_dpo_ext.quality.pairs import Pair
from axolotl_dpo_ext.quality.policies import CheckFailedError, failure, policy_of

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from axolotl_dpo_ext.quality.reading import PairReader
    from axolotl_dpo_ext.settings import QualitySettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found in some rows. Arrays have one entry per row, shape ``(n,)`` unless another is given.

    Attributes:
        scores: Scores by check, float64, NaN where a check does not apply; only checks that were run.
        matched: For checks that find other rows, the row that each pair was found against, -1 for none.
        faults: What is wrong with malformed rows, by row.
        log_ratio: Natural logarithm of chosen : rejected length, NaN for malformed and unpaired rows.
        log_likelihood: Mean log-probability of the tokens of both answers under the reference, nats, shape
            ``(n, 2)``; ``(0, 2)`` where the data has none.
        keys: Group key of the prompt.
        promptless: Number of well-formed rows without a prompt, whose key is that of their answers.
    """

    scores: dict[str, NDArray[np.float64]]
    matched: dict[str, NDArray[np.int64]]
    faults: dict[int, str]
    log_ratio: NDArray[np.float64]
    log_likelihood: NDArray[np.float64]
    keys: NDArray[np.uint64]
    promptless: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored(Findings):
    """A dataset with what was found in it: all that the audit decides from.

    Attributes:
        dataset: The data as it was given.
        checks: All checks known, run or not, in the order in which they are shown.
        unit: What lengths were counted in, such as ``tokens``.
        embedder: Name of the embedder.
        similar_prompts: Whether near-duplicate prompts have one group key.
        sources: Where each row is from, or ``None``.
        paired: Whether the rows are pairs.
        unreadable: Rows that could not be read from their file: they are never trained on.
    """

    dataset: Dataset
    checks: tuple[Check, ...]
    unit: str
    embedder: str
    similar_prompts: bool
    sources: Sequence[str] | None
    paired: bool
    unreadable: frozenset[int]

    @property
    def serving(self) -> tuple[Check, ...]:
        """The checks that serve this kind of data."""
        return tuple(check for check in self.checks if self.paired or check.on_singles)

    @cached_property
    def source_numbers(self) -> tuple[list[str], NDArray[np.int32]]:
        """The names of the sources, sorted, and each row's as a number, shape ``(n,)``; needs sources."""
        names = sorted(set(self.sources or ()))
        number = {name: i for i, name in enumerate(names)}
        rows = self.sources or ()
        return names, np.fromiter((number[name] for name in rows), dtype=np.int32, count=len(rows))


class PromptKeys:
    """Finds the rows of a test set by their prompts.

    Args:
        keys: Group key of every row of the test set, shape ``(m,)``.
    """

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    @property
    def digest(self) -> str:
        """A digest of the keys in the order of the rows."""
        return xxhash.xxh3_128_hexdigest(self._order.tobytes() + self._keys.tobytes())

    def rows(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Returns the first row of the test set with each of these keys, -1 where there is none."""
        place = np.searchsorted(self._keys, keys)
        place[place == len(self._keys)] = 0
        found = self._keys[place] == keys if len(self._keys) else np.zeros(len(keys), dtype=np.bool_)
        return np.where(found, self._order[place] if len(self._keys) else -1, -1)


def score_pairs(
    reader: PairReader,
    settings: QualitySettings,
    checks: Sequence[Check],
    embedder: Embedder,
    test: PromptKeys | None = None,
    batch_size: int = 1000,
) -> Findings:
    """Runs every check that is not switched off over every pair, a batch of rows in memory at a time."""
    from datasets.utils import tqdm  # honours the user's wish to see no progress bars

    started = time.perf_counter()
    scoring = _Scoring(len(reader), [c for c in checks if policy_of(c, settings) != "keep"], settings, embedder)
    # `delay`: small sets are done before a bar is worth showing.
    with tqdm(total=len(reader), desc="Auditing pairs", unit=" pairs", delay=2.0) as bar:
        for batch in reader.batches(batch_size):
            scoring.add(batch, test)
            bar.update(len(batch))
    scoring.compare(reader)
    seconds = time.perf_counter() - started
    logger.info("audited %d pairs in %.1f s with %s", len(reader), seconds, ", ".join(scoring.scores) or "no check")
    return scoring.findings()


class _Sketches:
    """What a check of the whole set keeps of each row, in arrays that are allocated once: lists would be copied."""

    def __init__(self, n: int) -> None:
        self.count = 0
        self._rows = np.empty(n, dtype=np.int64)
        self._all: NDArray[Any] | None = None

    def append(self, rows: NDArray[np.int64], sketches: NDArray[Any]) -> None:
        if self._all is None:
            self._all = np.empty((len(self._rows), *sketches.shape[1:]), dtype=sketches.dtype)
        fits = sketches.dtype.kind in "biuf" and np.can_cast(sketches.dtype, self._all.dtype, "safe")
        if not fits or sketches.shape[1:] != self._all.shape[1:]:
            raise ValueError(
                f"its sketches are {sketches.dtype} of shape {sketches.shape[1:]} here and {self._all.dtype} of shape "
                f"{self._all.shape[1:]} in the first batch; return numbers of one kind and as many for every row"
            )
        end = self.count + len(rows)
        self._rows[self.count : end], self._all[self.count : end] = rows, sketches
        self.count = end

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[Any]]:
        assert self._all is not None
        return self._rows[: self.count], self._all[: self.count]


class _Scoring:
    """Scores on their way from batches to arrays."""

    def __init__(self, n: int, checks: Sequence[Check], settings: QualitySettings, embedder: Embedder) -> None:
        self._checks, self._settings, self._embedder = checks, settings, embedder
        self.scores = {check.name: np.full(n, np.nan) for check in checks}
        self._matched: dict[str, NDArray[np.int64]] = {}
        self._faults: dict[int, str] = {}
        self._log_ratio, self._keys = np.full(n, np.nan), np.zeros(n, dtype=np.uint64)
        self._log_likelihood = np.empty((0, 2))
        self._promptless = 0
        self._sketches = {check.name: _Sketches(n) for check in checks if isinstance(check, SetCheck)}
        self._prompts: list[tuple[NDArray[np.int64], NDArray[np.uint32]]] = []
        self._start = 0

    def add(self, batch: PairBatch, test: PromptKeys | None) -> None:
        """Scores a batch, or keeps of it what checks of the whole set need."""
        rows = slice(self._start, self._start + len(batch))
        self._keys[rows] = batch_keys(batch)
        if test is not None:
            batch = dataclasses.replace(batch, in_test=test.rows(self._keys[rows]))
        sound = [row for row, fault in enumerate(batch.faults) if not fault]
        self._faults.update({self._start + row: fault for row, fault in enumerate(batch.faults) if fault})
        well_formed = batch if len(sound) == len(batch) else batch.take(sound)
        everything = np.arange(len(batch))
        for check in self._checks:
            seen, places = (batch, everything) if check.sees_malformed else (well_formed, np.asarray(sound, dtype=int))
            if len(seen):
                self._run(check, seen, places)
        if batch.desirable is None and sound:
            lengths = np.maximum(well_formed.chosen_tokens, 1) / np.maximum(well_formed.rejected_tokens, 1)
            self._log_ratio[self._start + np.asarray(sound)] = np.log(lengths)
        self._promptless += well_formed.prompts.count("")
        asked = [row for row, prompt in enumerate(batch.prompts) if prompt]
        if "chosen_logp" in batch.figures:
            if not len(self._log_likelihood):
                self._log_likelihood = np.full((len(self._keys), 2), np.nan)
            self._log_likelihood[rows] = log_likelihoods(batch)
        if self._settings.group_similar_prompts and asked:
            sketches = near_duplicates.sketch([[batch.prompts[row] for row in asked]])
            self._prompts.append((self._start + np.asarray(asked), sketches))
        self._start += len(batch)

    def findings(self) -> Findings:
        """Returns what was found."""
        return Findings(
            self.scores,
            self._matched,
            self._faults,
            self._log_ratio,
            self._log_likelihood,
            self._keys,
            self._promptless,
        )

    def compare(self, reader: PairReader) -> None:
        """Runs the checks of the whole set, and groups prompts that are nearly the same."""
        for check in self._checks:
            if isinstance(check, SetCheck) and self._sketches[check.name].count:
                rows, sketches = self._sketches.pop(check.name).arrays()
                self._compare(check, rows, sketches, _reader_of(reader, rows))
        if self._prompts:
            rows, sketches = (np.concatenate(each) for each in zip(*self._prompts, strict=True))
            self._keys[rows] = _grouped(sketches, self._keys[rows], _reader_of(reader, rows))

    def _run(self, check: Check, batch: PairBatch, places: NDArray[np.intp]) -> None:
        where = f"rows {self._start + places[0]} to {self._start + places[-1]}"
        rows = self._start + places
        try:
            if isinstance(check, SetCheck):
                sketch = np.asarray(check.sketch(batch, self._settings))
                if not sketch.ndim or len(sketch) != len(batch):
                    raise ValueError(f"it returned shape {sketch.shape} for {len(batch)} pairs, not one row each")
                self._sketches[check.name].append(rows, sketch)
            elif isinstance(check, PairCheck):
                self._take(check, rows, check.score(batch, self._settings, self._embedder), None)
            else:
                raise TypeError("it is neither a PairCheck nor a SetCheck, so nothing can be asked of it")
        except Exception as error:
            raise CheckFailedError(failure(check, where, error)) from error

    def _compare(self, check: SetCheck, rows: NDArray[np.int64], sketches: NDArray[Any], read: ReadTexts) -> None:
        try:
            self._take(check, rows, check.compare(sketches, self._settings, read), rows)
        except Exception as error:
            raise CheckFailedError(failure(check, "all rows", error)) from error

    def _take(self, check: Check, rows: NDArray[np.int64], found: Any, origin: NDArray[np.int64] | None) -> None:
        """Puts a check's scores where they belong; ``origin`` translates positions among sketches to rows."""
        values, matched = found if isinstance(found, Scores) else (found, None)
        values = np.asarray(values, dtype=np.float64)
        if values.shape != (len(rows),):
            raise ValueError(f"it returned shape {values.shape} for {len(rows)} pairs, not one score each")
        self.scores[check.name][rows] = values
        if matched is None:
            return
        matched = np.asarray(matched, dtype=np.int64)
        if matched.shape != values.shape or (origin is not None and (matched >= len(origin)).any()):
            raise ValueError("`matched` has to hold, for each pair, the position of one that was compared, or -1")
        if origin is not None:
            matched = np.where(matched >= 0, origin[matched], -1)
        self._matched.setdefault(check.name, np.full(len(self._keys), -1, dtype=np.int64))[rows] = matched


def batch_keys(batch: PairBatch) -> NDArray[np.uint64]:
    """Returns the group key of every pair of a batch, shape ``(n,)``."""
    texts = zip(batch.prompts, batch.chosen, batch.rejected, strict=True)
    return np.array([group_key(Pair(*each)) for each in texts], dtype=np.uint64)


def _reader_of(reader: PairReader, rows: NDArray[np.int64]) -> ReadTexts:
    def read(places: Sequence[int] | NDArray[np.int64]) -> list[tuple[str, str, str]]:
        pairs = reader.pairs(rows[np.asarray(places, dtype=np.int64)].tolist())
        return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]

    return read


def _grouped(sketches: NDArray[np.uint32], keys: NDArray[np.uint64], read: ReadTexts) -> NDArray[np.uint64]:
    """Gives nearly equal prompts one key: the smallest of the group, so that no order plays a part."""

    def prompts(places: Sequence[int] | NDArray[np.int64]) -> list[tuple[str, ...]]:
        return [(prompt,) for prompt, _, _ in read(places)]

    labels = near_duplicates.groups(sketches, keys, prompts)
    smallest = np.full(len(keys), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, labels, keys)
    return smallest[labels]
