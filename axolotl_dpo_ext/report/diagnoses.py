"""What the figures of a run say about it, in plain sentences.

Every rule is one function, silent where it has nothing to say, and quotes the figures it goes by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from axolotl_dpo_ext.report.training_log import (
    ACCURACY,
    CHOSEN,
    LOSS,
    MARGIN,
    REJECTED,
    Record,
    TrainingLog,
)

LN_2 = math.log(2.0)

_STUCK_WITHIN = 1e-3  # of ln 2; one informative batch at a usual learning rate moves the loss further
_TIE = 1e-4  # rounding of a mean margin; log-probabilities have some seven digits
_STEP_0_NOISE = 0.5  # nats; two kernels or precisions differ by less on a summed log-probability
_CHOSEN_FELL_TO = -1.0  # nats; smaller is within what sampling the batches moves
_FELL_BY = 0.05  # in accuracy; a smaller change is within the noise of a few hundred held-out pairs


def is_tie(record: Record) -> bool:
    """Whether a record was measured before the first update, with the policy equal to the reference.

    Then every margin is 0, and TRL, which asks for chosen > rejected, counts every pair as wrong. Log-probabilities
    that were stored before differ by rounding, which then decides.
    """
    return record.step == 0 and abs(record.metrics.get(MARGIN, math.inf)) < _TIE


def has_ln_2_start(log: TrainingLog) -> bool:
    """Whether the loss of a policy equal to the reference is ln 2: it is for the plain sigmoid loss."""
    return log.has_reference and log.loss_types == ["sigmoid"]


def diagnose(log: TrainingLog) -> tuple[str, ...]:
    """Returns the diagnoses of a run, the most basic first."""
    return tuple(note for rule in _RULES for note in rule(log))


def _incomplete(log: TrainingLog) -> Iterator[str]:
    if log.ended is None:
        of = f" of {log.max_steps}" if log.max_steps else ""
        yield (
            "The log has no end: the run was stopped from outside, failed, or is still running. "
            f"Figures are up to step {log.last_step}{of}."
        )
    if log.ended == "stopped_early" and log.max_steps:
        yield f"The run was stopped by a callback at step {log.last_step} of {log.max_steps}."
    if log.truncated:
        yield "The last line of the log is cut short and was left out."
    if log.unreadable:
        lines = "1 line" if log.unreadable == 1 else f"{log.unreadable} lines"
        yield f"{lines} of the log could not be read and were left out."


def _non_finite(log: TrainingLog) -> Iterator[str]:
    for where, records in (("training", log.train), ("held-out", log.all_heldout)):
        bad: dict[str, list[int]] = {}
        for record in records:
            for name, value in record.metrics.items():
                if not math.isfinite(value):
                    bad.setdefault(name, []).append(record.step)
        for name, steps in bad.items():
            times = "once" if len(steps) == 1 else f"{len(steps)} times"
            yield (f"Non-finite {where} values: {name} was NaN or infinite {times}, first at step {min(steps)}.")


def _no_heldout(log: TrainingLog) -> Iterator[str]:
    if not log.heldout:
        yield (
            "There is no held-out evaluation, so nothing here says how the model does on pairs it was not "
            "trained on. Training accuracy alone rises on any data that can be memorised."
        )
    elif len(log.first_heldout) == 1:
        step = log.first_heldout[0].step
        missing = (
            "Set eval_strategy or eval_steps to measure the trained model too."
            if step == 0
            else "With eval_on_start: true the model is also measured before training."
        )
        yield (
            f"There is only one held-out evaluation (step {step}), so there is nothing to compare it with. {missing}"
        )


def _step_0(log: TrainingLog) -> Iterator[str]:
    first = log.first_heldout[0] if log.first_heldout else None
    if first is None or first.step != 0 or not log.has_reference:
        return
    margin = first.metrics.get(MARGIN, math.nan) / log.scale
    if is_tie(first):
        yield (
            "At step 0 the policy still equals the reference, so every margin is 0 up to rounding, and TRL counts a "
            f"tie as wrong: the held-out accuracy of {first.metrics.get(ACCURACY, math.nan):.3g} there says nothing. "
            "Chance is 0.5."
        )
    elif abs(margin) >= _STEP_0_NOISE and log.beta:
        yield (
            f"Before the first update the held-out margin ÷ beta is {margin:.2f} nats where 0 is expected: "
            "the policy and the reference already differ. That is right only if the reference is another "
            "model; otherwise check for stale reference log-probabilities."
        )


def _at_chance(log: TrainingLog) -> Iterator[str]:
    for name, records in log.heldout.items():
        accuracy = log.change(records, ACCURACY)
        if accuracy and accuracy.after_step > 0 and accuracy.after <= 0.5:
            on = f" on {name}" if name else ""
            yield (
                f"Held-out accuracy{on} ends at {accuracy.after:.3f} (step {accuracy.after_step}), no better "
                "than the 0.5 of a coin: what was learned does not carry over to these pairs."
            )


def _stuck(log: TrainingLog) -> Iterator[str]:
    losses = [r.metrics[LOSS] for r in log.train if LOSS in r.metrics]
    if has_ln_2_start(log) and len(losses) >= 3 and all(abs(x - LN_2) < _STUCK_WITHIN for x in losses):
        yield (
            f"The training loss stayed within {_STUCK_WITHIN} of ln 2 = {LN_2:.4f} for {log.last_step} steps "
            f"(last {losses[-1]:.4f}): the policy does not move away from the reference. Check the learning "
            "rate, and that the parameters are trainable."
        )


def _chosen_fell(log: TrainingLog) -> Iterator[str]:
    where, records = ("held-out", log.first_heldout) if log.first_heldout else ("training", log.train)
    chosen = log.change(records, CHOSEN, log.scale)
    rejected = log.change(records, REJECTED, log.scale)
    if log.has_reference and log.beta and chosen and rejected and chosen.after < _CHOSEN_FELL_TO:
        yield (
            f"The chosen reward fell: at step {chosen.after_step} the mean log-probability of {where} "
            f"answers against the reference is {chosen.after:+.1f} nats for chosen and {rejected.after:+.1f} "
            "nats for rejected ones. Some fall is usual with DPO; a large one takes probability away from "
            "good answers too, so look at generations."
        )


def _overfit(log: TrainingLog) -> Iterator[str]:
    train = [r.metrics[ACCURACY] for r in log.train if ACCURACY in r.metrics]
    measured = [r for r in log.first_heldout if r.step > 0 and ACCURACY in r.metrics]
    heldout = [(r.metrics[ACCURACY], r.step) for r in measured]
    recent = train[-3:]  # one batch of a few pairs is often all right by chance
    if not heldout or len(recent) < 3 or min(recent) < 1.0:
        return
    peak, peak_step = max(heldout, key=lambda point: point[0])
    last, last_step = heldout[-1]
    if peak - last >= _FELL_BY:
        yield (
            f"Training accuracy reached 1.0 while held-out accuracy fell from {peak:.3f} (step {peak_step}) "
            f"to {last:.3f} (step {last_step}): the model is learning its training pairs by heart."
        )


_RULES: tuple[Callable[[TrainingLog], Iterator[str]], ...] = (
    _incomplete,
    _non_finite,
    _step_0,
    _at_chance,
    _stuck,
    _overfit,
    _chosen_fell,
    _no_heldout,
)
