"""Whether a model can be streamed layer by layer: its weights are looked at, and tiny inputs are run both ways.

Whatever it is that cannot work, it is refused before the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_dpo_ext.reference.layer_walk import LayerWalk
from axolotl_dpo_ext.reference.logprobs import causal_model_of, text_config
from axolotl_dpo_ext.reference.offload import OffloadError

# How far the two ways may be apart, as ‖difference‖ / ‖values‖. On one device the same kernels run on the same numbers,
# so nothing but a wrong order shows; between devices the rounding of a whole model does, and TF32 where it is on.
TOLERANCE_ON_ONE_DEVICE = 1e-4
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
TOLERANCE_ACROSS_DEVICES_FLOAT32 = 2e-3
ON_ANY_DEVICE = ("eager", "sdpa")


def refuse_weights(model: nn.Module) -> None:
    """Refuses weights that are not plain tensors in this process's host memory.

    Args:
        model: The causal language model.

    Raises:
        OffloadError: Some are quantised, on another device, or partitioned.
    """
    architecture = type(model).__name__
    if getattr(model, "is_quantized", False):
        found = f"quantised weights ({getattr(model, 'quantization_method', None) or 'is_quantized'})"
        _refuse_quantised(architecture, found)
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            _refuse_quantised(architecture, f"{name} is a {type(parameter).__name__} of {parameter.dtype}")
        if parameter.device.type != "cpu" or hasattr(parameter, "ds_id"):
            where = "partitioned by DeepSpeed ZeRO-3" if hasattr(parameter, "ds_id") else f"on {parameter.device}"
            raise OffloadError(
                architecture,
                f"{name} is {where}",
                "the weights are streamed from this process's host memory, so all of them must be there",
                "load the reference with device_map='cpu' and outside of DeepSpeed's zero.Init",
            )


def _refuse_quantised(architecture: str, found: str) -> None:
    raise OffloadError(
        architecture,
        found,
        "quantised weights carry state beside their tensors, which copying the tensors leaves behind",
        "load the reference unquantised for cpu_offload, or set `reference: precomputed` or `reference: gpu`",
    )


def probe_batches(vocabulary: int) -> list[dict[str, Tensor]]:
    """Makes tiny micro-batches, as TRL's collator does, of tokens that are drawn without the global random state.

    Args:
        vocabulary: Number of token ids to draw from.
    """
    # Two shapes: what one layer leaves behind for another shows as soon as a second micro-batch comes between them.
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (12, 9):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, -3:] = 0
        answers = mask.clone()
        answers[:, : length // 3] = 0
        ids = torch.randint(vocabulary, (2, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "completion_mask": answers})
    return batches


def probe_structure(model: nn.Module, walk: LayerWalk, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Runs inputs in the model's own way and layer by layer, both on the CPU, and compares the hidden states.

    Args:
        model: The causal language model, or a PEFT model around it.
        walk: The walk through its layers.
        batches: What ``probe_batches`` makes.

    Returns:
        The log-probabilities that the model's own way gives, as ``token_log_probs`` returns them.

    Raises:
        OffloadError: Running the layers in turn fails, or gives something else.
    """
    expected: list[Tensor] = []
    hidden: list[Tensor] = []
    given: list[dict[str, Any]] = []
    with (
        _attention_of_any_device(causal_model_of(model)),
        failures_refused(walk.architecture, "running its layers in turn"),
    ):
        for batch in batches:
            inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
            given.append({**inputs, "use_cache": False})
            logits, states = walk.observe(model, given[-1])
            log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
            expected.append(log_probs * batch["completion_mask"][:, 1:])
            hidden.append(states * batch["attention_mask"][..., None])
        passages = [walk.enter(one) for one in given]
        for index in range(len(walk.layers)):
            for passage in passages:
                walk.pass_layer(index, passage)
        found = [
            walk.leave(one, passage).last_hidden_state * one["attention_mask"][..., None]
            for one, passage in zip(given, passages, strict=True)
        ]
    refuse_difference(found, hidden, TOLERANCE_ON_ONE_DEVICE, "hidden states of a tiny input", walk.architecture)
    return expected


@contextlib.contextmanager
def _attention_of_any_device(causal: nn.Module) -> Iterator[None]:
    """Lets a model whose attention is made for GPUs (FlashAttention) run on the CPU."""
    config = text_config(causal)
    before = config._attn_implementation
    if before not in ON_ANY_DEVICE:
        config._attn_implementation = "sdpa" if getattr(causal, "_supports_sdpa", False) else "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def failures_refused(architecture: str, doing: str) -> Iterator[None]:
    """Turns what goes wrong in a probe into a refusal; running out of memory is no trait of a model, and stays.

    Args:
        architecture: Name of the model's class.
        doing: What the probe does, for the message.

    Raises:
        OffloadError: Something went wrong.
    """
    try:
        yield
    except (OffloadError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"{doing} failed with {type(error).__name__}: {error}"
        reason = "a layer depends on more than its arguments, or on a tensor that is neither parameter nor buffer"
        raise OffloadError(architecture, found, reason) from error


def refuse_difference(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str, architecture: str
) -> None:
    """Refuses results that are further apart than rounding explains.

    Args:
        found: What streaming gives.
        expected: What the model's own forward gives.
        tolerance: Most that they may be apart, as ‖difference‖ / ‖values‖.
        what: What is compared, for the message.
        architecture: Name of the model's class.

    Raises:
        OffloadError: They are further apart, or not a number.
    """
    left, right = (torch.cat([part.float().flatten() for part in parts]) for parts in (found, expected))
    apart = float((left - right).norm() / right.norm())
    if not apart <= tolerance:  # so that NaN is refused too
        seen = f"the {what} are {apart:.1e} apart (relative) from what the model's own forward gives"
        reason = f"at most {tolerance:.0e} is allowed: a layer seems to depend on more than its arguments"
        raise OffloadError(architecture, seen, reason)


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """Returns how far log-probabilities computed on a device may be from those computed on the CPU.

    Args:
        dtype: Of the weights.
        device: Where the layers are computed.
    """
    tolerance = TOLERANCE.get(dtype, TOLERANCE_ON_ONE_DEVICE)
    if device.type != "cpu" and tolerance <= TOLERANCE_ON_ONE_DEVICE:
        return TOLERANCE_ACROSS_DEVICES_FLOAT32
    return tolerance
