"""Finds out, on real rows, how a model can be run fast without changing a value."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from axolotl_dpo_ext.reference.batching import Row, make_rows
from axolotl_dpo_ext.reference.logprobs import AnswerScorer
from axolotl_dpo_ext.reference.precompute import Batching, is_out_of_memory
from axolotl_dpo_ext.reference.rows import Answer
from axolotl_dpo_ext.vocabulary import RunStopped

LOG = logging.getLogger(__name__)

# Largest relative difference of an answer's log-probability that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
LOW_PRECISION_TOLERANCE = 0.02
# More tokens a batch make a CPU no faster: its caches are full.
CPU_BUDGET = 2048
LEAST_BUDGET, MOST_BUDGET = 1024, 65_536
# What a batch may take of the memory that is free on an accelerator.
MEMORY_SHARE = 0.6
# Short rows compared, and the most logits that comparing one may take (4 GiB in float32).
SHORT_ROWS = 2
PROBE_LOGITS = 2**30


def choose_batching(scorer: AnswerScorer, model: nn.Module, answers: Sequence[Answer]) -> Batching:
    """Chooses how answers are put into batches.

    Args:
        scorer: What computes.
        model: The model behind it.
        answers: Real answers.

    Returns:
        Whether prompts are shared: only if that gives, on some of these rows, what the model itself gives; and the
        most tokens of a batch, from the memory that a batch takes.

    Raises:
        RunStopped: Even without sharing prompts the values are not the model's own, or no answer is short enough to
            find that out in the memory there is.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    most = PROBE_LOGITS // vocabulary
    reason = f"the model's own logits would take more than {PROBE_LOGITS * 4 >> 30} GiB"
    while True:
        rows = _probe_rows(answers, model, most, reason)
        try:
            return _choose(scorer, model, rows, longest=max(len(answer.ids) for answer in answers))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = f"computing a longer one ran out of memory: {error}"
        # Not in the handler: as long as the error is there, so is all that was allocated.
        torch.cuda.empty_cache()
        most = _longest(rows) // 2
        LOG.warning("comparing ways of computing ran out of memory; going on with answers of at most %d tokens", most)


def _choose(scorer: AnswerScorer, model: nn.Module, rows: list[Row], longest: int) -> Batching:
    wanted = [_plain(model, answer, scorer) for row in rows for answer in row.answers]
    tolerance = TOLERANCE.get(scorer.dtype, LOW_PRECISION_TOLERANCE)
    name = type(model).__name__
    found = _fault(_difference(scorer, rows, True, wanted), tolerance)
    if not found and _depends_on_length(model) and _longest(rows) < longest:
        found = f"what is so for {_longest(rows)} tokens need not be for {longest}"
    if found:
        LOG.warning("%s: each answer is computed with its own prompt, since sharing it is not exact (%s)", name, found)
        _check_unshared(scorer, rows, wanted, tolerance, model)
    else:
        LOG.info("%s: prompts are computed once for all their answers", name)
    return Batching(not found, _budget(scorer, rows, not found))


def _longest(rows: list[Row]) -> int:
    return max(len(answer.ids) for row in rows for answer in row.answers)


def _fault(difference: float | Exception, tolerance: float) -> str:
    """Returns what is wrong with values that differ so much, ``""`` if nothing is."""
    if isinstance(difference, Exception):
        return f"{type(difference).__name__}: {difference}"
    return "" if difference <= tolerance else f"values differ by {difference:.1e}"


def _check_unshared(
    scorer: AnswerScorer, rows: list[Row], wanted: list[NDArray[np.float64]], tolerance: float, model: nn.Module
) -> None:
    alone = [Row((answer,), (0,)) for row in rows for answer in row.answers]
    fault = _fault(_difference(scorer, alone, False, wanted), tolerance)
    if not fault:
        return
    name, scaled = type(model).__name__, _scales_positions(model)
    if scaled:
        raise RunStopped(
            f"the log-probabilities of {name} depend on which answers are computed together ({fault})\n"
            f"    why: its rotary positions ({scaled}) are scaled by the longest row of a batch, also in TRL, so a "
            f"stored value would not be the one of a training batch\n"
            f"    fix: lower sequence_len (TRL: max_length) to the length from which it scales, or use "
            f"`reference: gpu`, or `adapter` with a LoRA"
        )
    raise RunStopped(
        f"the log-probabilities of {name} can't be computed at the answers' positions only ({fault})\n"
        f"    why: its head needs more than the hidden states of those positions, or these depend on tokens that "
        f"come after, or on what else is in a batch, as with 8-bit weights\n"
        f"    fix: use `reference: gpu`, or `adapter` with a LoRA"
    )


