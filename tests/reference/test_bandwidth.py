"""From how many tokens on copying weights hides behind computing with them."""

from __future__ import annotations

import pytest
import torch

from axolotl_dpo_ext.reference.bandwidth import Calibration, active_fraction, calibrate, hiding_tokens, predict
from tests.reference.offloading import make_model


def test_the_rates_are_measured_without_the_global_random_state():
    state = torch.get_rng_state()
    found = calibrate("cpu", torch.float32, layer_bytes=2**22)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.bandwidth_bytes_per_s > 1e8
    assert found.flops_per_s > 1e8


def test_from_how_many_tokens_on_copying_hides():
    # The figures of the notes: H100 and A100 in bfloat16, then quantised, then a mixture of experts.
    assert hiding_tokens(Calibration(50e9, 450e12), 2) == 9000
    assert hiding_tokens(Calibration(24e9, 180e12), 2) == 7500
    assert hiding_tokens(Calibration(50e9, 450e12), 1) == 4500
    assert hiding_tokens(Calibration(50e9, 450e12), 2, active_fraction=0.25) == 36000


def test_a_prediction_says_what_to_change_where_copying_does_not_hide():
    rates = Calibration(25e9, 455e12)
    prediction = predict(rates, sweep_bytes=2_700_000_000, parameters=1_350_000_000, tokens=8192, accumulation_steps=1)
    assert prediction.hiding_tokens == 18200
    assert prediction.copy_seconds == pytest.approx(0.108)
    assert prediction.compute_seconds == pytest.approx(0.0486, rel=1e-3)
    assert (
        prediction.text
        == "one sweep copies 2.7 GB in 0.11 s, 8,192 tokens compute in 0.049 s: hides from 19,000 tokens a step on"
    )
    assert prediction.warning == (
        f"{prediction.text}; every step waits 0.059 s for weights; "
        "raise gradient_accumulation_steps to ≥ 3 or use reference: precomputed"
    )
    assert predict(rates, 2_700_000_000, 1_350_000_000, tokens=3 * 8192, accumulation_steps=3).warning is None
    assert predict(rates, 0, 1_350_000_000, tokens=8192).text == "8,192 tokens compute in 0.049 s on the CPU"


def test_a_mixture_of_experts_computes_with_a_part_of_what_is_copied():
    assert active_fraction(make_model("llama")) == 1
    model = make_model("mixtral")
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if "experts" in name)
    assert active_fraction(model) == pytest.approx((total - experts / 3) / total)
