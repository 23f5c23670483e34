"""The ``cpu_offload`` strategy: a frozen copy in host memory that is asked once for each optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from axolotl_dpo_ext.reference.bandwidth import Calibration, active_fraction, calibrate, predict
from axolotl_dpo_ext.reference.copies import frozen_copy
from axolotl_dpo_ext.reference.identity import check_on_one_device, whole_everywhere
from axolotl_dpo_ext.reference.logprobs import causal_model_of
from axolotl_dpo_ext.reference.offload import CpuReference, OffloadedReference
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.randomness import random_state_kept
from axolotl_dpo_ext.reference.strategies import Policy, Reference
from axolotl_dpo_ext.reference.streamed import StreamedReference
from axolotl_dpo_ext.vocabulary import RunStopped

LOG = logging.getLogger(__name__)


class HostReference(Reference):
    """A copy of the policy before its first step, whose weights stay in host memory.

    Args:
        policy: The policy; it is copied, not kept.
    """

    def __init__(self, policy: Policy) -> None:
        self._ld_alpha = policy.definition.ld_alpha
        self._device = policy.device
        self._autocast = policy.autocast
        with random_state_kept():
            model = _host_copy(policy)
            self._parameters = sum(parameter.numel() for parameter in model.parameters())
            self._active = active_fraction(model)
            size = sum(parameter.nbytes for parameter in model.parameters())
            layer_bytes = size // int(causal_model_of(model).config.get_text_config().num_hidden_layers)
            self._sweep_bytes = 0
            self._computes: OffloadedReference
            if policy.device.type == "cpu":
                self._computes = CpuReference(model)
            else:
                streamed = StreamedReference(model, policy.device)
                self._computes, self._sweep_bytes = streamed, streamed.sweep_bytes
                self._parameters, layer_bytes = streamed.sweep_parameters, streamed.layer_bytes
            self._calibration: Calibration | None = calibrate(policy.device, _dtype(model, policy), layer_bytes)
        where = "computed there" if policy.device.type == "cpu" else f"streamed to {policy.device} layer by layer"
        LOG.info("reference: %.2f GB of weights in host memory, %s", size / 1e9, where)

    def for_batches(self, batches: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Computes all micro-batches of a step in one sweep over the layers; see the base class."""
        self._say_cost(batches)
        with random_state_kept(), torch.autocast(
            self._device.type, self._autocast, enabled=self._autocast is not None
        ):  # fmt: skip
            tokens = self._computes.token_log_probs(batches)
        return [
            sum_completions(log_probs, batch["completion_mask"], self._ld_alpha)
            for log_probs, batch in zip(tokens, batches, strict=True)
        ]

    def _say_cost(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Says once, with the first step's tokens, what a sweep costs and whether it hides behind computing."""
        if self._calibration is None:
            return
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        cost = predict(
            self._calibration,
            self._sweep_bytes,
            self._parameters,
            tokens,
            self._active,
            accumulation_steps=len(batches),
        )
        self._calibration = None
        LOG.info("reference: %s", cost.text)
        if cost.warning:
            LOG.warning("reference: %s", cost.warning)


def _dtype(model: Any, policy: Policy) -> torch.dtype:
    return policy.autocast or model.dtype


def _host_copy(policy: Policy) -> Any:
    model: Any = policy.model
    check_on_one_device(model, "cpu_offload")
    if not whole_everywhere(model, Processes()):
        raise RunStopped(
            "`reference: cpu_offload`, and not every process holds the whole model\n"
            "    why: with ZeRO-3, or FSDP with CPU-efficient loading, there is nothing whole to copy\n"
            "    fix: use `reference: precomputed` after `axolotl dpo-precompute CONFIG.yaml`"
        )
    if policy.adapter and model.dtype != torch.float32:
        raise RunStopped(
            f"`reference: cpu_offload` with a trained adapter on a base model in {model.dtype}\n"
            f"    why: the copy holds the adapter merged into the weights, and rounding them to that dtype changes it\n"
            f"    fix: use `reference: adapter` or `precomputed`"
        )
    home = next(model.parameters()).device
    model.to("cpu")  # so that the copy never takes room on the accelerator
    frozen = frozen_copy(model, keep_adapter=policy.adapter)
    model.to(home)
    return frozen


def sum_completions(log_probs: Tensor, completion_mask: Tensor, ld_alpha: float | None) -> tuple[Tensor, Tensor]:
    """Sums token log-probabilities over the answers of a micro-batch.

    Args:
        log_probs: Per token, zero outside the answers, shape ``(2 · pairs, length - 1)``.
        completion_mask: 1 for tokens of an answer, shape ``(2 · pairs, length)``, chosen before rejected.
        ld_alpha: Weight of the tokens beyond the length of the pair's shorter answer, or ``None`` for the plain sum.

    Returns:
        The sums of the chosen and of the rejected answers, each of shape ``(pairs,)``, float32.

    Source:
        ``compute_ref_log_probs`` in trl/trainer/dpo_trainer.py.
    """
    if ld_alpha is not None:
        position = completion_mask[:, 1:].cumsum(1)
        lengths = completion_mask[:, 1:].sum(1)
        shorter = torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
        log_probs = torch.where(position > shorter, ld_alpha * log_probs, log_probs)
    chosen, rejected = log_probs.sum(1).chunk(2)
    return chosen, rejected