def _probe_rows(answers: Sequence[Answer], model: nn.Module, most: int, reason: str) -> list[Row]:
    """Returns short rows, where rounding shows most, and a long one, of answers of at most so many tokens."""
    rows = make_rows([answer for answer in answers if len(answer.ids) <= most], True, most)
    if not rows:
        raise RunStopped(
            f"every answer has more than {most} tokens, too many to compare ways of computing them\n"
            f"    why: {reason}\n"
            f"    fix: lower sequence_len (TRL: max_length), compute on a larger device with `dpo-precompute`, or use "
            f"`reference: gpu`"
        )
    short = [row for row in rows if _shows_sharing(row)][:SHORT_ROWS] or rows[:SHORT_ROWS]
    # Where a token's place matters by itself, or memory is measured, the longest; elsewhere it would only take time.
    long = rows[-1] if _depends_on_length(model) or next(model.parameters()).is_cuda else rows[len(rows) // 2]
    chosen = {row.indices: row for row in [*short, long]}
    rows = [_two_answers(row) if _shows_sharing(row) else _twice(row) for row in chosen.values()]
    # One row alone does not show whether rows are kept apart.
    return rows if len(rows) > 1 else rows * 2


def _depends_on_length(model: nn.Module) -> bool:
    """Whether a model attends otherwise, or scales positions otherwise, from some length on."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "local_attention"))
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return any(windows) or kinds != {"full_attention"} or _scales_positions(model) is not None


def _scales_positions(model: nn.Module) -> str | None:
    """Returns the kind of rotary embedding whose frequencies follow the longest row of a batch, if a model has it."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    rope = json.dumps(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None), default=str)
    return next((kind for kind in ("dynamic", "longrope") if f'"{kind}"' in rope), None)


def _two_answers(row: Row) -> Row:
    """Returns the row with its first answer and the next one that shows sharing: more of them show no more."""
    second = next(i for i, answer in enumerate(row.answers) if i and answer.tokens > 1)
    return Row((row.answers[0], row.answers[second]), (row.indices[0], row.indices[second]))


def _shows_sharing(row: Row) -> bool:
    """Whether a token of an answer goes through the model behind another answer."""
    return any(answer.tokens > 1 for answer in row.answers[1:])


def _twice(row: Row) -> Row:
    """Returns a row in which an answer stands behind itself: what is found out holds for later data sets as well."""
    ids = row.answers[0].ids
    start = max(1, min(row.answers[0].first_predicted, len(ids) - 2))
    answer = Answer(ids, start, len(ids) - start)
    return Row((answer, answer), row.indices[:1] * 2)


@torch.inference_mode()
def _plain(model: nn.Module, answer: Answer, scorer: AnswerScorer) -> NDArray[np.float64]:
    """Returns the token log-probabilities of an answer as the model itself gives them, as TRL computes them."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(answer.ids)[None].to(device)
    with scorer.autocast():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
    log_probs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return log_probs[answer.first_predicted - 1 :].double().cpu().numpy()  # type: ignore[no-any-return]


def _difference(
    scorer: AnswerScorer, rows: list[Row], share_prompts: bool, wanted: list[NDArray[np.float64]]
) -> float | Exception:
    try:
        flat = scorer.token_log_probs(rows, share_prompts).double().cpu().numpy()
    except Exception as error:  # whatever a model raises where it is run in a way that it was not made for
        if is_out_of_memory(error):
            raise
        return error
    expected = np.concatenate(wanted)
    if flat.shape != expected.shape or not np.isfinite(flat).all():
        return float("inf")
    ends = np.cumsum([len(tokens) for tokens in wanted])[:-1]
    # Sums alone could agree where tokens do not.
    worst_sum = max(
        abs(got.sum() - want.sum()) / max(abs(want.sum()), 1.0)
        for got, want in zip(np.split(flat, ends), wanted, strict=True)
    )
    worst_token = float(np.abs(flat - expected).max() / max(float(np.abs(expected).max()), 1.0))
    return float(max(worst_sum, worst_token))


def _budget(scorer: AnswerScorer, rows: list[Row], share_prompts: bool) -> int:
    if scorer.device.type != "cuda":
        return CPU_BUDGET
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(scorer.device)
    before = torch.cuda.memory_allocated(scorer.device)
    rows = rows if share_prompts else [Row((answer,), (0,)) for row in rows for answer in row.answers]
    scorer.token_log_probs(rows, share_prompts)
    used = torch.cuda.max_memory_allocated(scorer.device) - before
    tokens = sum(row.length for row in rows) if share_prompts else len(rows) * max(row.length for row in rows)
    free = torch.cuda.mem_get_info(scorer.device)[0]
    budget = int(MEMORY_SHARE * free / max(used / tokens, 1.0))
    # A power of two: a run that goes on where another was killed finds the same, and so makes the same batches.
    return 1 << max(LEAST_BUDGET, min(MOST_BUDGET, budget)).bit_length() - 1
