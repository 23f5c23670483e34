"""Computes the reference log-probabilities that a store lacks, and reads those of a whole dataset."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from axolotl_dpo_ext.reference.batching import Row, make_batches, make_rows
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.rows import KEY_BYTES, Answer, LogProbDefinition, answer_key, read_pairs
from axolotl_dpo_ext.reference.store import ReferenceStore, StoredRows
from axolotl_dpo_ext.vocabulary import RunStopped

if TYPE_CHECKING:
    from datasets import Dataset

LOG = logging.getLogger(__name__)

# Rows of a dataset whose token ids are in memory at once; prompts are shared within such a part.
PART_PAIRS = 20_000
# A shard is written about every so many tokens: what a killed process loses at most.
SHARD_TOKENS = 2**17


class Scorer(Protocol):
    """What computes: ``AnswerScorer``, or a stand-in that measures everything around it."""

    def token_log_probs(self, rows: Sequence[Row], share_prompts: bool) -> Any:
        """Returns the log-probabilities of the answers' tokens, one after another."""
        ...


@dataclass(frozen=True)
class Batching:
    """How answers are put into batches.

    Attributes:
        share_prompts: Whether a prompt is computed once for all its answers.
        budget: Most tokens of a batch.
    """

    share_prompts: bool
    budget: int


@dataclass
class PairLogProbs:
    """The reference log-probabilities of a dataset, in its order.

    Attributes:
        chosen: Summed over the answer's tokens, shape ``(pairs,)``, float32.
        rejected: As ``chosen``.
        computed: How many answers were computed, by all processes together.
        read: How many different answers were stored already.
        seconds: How long computing took.
    """

    chosen: NDArray[np.float32]
    rejected: NDArray[np.float32]
    computed: int = 0
    read: int = 0
    seconds: float = 0.0


@dataclass
class _Part:
    """Some rows of a dataset.

    Attributes:
        keys: Key of each pair's chosen, then rejected answer, shape ``(2 · pairs, KEY_BYTES)``.
        empty: Which of them have no token that counts: their log-probability is 0, and nothing is stored.
        answers: The different answers that are not empty.
        answer_keys: Their keys, shape ``(answers, KEY_BYTES)``.
    """

    keys: NDArray[np.uint8]
    empty: NDArray[np.bool_]
    answers: list[Answer]
    answer_keys: NDArray[np.uint8]


def reference_log_probs(
    dataset: Dataset,
    definition: LogProbDefinition,
    store: ReferenceStore,
    scorer: Callable[[Sequence[Answer]], tuple[Scorer, Batching]],
    processes: Processes,
    name: str = "train",
) -> PairLogProbs:
    """Reads the reference log-probabilities of a dataset from a store, after computing those it lacks.

    Every process computes its share of the shards and reads those of the others; the values do not depend on how
    many there are.

    Args:
        dataset: A dataset as TRL tokenized it.
        definition: What the log-probability of an answer is.
        store: Where values are kept.
        scorer: Called with some answers once any has to be computed; returns what computes them, and in what batches.
        processes: The processes of this run.
        name: The dataset's name, for the progress bar and messages.

    Raises:
        StoreError: A value can't be stored or read.
        RunStopped: A value is not finite, or a process failed.
    """
    result = PairLogProbs(np.empty(len(dataset), np.float32), np.empty(len(dataset), np.float32))
    for start in range(0, len(dataset), PART_PAIRS):
        stop = min(start + PART_PAIRS, len(dataset))
        with processes.failing_together():
            part = _read_part(dataset, definition, start, stop)
            lacking = ~store.lookup(part.answer_keys)[2]
        # One process may have seen a shard more than another; all must plan the same.
        missing = np.asarray(processes.gather(lacking)[0])
        result.read += int((~missing).sum())
        if missing.any():
            began = time.monotonic()
            _compute(part, missing, definition, store, scorer, processes, f"{name} pairs {start:,}-{stop:,}")
            result.computed += int(missing.sum())
            result.seconds += time.monotonic() - began
        with processes.failing_together():
            if missing.any() or lacking.any():
                store.refresh()
            values = _values(part, store, name).reshape(-1, 2)
        result.chosen[start:stop], result.rejected[start:stop] = values[:, 0], values[:, 1]
    return result


