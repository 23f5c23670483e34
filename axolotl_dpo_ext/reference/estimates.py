"""What each strategy would cost in a run, from its configuration and the device's nominal rates alone.

Nothing is measured here: a measurement differs from rank to rank, and all ranks must decide alike. The ``cpu_offload``
strategy measures the same rates when it starts, and says what it found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from axolotl_dpo_ext.reference.checkpoint_size import ModelShape
from axolotl_dpo_ext.reference.situation import Situation

if TYPE_CHECKING:
    from axolotl_dpo_ext.reference.bandwidth import Calibration

CANDIDATES = ("gpu", "adapter", "cpu_offload", "precomputed")

# Rates that a training step reaches, not peaks: FLOP/s of matrix products in bfloat16, and bytes/s from host memory.
# Longer names first: the first that a device's name contains is taken. About 45 % of the dense peak and 80 % of the
# PCIe or C2C link, as far as they are published; the peaks are those of torchtitan's `get_peak_flops`.
NOMINAL_RATES: dict[str, tuple[float, float]] = {
    "GH200": (450e12, 350e9),
    "GB200": (1000e12, 350e9),
    "H100 PCIe": (340e12, 50e9),
    "H100": (450e12, 50e9),
    "H200": (450e12, 50e9),
    "B300": (1000e12, 50e9),
    "B200": (1000e12, 50e9),
    "A100": (180e12, 24e9),
    "L40S": (160e12, 24e9),
    "4090": (130e12, 24e9),
    "3090": (55e12, 24e9),
}
# Fast at computing, slow at copying: of a device that nobody knows, streaming is not taken to hide too early.
UNKNOWN_ACCELERATOR = (150e12, 12e9)
PROCESSOR = (0.2e12, 10e9)

# What the accelerator's driver and the collectives hold, and what the allocator cannot use (fragmentation).
CONTEXT_BYTES = 2 * 2**30
USABLE_SHARE = 0.9

# Of one logit. The policy's are kept with their softmax and gradient; a reference in the step adds its own.
POLICY_LOGIT_BYTES, REFERENCE_LOGIT_BYTES = 6, 4
# Of one token and unit of hidden size in a layer, in bfloat16: Llama-3-8B, eager.
LAYER_ACTIVATION_BYTES = 53


@dataclass(frozen=True)
class Estimate:
    """What a strategy is predicted to cost.

    Attributes:
        bytes_per_device: Most bytes held by the device at a time.
        seconds_per_step: Of an optimizer step of the longest sequences, without data loading and communication.
        fits: Whether the device has these bytes, and the host those that the strategy holds there.
        hiding_tokens: From how many tokens a step on streaming takes no time of its own; of ``cpu_offload`` only.
    """

    bytes_per_device: int
    seconds_per_step: float
    fits: bool
    hiding_tokens: int | None = None


def estimate(situation: Situation) -> dict[str, Estimate]:
    """Predicts the cost of every candidate.

    Args:
        situation: The run.

    Returns:
        An estimate for ``gpu``, ``adapter``, ``cpu_offload`` and ``precomputed``, whether or not they can serve;
        nothing where the model's size is not known.
    """
    if situation.model is None:
        return {}
    return {name: _estimate(situation, situation.model, name) for name in CANDIDATES}


def nominal_rates(device_name: str | None) -> Calibration:
    """Returns the rates of a device by its name, the same on every rank.

    Args:
        device_name: As CUDA tells it, or ``None`` for the processor.
    """
    from axolotl_dpo_ext.reference.bandwidth import Calibration

    if device_name is None:
        flops, bandwidth = PROCESSOR
    else:
        flops, bandwidth = next(
            (rates for name, rates in NOMINAL_RATES.items() if name.lower() in device_name.lower()), UNKNOWN_ACCELERATOR
        )
    return Calibration(bandwidth_bytes_per_s=bandwidth, flops_per_s=flops)


def usable_bytes(situation: Situation) -> int:
    """Returns the device's memory that a run can use; the host's, divided between its processes, without a device."""
    device = situation.device
    if device.memory is None:
        return int(USABLE_SHARE * device.host_memory)
    return int(USABLE_SHARE * (device.memory - CONTEXT_BYTES))


def training_bytes(situation: Situation, strategy: str) -> int:
    """Predicts the most bytes that a device holds during training. The hardware planner is to take this over.

    Weights, gradients and optimizer states (2 in the weights' dtype for Adam; DeepSpeed: 16 bytes a trained parameter),
    each divided by the devices from its ZeRO stage on, FSDP as stage 3; under stage 3 two gathered layers, embedding
    and head. The reference: a copy of the weights for ``gpu``, sharded under stage 3 only (``prepare_deepspeed`` of
    TRL forces a full replica below it); two layers, the head and a step's hidden states for ``cpu_offload``.
    Activations of a micro-batch of T tokens: ``53·T·h·L`` bytes, or ``2·T·h·L + 53·T·h`` when checkpointed. Logits:
    6 bytes for each of ``T·V`` of the policy, and 4 where TRL computes the reference's too.

    Sources: the ZeRO paper (https://arxiv.org/abs/1910.02054); Korthikanti et al. (https://arxiv.org/abs/2205.05198),
    with 53 in place of their 34, traced with ``FSDPMemTracker`` on Hugging Face's eager Llama-3-8B. The logits are
    counted in ``_compute_loss`` of TRL 1.9, which returns both models' logits. No figure was checked on a GPU.

    Args:
        situation: The run; its model's size must be known.
        strategy: ``gpu``, ``adapter``, ``cpu_offload`` or ``precomputed``.
    """
    model = situation.model
    if model is None:
        raise ValueError("the size of the model is not known")
    return int(
        _state_bytes(situation, model)
        + _reference_bytes(situation, model, strategy)
        + _activation_bytes(situation, model)
        + _logit_bytes(situation, model, strategy)
    )


def _share(situation: Situation, stage: int) -> float:
    return 1 / situation.sharding.devices if situation.sharding.stage >= stage else 1.0


def _state_bytes(situation: Situation, model: ModelShape) -> float:
    """Returns the bytes of the policy's weights, gradients and optimizer states."""
    frozen = model.parameters * model.bytes_per_parameter if situation.adapter else 0.0
    # PEFT keeps an adapter in float32 beside weights of less.
    width = 4.0 if situation.adapter else model.bytes_per_parameter
    states = _optimizer_bytes(situation.optimizer, width)
    if situation.sharding.master_weights:
        width, states = 2.0, 4.0 + _optimizer_bytes(situation.optimizer, 4.0)
    if situation.sharding.optimizer_on_host:
        states = 0.0
    weights = (frozen + model.trainable * width) * _share(situation, 3)
    gradients = model.trainable * width * _share(situation, 2)
    gathered = 0.0
    if situation.sharding.stage == 3 and situation.sharding.devices > 1:
        gathered = _two_layers(model) + (model.parameters - model.in_layers) * model.bytes_per_parameter
    return weights + gradients + model.trainable * states * _share(situation, 1) + gathered


def _optimizer_bytes(optimizer: str, width: float) -> float:
    """Returns the bytes of an optimizer's states for one parameter; Adam's where nothing else is known."""
    name = optimizer.lower()
    if "adafactor" in name or name == "sgd":
        return 0.0
    moments = 1 if "lion" in name or "muon" in name else 2
    return moments * (1.0 if "8bit" in name or "4bit" in name else width)


def _two_layers(model: ModelShape) -> float:
    return 2 * model.in_layers / model.layers * model.bytes_per_parameter


def _reference_bytes(situation: Situation, model: ModelShape, strategy: str) -> float:
    weights = model.parameters * model.bytes_per_parameter
    if strategy == "gpu":
        return weights * _share(situation, 3)
    if strategy == "cpu_offload":
        if situation.device.memory is None:
            return weights
        # Embeddings are looked up in host memory; between two layers the hidden states of all tokens of a step wait.
        head = model.vocabulary * model.hidden * model.bytes_per_parameter
        return _two_layers(model) + head + situation.step_tokens * model.hidden * situation.activation_bytes
    # A continued adapter is copied whole.
    return 4.0 * model.trainable if strategy == "adapter" and situation.adapter_copy else 0.0


def _activation_bytes(situation: Situation, model: ModelShape) -> float:
    unit = situation.micro_tokens * model.hidden * situation.activation_bytes / 2
    if situation.checkpointing:
        return unit * (2 * model.layers + LAYER_ACTIVATION_BYTES)
    return unit * LAYER_ACTIVATION_BYTES * model.layers


def _logit_bytes(situation: Situation, model: ModelShape, strategy: str) -> float:
    in_step = REFERENCE_LOGIT_BYTES if strategy in ("gpu", "adapter") else 0
    return (POLICY_LOGIT_BYTES + in_step) * situation.micro_tokens * model.vocabulary


def _estimate(situation: Situation, model: ModelShape, strategy: str) -> Estimate:
    rates = nominal_rates(situation.device.name)
    needed = training_bytes(situation, strategy)
    # Forward 2, and backward 4: only 2 of them where the weights stay; checkpointing goes forward once more.
    passes = (4 if situation.adapter else 6) + (2 if situation.checkpointing else 0)
    forward = model.parameters * model.active_share * situation.step_tokens / rates.flops_per_s
    seconds = passes * forward
    fits = needed <= usable_bytes(situation)
    if strategy == "precomputed":
        return Estimate(needed, seconds, fits)
    if strategy != "cpu_offload":
        return Estimate(needed, seconds + 2 * forward, fits)
    from axolotl_dpo_ext.reference.bandwidth import predict

    copied = int(model.parameters * model.bytes_per_parameter)
    on_device = situation.device.memory is not None
    cost = predict(
        rates, copied if on_device else 0, model.parameters, situation.step_tokens, active_fraction=model.active_share
    )
    fits = fits and (not on_device or copied <= USABLE_SHARE * situation.device.host_memory)
    return Estimate(needed, seconds + cost.seconds, fits, cost.hiding_tokens)
