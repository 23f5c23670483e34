"""Checks at run time that the log-probabilities handed over are the reference's."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback

from axolotl_dpo_ext.reference.randomness import random_state_kept
from axolotl_dpo_ext.vocabulary import RunStopped

LOG = logging.getLogger(__name__)

# What accelerate's `mixed_precision` makes of torch.autocast.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Relative difference of an answer's log-probability that other batches and kernels explain.
AGREEMENT = 1e-3
LOW_PRECISION_AGREEMENT = 0.05
LOW_PRECISION_BIAS = 0.02  # nats a token, over the whole batch: rounding goes both ways
# A policy that learns leaves ln 2 within a few steps; at the lowest learning rates a few more.
STUCK_STEPS = 20
STUCK_LOSS = 1e-4  # the margin says it more finely
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
    low = torch.finfo(_dtype(trainer, model)).bits < 32
    allowed = LOW_PRECISION_AGREEMENT if low else AGREEMENT
    difference = ((stored - online).abs() / online.abs().clamp(min=1.0)).max().item()
    tokens = inputs["completion_mask"][:, 1:].sum(1).reshape(2, -1).clamp(min=1)
    bias = ((stored - online) / tokens).mean().abs().item()
    if not difference <= allowed or (low and not bias <= LOW_PRECISION_BIAS):
        raise RunStopped(
            f"the reference log-probabilities handed over are not the model's: the first batch differs by "
            f"{difference:.1e} (allowed {allowed:.0e}), for example {stored.flatten()[0]:.4f} instead of "
            f"{online.flatten()[0]:.4f}\n"
            f"    why: the weights were changed after they were loaded, or a collator or wrapper feeds the model other "
            f"tokens than those that were stored\n"
            f"    fix: pass the model as it is (no `checkpoint=` for a changed one), or use `reference: gpu`"
        )
    LOG.info("reference: the first batch recomputed with the model agrees (largest difference %.1e)", difference)


def _not_comparable(trainer: Any) -> str:
    if trainer.state.global_step > 0:
        return f"the run resumes at step {trainer.state.global_step}, where the policy is trained already"
    if not trainer.reference_is_initial_policy:
        return "the reference is another model than the policy"
    peft = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None)
    if peft is not None and trainer.adapter_is_reference != ("ref" in peft):
        return "TRL has no way to compute this adapter's reference"
    return ""


def _dtype(trainer: Any, model: Any) -> torch.dtype:
    return AUTOCAST.get(trainer.accelerator.mixed_precision) or next(model.parameters()).dtype


def _online(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    tokens = {name: value for name, value in inputs.items() if not name.startswith("ref_")}
    was_training = model.training
    model.eval()
    try:
        with random_state_kept(), torch.no_grad(), trainer.accelerator.autocast():
            return torch.stack(list(trainer.compute_ref_log_probs(model, tokens))).float()
    finally:
        model.train(was_training)


class StuckLossCallback(TrainerCallback):
    """Stops a run whose loss stays at ln 2: the policy and its reference are the same, so nothing is learned."""

    def __init__(self) -> None:
        self._stuck_since: int | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Looks at each logged loss.

        Raises:
            RunStopped: The loss was ln 2 for ``STUCK_STEPS`` steps with a learning rate above zero.
        """
        found = logs or {}
        loss, rate, margin = (found.get(name) for name in ("loss", "learning_rate", "rewards/margins"))
        if loss is None or margin is None or list(args.loss_type) != ["sigmoid"]:
            return
        if not rate or abs(loss - math.log(2)) > STUCK_LOSS or abs(margin) > STUCK_MARGIN:
            self._stuck_since = None
            return
        self._stuck_since = state.global_step if self._stuck_since is None else self._stuck_since
        if state.global_step - self._stuck_since >= STUCK_STEPS:
            raise RunStopped(
                f"the loss has been ln 2 = 0.6931 from step {self._stuck_since} to {state.global_step}\n"
                f"    why: policy and reference give equal log-probabilities, so the policy does not change: no "
                f"parameter is trained, or a learning rate of {rate:.1e} is lost in the weights' dtype\n"
                f"    fix: check that the trained parameters require gradients, raise the learning rate, or keep "
                f"trained weights in float32"
            )
