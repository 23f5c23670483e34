"""Checks at run time that the log-probabilities handed over are the reference's."""

from __future__ import annotations

import logging
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import TrainerCallback

from axolotl_dpo_ext.reference.identity import is_elsewhere
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.randomness import random_state_kept
from axolotl_dpo_ext.vocabulary import RunStopped

LOG = logging.getLogger(__name__)

# What accelerate's `mixed_precision` makes of torch.autocast.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Relative difference of an answer's log-probability that other batches and kernels explain.
AGREEMENT = 1e-3
LOW_PRECISION_AGREEMENT = 0.05
LOW_PRECISION_BIAS = 0.02  # nats a token, over the whole batch: rounding goes both ways
# A policy that learns leaves its reference within a few steps; at the lowest learning rates a few more.
STUCK_STEPS = 20
STUCK_STEPS_WHERE_WEIGHTS_CHANGE = 10 * STUCK_STEPS
# Elements of each parameter that are looked at. In bfloat16 a low learning rate changes one in a thousand in a step.
SAMPLED = 4096
STUCK_MARGIN = 1e-5  # rounding of stored and computed log-probabilities, times a beta of up to 1


def compare_online(trainer: Any, model: Any, inputs: dict[str, Any]) -> None:
    """Recomputes one batch with the policy, which equals its reference before the first step.

    Args:
        trainer: TRL's trainer.
        model: The model as the trainer trains it.
        inputs: The first batch, with ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Raises:
        RunStopped: The log-probabilities are absent, not finite, or not the policy's.
    """
    given = [inputs.get(name) for name in ("ref_chosen_logps", "ref_rejected_logps")]
    if any(value is None for value in given):
        raise RunStopped(
            "the first batch has no reference log-probabilities\n"
            f"    why: the data collator {type(trainer.data_collator).__name__} dropped the columns ref_chosen_logps "
            "and ref_rejected_logps\n"
            "    fix: use TRL's own collator, or pass these two columns on as tensors"
        )
    stored = torch.stack([value.float() for value in given if value is not None])
    if not torch.isfinite(stored).all():
        raise RunStopped(
            "the reference log-probabilities of the first batch are not finite\n"
            "    why: the reference overflows in its dtype, or its weights are not finite\n"
            "    fix: compute them in bfloat16 or float32 instead of float16"
        )
    reason = _not_comparable(trainer)
    if reason:
        LOG.info("reference: the first batch is not compared with the model, because %s", reason)
        return
    online = _online(trainer, model, inputs)
    low = is_low_precision(trainer, model)
    allowed = LOW_PRECISION_AGREEMENT if low else AGREEMENT
    apart = ((stored - online).abs() / online.abs().clamp(min=1.0)).flatten()
    worst = int(apart.argmax())
    difference = apart[worst].item()
    tokens = inputs["completion_mask"][:, 1:].sum(1).reshape(2, -1).clamp(min=1)
    bias = ((stored - online) / tokens).mean().abs().item()
    if not difference <= allowed or (low and not bias <= LOW_PRECISION_BIAS):
        raise RunStopped(
            f"the reference log-probabilities handed over are not the model's: {stored.flatten()[worst]:.4f} instead "
            f"of {online.flatten()[worst]:.4f} for an answer of the first batch, a relative difference of "
            f"{difference:.1e} (allowed {allowed:.0e}; by {bias:.1e} nats a token in the mean)\n"
            f"    why: the weights were changed after they were loaded, or a collator or wrapper feeds the model other "
            f"tokens than those that were stored\n"
            f"    fix: pass the model as it is (no `checkpoint=` for a changed one), or use `reference: gpu`"
        )
    LOG.info(
        "reference: the first batch recomputed with the model agrees (largest relative difference %.1e)", difference
    )


def _not_comparable(trainer: Any) -> str:
    if trainer.state.global_step > 0:
        return f"the run resumes at step {trainer.state.global_step}, where the policy is trained already"
    if not trainer.reference_is_initial_policy:
        return "the reference is another model than the policy"
    peft = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None)
    if peft is not None and trainer.adapter_is_reference != ("ref" in peft):
        return "TRL has no way to compute this adapter's reference"
    return ""


def is_low_precision(trainer: Any, model: Any) -> bool:
    """Whether a trainer's model computes in 16 bits or fewer, by its weights or by autocast.

    Args:
        trainer: TRL's trainer.
        model: Its model.
    """
    dtype = AUTOCAST.get(trainer.accelerator.mixed_precision) or next(model.parameters()).dtype
    return torch.finfo(dtype).bits < 32