def _read_part(dataset: Dataset, definition: LogProbDefinition, start: int, stop: int) -> _Part:
    keys: list[bytes] = []
    empty: list[bool] = []
    different: dict[bytes, Answer] = {}
    for pair in read_pairs(dataset, definition, start, stop):
        for answer in (pair.chosen, pair.rejected):
            key = answer_key(answer, definition.ld_alpha)
            keys.append(key)
            empty.append(answer.tokens == 0)
            if answer.tokens:
                different.setdefault(key, answer)
    return _Part(_as_array(keys), np.array(empty, np.bool_), list(different.values()), _as_array(list(different)))


def _as_array(keys: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def _values(part: _Part, store: ReferenceStore, name: str) -> NDArray[np.float32]:
    logps, _tokens, found = store.lookup(part.keys)
    logps[part.empty] = 0.0
    lacking = int((~found & ~part.empty).sum())
    if lacking:
        raise RunStopped(
            f"the reference store {store.path} lacks {lacking} answers of the {name} pairs after they were computed\n"
            f"    why: another process removed or damaged what this run wrote\n"
            f"    fix: start again; what is stored is not computed twice"
        )
    return logps


def _compute(
    part: _Part,
    missing: NDArray[np.bool_],
    definition: LogProbDefinition,
    store: ReferenceStore,
    scorer: Callable[[Sequence[Answer]], tuple[Scorer, Batching]],
    processes: Processes,
    label: str,
) -> None:
    _check_store(store, processes)
    with processes.failing_together():
        computes, found = scorer(part.answers)
    batching = _common(processes.gather(found))
    with processes.failing_together():
        shards = plan_shards(part.answers, missing, batching)
        writer = _ShardWriter(part, definition, store, computes, batching)
        writer.write(shards[processes.rank :: processes.count], label, hidden=processes.rank != 0)


def _common(found: Sequence[Batching]) -> Batching:
    """Returns batches that serve every process: all must plan the same shards."""
    return Batching(all(one.share_prompts for one in found), min(one.budget for one in found))


def _check_store(store: ReferenceStore, processes: Processes) -> None:
    with contextlib.ExitStack() as marked:
        with processes.failing_together():
            mark = marked.enter_context(store.marked())
        marks = processes.gather(mark)
        with processes.failing_together():  # its end is also where everybody has looked, and marks may go
            store.check_shared(marks)


def plan_shards(answers: Sequence[Answer], missing: NDArray[np.bool_], batching: Batching) -> list[list[list[Row]]]:
    """Plans what is computed together.

    The plan is made of all answers and leaves out the shards that are stored whole: so a run that was killed and one
    that was not compute the same batches, and store the same bits. What is missing of shards that are stored in part,
    because rows were added, is planned on its own, in the rows of the whole plan for the same reason.

    Args:
        answers: All answers of a part.
        missing: Which are not stored, shape ``(answers,)``.
        batching: How they are put into batches.

    Returns:
        Shards of batches of rows; their indices point into ``answers``.
    """
    whole: list[list[list[Row]]] = []
    left: list[Row] = []
    for shard in _shards(make_rows(answers, batching.share_prompts, batching.budget), batching):
        rows = [row for batch in shard for row in batch]
        if all(missing[index] for row in rows for index in row.indices):
            whole.append(shard)
        else:
            left += [_only(row, missing) for row in rows if missing[list(row.indices)].any()]
    return whole + _shards(sorted(left, key=lambda row: (row.length, row.indices)), batching)


def _only(row: Row, missing: NDArray[np.bool_]) -> Row:
    kept = [one for one in zip(row.answers, row.indices, strict=True) if missing[one[1]]]
    return Row(tuple(answer for answer, _ in kept), tuple(index for _, index in kept))


def _shards(rows: list[Row], batching: Batching) -> list[list[list[Row]]]:
    shards: list[list[list[Row]]] = []
    tokens = SHARD_TOKENS
    for batch in make_batches(rows, batching.budget, padded=not batching.share_prompts):
        if tokens >= SHARD_TOKENS:
            shards.append([])
            tokens = 0
        shards[-1].append(batch)
        tokens += sum(row.length for row in batch)
    return shards


@dataclass
class _ShardWriter:
    part: _Part
    definition: LogProbDefinition
    store: ReferenceStore
    scorer: Scorer
    batching: Batching
    most_rows: int | None = field(default=None, init=False)  # what fitted after a batch ran out of memory

    def write(self, shards: list[list[list[Row]]], label: str, hidden: bool) -> None:
        answers = sum(len(row.indices) for shard in shards for batch in shard for row in batch)
        tokens = sum(row.length for shard in shards for batch in shard for row in batch)
        began = time.monotonic()
        done = 0
        with tqdm(total=tokens, desc=f"reference, {label}", unit="tok", unit_scale=True, disable=hidden) as bar:
            for shard in shards:
                indices: list[int] = []
                values: list[float] = []
                for batch in shard:
                    values += self._score(batch)
                    indices += [index for row in batch for index in row.indices]
                    done += sum(len(row.indices) for row in batch)
                    bar.set_postfix_str(f"{done / 2 / (time.monotonic() - began):,.1f} pairs/s", refresh=False)
                    bar.update(sum(row.length for row in batch))
                self._keep(indices, values)
        if shards and not hidden:
            seconds = time.monotonic() - began
            LOG.info(
                "computed %d reference answers (%d tokens) in %.1f s: %.1f pairs/s, %.0f tokens/s",
                answers, tokens, seconds, answers / 2 / seconds, tokens / seconds,
            )  # fmt: skip

    def _keep(self, indices: list[int], values: list[float]) -> None:
        order = np.argsort(indices, kind="stable")  # what a shard holds must not depend on how it was batched
        rows = np.array(indices)[order]
        logps = np.array(values, np.float32)[order]
        tokens = np.array([self.part.answers[index].tokens for index in rows], np.int32)
        if not np.isfinite(logps).all():
            self._refuse(rows[~np.isfinite(logps)], logps[~np.isfinite(logps)])
        self.store.append(StoredRows(self.part.answer_keys[rows], logps, tokens))

    def _refuse(self, rows: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        key = self.part.answer_keys[rows[0]].tobytes().hex()
        raise RunStopped(
            f"the reference log-probability of {len(rows)} answers is not finite ({values[0]} for the answer {key}, "
            f"{self.part.answers[rows[0]].tokens} tokens)\n"
            f"    why: the reference model overflows in its dtype, or its weights are not finite\n"
            f"    fix: load it in bfloat16 or float32 instead of float16, and check the checkpoint; nothing of this "
            f"shard was stored"
        )

    def _score(self, batch: list[Row]) -> list[float]:
        if self.most_rows is not None and len(batch) > self.most_rows:
            return [value for part in _parts(batch, self.most_rows) for value in self._score(part)]
        try:
            flat = self.scorer.token_log_probs(batch, self.batching.share_prompts)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        else:
            flat = np.asarray(flat.cpu() if isinstance(flat, torch.Tensor) else flat, np.float64)
            return _sums(flat, [answer for row in batch for answer in row.answers], self.definition.ld_alpha)
        # Not in the handler: as long as the error is there, so is all that the failed batch had allocated.
        return self._score_smaller(batch, reason)

    def _score_smaller(self, batch: list[Row], reason: str) -> list[float]:
        torch.cuda.empty_cache()
        if len(batch) > 1:
            self.most_rows = math.ceil(len(batch) / 2)
            LOG.warning("a batch of %d rows ran out of memory; going on with at most %d", len(batch), self.most_rows)
            return self._score(batch)
        (row,) = batch
        if len(row.answers) > 1:
            alone = [Row((answer,), (index,)) for answer, index in zip(row.answers, row.indices, strict=True)]
            return [value for one in alone for value in self._score([one])]
        raise RunStopped(
            f"one answer of {row.length} tokens runs out of memory\n"
            f"    why: {reason}\n"
            f"    fix: lower sequence_len (TRL: max_length), or compute on a larger device with `dpo-precompute`"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device's memory, or the host's, is not enough.

    Args:
        error: What computing raised; cuBLAS and CPU allocators raise a plain ``RuntimeError``.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    )


def _parts(batch: list[Row], most: int) -> Iterator[list[Row]]:
    for start in range(0, len(batch), most):
        yield batch[start : start + most]


def _sums(flat: NDArray[np.float64], answers: list[Answer], ld_alpha: float | None) -> list[float]:
    """Sums token log-probabilities to one value for each answer, as ``compute_ref_log_probs`` of TRL does."""
    ends = np.cumsum([answer.tokens for answer in answers])
    values = []
    for answer, tokens in zip(answers, np.split(flat, ends[:-1]), strict=True):
        tail = 0.0 if ld_alpha is None else ld_alpha * tokens[answer.shared :].sum()
        values.append(float((tokens if ld_alpha is None else tokens[: answer.shared]).sum() + tail))
    return values
