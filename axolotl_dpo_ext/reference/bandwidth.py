"""What it costs to stream a reference through a device, predicted from two rates measured at start."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Long enough for a copy or a product to run at its full rate, short enough for the start of a run.
LARGEST_COPY = {"cuda": 2**28, "cpu": 2**25}
PRODUCT_SHAPE = {"cuda": (4096, 4096, 4096), "cpu": (256, 1024, 1024)}
PRODUCTS_AT_ONCE = {"cuda": 8, "cpu": 1}
SECONDS_PER_RATE = 0.1


@dataclass(frozen=True)
class Calibration:
    """The two rates that decide whether copying weights hides behind computing with them.

    Attributes:
        bandwidth_bytes_per_s: From page-locked host memory to the device; on the CPU, within its memory.
        flops_per_s: Of a large matrix product in the weights' dtype. A model reaches less, so that what is predicted
            to hide does.
    """

    bandwidth_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Prediction:
    """What the reference costs in one optimizer step.

    Attributes:
        copy_seconds: Time to copy the weights to the device once.
        compute_seconds: Time to compute the step's tokens.
        hiding_tokens: From how many tokens a step on copying takes no time of its own.
        text: All of it in one line.
        warning: What to change where copying does not hide, else ``None``.
    """

    copy_seconds: float
    compute_seconds: float
    hiding_tokens: int
    text: str
    warning: str | None

    @property
    def seconds(self) -> float:
        """Time that the reference takes in a step: copying and computing run side by side."""
        return max(self.copy_seconds, self.compute_seconds)


def calibrate(device: torch.device | str, dtype: torch.dtype, layer_bytes: int) -> Calibration:
    """Measures the two rates in a fraction of a second. The global random state is not touched.

    Args:
        device: The device to compute on.
        dtype: Dtype of the weights.
        layer_bytes: Size of one copy: a layer's, as ``StreamedReference.layer_bytes``.
    """
    device = torch.device(device)
    size = max(1, min(layer_bytes, LARGEST_COPY.get(device.type, 2**25)))
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    copy_seconds = _seconds(lambda: target.copy_(source, non_blocking=True), device)

    rows, inner, columns = PRODUCT_SHAPE.get(device.type, PRODUCT_SHAPE["cpu"])
    repeats = PRODUCTS_AT_ONCE.get(device.type, 1)
    # Zeros would do, were it not that GPUs multiply them faster.
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(rows, inner, generator=generator, device=device).to(dtype)
    right = torch.randn(inner, columns, generator=generator, device=device).to(dtype)

    def multiply() -> None:
        for _ in range(repeats):
            left @ right

    flops = 2 * rows * inner * columns * repeats
    return Calibration(size / copy_seconds, flops / _seconds(multiply, device))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()  # the first time loads kernels
    times: list[float] = []
    end = time.perf_counter() + SECONDS_PER_RATE
    while not times or time.perf_counter() < end:
        times.append(once())
    return statistics.median(times)


def active_fraction(model: Any) -> float:
    """Returns the share of a model's decoder parameters that one token computes with: below 1 for a mixture of experts.

    Args:
        model: A ``transformers`` causal language model.
    """
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((value for name in names if (value := getattr(config, name, None))), 0)
    used = getattr(config, "num_experts_per_tok", None)
    total = routed = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        routed += parameter.numel() if re.search(r"\bexperts\b", name) else 0
    if not experts or not used or not total:
        return 1.0
    return float(1 - routed / total * (1 - used / experts))


def hiding_tokens(calibration: Calibration, bytes_per_parameter: float, active_fraction: float = 1.0) -> int:
    """Returns from how many tokens per sweep on copying the weights hides behind computing with them.

    A sweep over ``P`` parameters of ``b`` bytes copies for ``b·P/BW`` seconds and computes ``T`` tokens in
    ``2·P·T/F``; both are equal at ``T* = b·F/(2·BW)``, whatever the size of the model. It is the compute-to-bandwidth
    balance of the roofline model (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785) for weights that are
    read once per ``T`` tokens, as in FlexGen (https://arxiv.org/abs/2303.06865).

    Args:
        calibration: The rates.
        bytes_per_parameter: ``b``.
        active_fraction: Share of the parameters that a token computes with, as ``active_fraction`` returns it: all
            are copied, so a mixture of experts needs as many times more tokens.
    """
    balance = bytes_per_parameter * calibration.flops_per_s / (2 * calibration.bandwidth_bytes_per_s)
    return math.ceil(balance / active_fraction)


def predict(
    calibration: Calibration,
    sweep_bytes: int,
    parameters: int,
    tokens: int,
    active_fraction: float = 1.0,
    accumulation_steps: int = 1,
) -> Prediction:
    """Predicts what the reference costs in one optimizer step on one device.

    Args:
        calibration: The rates.
        sweep_bytes: Bytes copied per step, as ``StreamedReference.sweep_bytes``; 0 for a reference on the CPU.
        parameters: Number of parameters among them, or of the model's where nothing is copied.
        tokens: Tokens of a step on this device, prompts and both answers.
        active_fraction: As for ``hiding_tokens``.
        accumulation_steps: The ``gradient_accumulation_steps`` that make up these tokens.
    """
    copy = sweep_bytes / calibration.bandwidth_bytes_per_s
    compute = 2 * parameters * active_fraction * tokens / calibration.flops_per_s
    if not sweep_bytes:
        return Prediction(copy, compute, 0, f"{tokens:,} tokens compute in {compute:.2g} s on the CPU", None)
    needed = hiding_tokens(calibration, sweep_bytes / parameters, active_fraction)
    text = (
        f"one sweep copies {_size(sweep_bytes)} in {copy:.2g} s, {tokens:,} tokens compute in {compute:.2g} s: "
        f"hides from {_rounded(needed):,} tokens a step on"
    )
    if copy <= compute:
        return Prediction(copy, compute, needed, text, None)
    steps = math.ceil(accumulation_steps * needed / max(tokens, 1))
    advice = f"raise gradient_accumulation_steps to ≥ {steps} or use reference: precomputed"
    warning = f"{text}; every step waits {copy - compute:.2g} s for weights; {advice}"
    return Prediction(copy, compute, needed, text, warning)


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _rounded(count: int) -> int:
    """Two digits say all there is to say about a prediction; the whole number is in ``Prediction.hiding_tokens``."""
    step: int = 10 ** max(len(str(count)) - 2, 0)
    return math.ceil(count / step) * step