def _online(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    tokens = {name: value for name, value in inputs.items() if not name.startswith("ref_")}
    was_training = model.training
    model.eval()
    try:
        with random_state_kept(), torch.no_grad(), trainer.accelerator.autocast():
            return torch.stack(list(trainer.compute_ref_log_probs(model, tokens))).float()
    finally:
        model.train(was_training)


class StuckPolicyCallback(TrainerCallback):
    """Stops a run whose policy stays equal to its reference, so that nothing is learned.

    Two things say so, whatever the loss: the reward margins stay at 0, in low precision within what rounding explains,
    and no sampled element of any trained parameter has changed since training began. A run that learns slowly, as in
    a warm-up, can have such margins but not such parameters. Margins of exactly 0 for ten times as long say it alone.
    Where parameters are not in this process (ZeRO-3), margins of 0 are enough in full precision, and nothing is said
    in low precision.

    Args:
        low_precision: Whether the policy computes in 16 bits or fewer.
    """

    def __init__(self, low_precision: bool) -> None:
        self._low_precision = low_precision
        self._learns = False
        self._at_first: str | None = None
        self._stuck_since: int | None = None
        self._largest = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Samples the parameters before the first step."""
        self._at_first = _sample_of_trained(model)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Looks at each logged margin.

        Raises:
            RunStopped: Nothing was learned for ``STUCK_STEPS`` steps with a learning rate above zero.
        """
        found = logs or {}
        if self._learns or "loss" not in found or "rewards/margins" not in found:
            return
        rate, margin = found.get("learning_rate"), abs(found["rewards/margins"])
        if not rate or not margin <= self._explained_by_rounding(args, found):
            self._stuck_since = None
            return
        if self._stuck_since is None:
            self._stuck_since, self._largest = state.global_step, 0.0
        self._largest = max(self._largest, margin)
        steps = state.global_step - self._stuck_since
        if steps < STUCK_STEPS:
            return
        unchanged = self._unchanged(model)
        if not unchanged and self._low_precision:
            self._learns = True
        elif unchanged or (self._largest == 0 and steps >= STUCK_STEPS_WHERE_WEIGHTS_CHANGE):
            raise self._stuck(state.global_step, rate, unchanged)

    def _explained_by_rounding(self, args: Any, found: dict[str, Any]) -> float:
        if not self._low_precision:
            return STUCK_MARGIN
        size = sum(abs(found.get(name, 0.0)) for name in ("logps/chosen", "logps/rejected"))
        return float(args.beta * LOW_PRECISION_AGREEMENT * size)

    def _unchanged(self, model: Any) -> bool:
        same = not self._low_precision if self._at_first is None else _sample_of_trained(model) == self._at_first
        return all(Processes().gather(same))  # each may hold other parameters

    def _stuck(self, step: int, rate: float, unchanged: bool) -> RunStopped:
        if not unchanged:
            return RunStopped(
                f"the reward margins have been exactly 0 from step {self._stuck_since} to {step}, though parameters "
                f"change\n"
                f"    why: nothing tells the answers of a pair apart: they are the same to the model, or the reference "
                f"moves with the policy\n"
                f"    fix: look at the pairs (`dpo_ext: {{quality: true}}` finds identical ones)"
            )
        margins = "within rounding" if self._low_precision else "0"
        seen = self._at_first is not None
        parameters = ", and no sampled element of a trained parameter has changed since training began" if seen else ""
        return RunStopped(
            f"the reward margins have been {margins} (at most {self._largest:.0e}) from step {self._stuck_since} to "
            f"{step}{parameters}\n"
            f"    why: policy and reference are still the same, so nothing is learned: no parameter is trained, or a "
            f"learning rate of {rate:.1e} is lost in the weights' dtype\n"
            f"    fix: check that the trained parameters require gradients, raise the learning rate, or keep trained "
            f"weights in float32"
        )


def _sample_of_trained(model: nn.Module) -> str | None:
    """Returns a digest of some elements of every trained parameter, or ``None`` if any is not in this process."""
    total = xxhash.xxh3_128()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if is_elsewhere(parameter):
            return None
        flat = parameter.detach().flatten()
        stride = flat.numel() // SAMPLED | 1  # odd, so that it does not follow one column of a matrix
        total.update(flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
