"""The figures behind `auto`: what each part adds, by hand-worked sizes of Llama-3-8B."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from axolotl_dpo_ext.reference.bandwidth import hiding_tokens
from axolotl_dpo_ext.reference.checkpoint_size import ModelShape
from axolotl_dpo_ext.reference.estimates import CANDIDATES, estimate, nominal_rates, training_bytes, usable_bytes
from axolotl_dpo_ext.reference.sharding import Sharding
from axolotl_dpo_ext.reference.situation import Device, Situation

P = 8_030_261_248
LAYER = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14_336 + 2 * 4096
ENDS = 2 * 128_256 * 4096  # embedding and head
LLAMA_8B = ModelShape(P, 32 * LAYER, P, 1.0, 128_256, 4096, 32, 2.0)
H200 = Device("NVIDIA H200", 143_771 * 2**20, 2**40)
RUN = Situation(
    base_model="llama",
    adapter=None,
    fresh_adapter=False,
    adapter_copy=False,
    losses=("sigmoid",),
    epochs=1,
    micro_tokens=4096,
    step_tokens=4096 * 4,
    checkpointing=True,
    activation_bytes=2,
    optimizer="adamw_torch_fused",
    sharding=Sharding(),
    device=H200,
    stored_rows=0,
    model=LLAMA_8B,
)


def test_the_sizes_written_here_are_those_of_the_model():
    assert ENDS + 32 * LAYER + 4096 == P


def run(**changed: Any) -> Situation:
    shape = {key: changed.pop(key) for key in ("trainable", "active_share", "bytes_per_parameter") if key in changed}
    return dataclasses.replace(RUN, model=dataclasses.replace(LLAMA_8B, **shape), **changed)


def states(**changed: Any) -> int:
    """The bytes without activations and logits."""
    return training_bytes(run(micro_tokens=0, **changed), "precomputed")


def test_without_a_size_there_are_no_figures():
    assert estimate(dataclasses.replace(RUN, model=None)) == {}
    with pytest.raises(ValueError, match="not known"):
        training_bytes(dataclasses.replace(RUN, model=None), "gpu")


def test_weights_gradients_and_optimizer_states():
    assert states() == 8 * P
    assert states(bytes_per_parameter=4.0) == 16 * P
    assert states(optimizer="adamw_bnb_8bit") == 6 * P
    assert states(optimizer="adafactor") == 4 * P
    assert states(optimizer="lion_pytorch") == 6 * P
    assert states(adapter="lora", trainable=10**8) == 2 * P + 16 * 10**8
    assert states(adapter="qlora", trainable=10**8, bytes_per_parameter=0.5625) == int(0.5625 * P) + 16 * 10**8


def test_sharding_divides_what_its_stage_says():
    def zero(stage: int, **more: Any) -> Sharding:
        return Sharding(stage=stage, devices=8, master_weights=True, **more)

    assert states(sharding=Sharding(devices=8)) == 8 * P, "plain data parallelism shares nothing"
    assert states(sharding=zero(0)) == 16 * P
    assert states(sharding=zero(1)) == 4 * P + 12 * P // 8
    assert states(sharding=zero(2)) == 2 * P + 14 * P // 8
    whole_layers = states(sharding=zero(3)) - 16 * P // 8
    assert whole_layers == pytest.approx(2 * (2 * LAYER + ENDS), rel=1e-5)
    assert states(sharding=zero(3)) - states(sharding=zero(3, optimizer_on_host=True)) == 12 * P // 8


def test_the_reference_adds_a_copy_a_window_or_nothing():
    without = training_bytes(run(), "precomputed")
    logits = 4 * 4096 * 128_256
    assert training_bytes(run(), "gpu") == without + 2 * P + logits
    assert training_bytes(run(), "adapter") == without + logits
    hidden_states = 16_384 * 4096 * 2
    assert training_bytes(run(), "cpu_offload") == without + 2 * (2 * LAYER + ENDS // 2) + hidden_states
    in_host_memory = run(device=Device(None, None, 2**40))
    assert training_bytes(in_host_memory, "cpu_offload") == training_bytes(in_host_memory, "precomputed") + 2 * P


def test_a_sharded_reference_is_divided_under_stage_3_only():
    def reference(stage: int) -> int:
        situation = run(micro_tokens=0, sharding=Sharding(stage=stage, devices=8))
        return training_bytes(situation, "gpu") - training_bytes(situation, "precomputed")

    assert reference(2) == 2 * P
    assert reference(3) == pytest.approx(2 * P / 8, rel=1e-6)


def test_activations_with_and_without_checkpointing():
    layer = 53 * 4096 * 4096
    saved = training_bytes(run(checkpointing=False), "gpu") - training_bytes(run(), "gpu")
    assert saved == 31 * layer - 2 * 4096 * 4096 * 32
    single = training_bytes(run(activation_bytes=4), "gpu") - training_bytes(run(), "gpu")
    assert single == layer + 2 * 4096 * 4096 * 32


def test_what_fits_and_what_does_not():
    found = estimate(run())
    assert set(found) == set(CANDIDATES)
    assert all(figure.fits for figure in found.values())
    assert usable_bytes(run()) == int(0.9 * (143_771 * 2**20 - 2**31))
    small = estimate(run(device=Device("NVIDIA H100 80GB HBM3", 81_559 * 2**20, 2**40)))
    assert [name for name in CANDIDATES if small[name].fits] == ["adapter", "cpu_offload", "precomputed"]
    assert not estimate(run(device=dataclasses.replace(H200, host_memory=2**30)))["cpu_offload"].fits, (
        "the host is full"
    )


def test_seconds_of_a_step():
    forward = P * 16_384 / 450e12
    found = {name: figure.seconds_per_step for name, figure in estimate(run()).items()}
    assert found["precomputed"] == pytest.approx(8 * forward)
    assert found["gpu"] == found["adapter"] == pytest.approx(10 * forward)
    assert found["cpu_offload"] == pytest.approx(10 * forward), "hidden: 16,384 tokens are enough"
    few = estimate(run(step_tokens=4096))["cpu_offload"]
    assert few.seconds_per_step == pytest.approx(8 * forward / 4 + 2 * P / 50e9), "it waits for the weights"
    lora = estimate(run(adapter="lora", trainable=10**8, checkpointing=False))
    assert lora["precomputed"].seconds_per_step == pytest.approx(4 * forward)
    assert estimate(run(active_share=0.25))["precomputed"].seconds_per_step == pytest.approx(2 * forward)


def test_from_how_many_tokens_streaming_hides():
    assert estimate(run())["cpu_offload"].hiding_tokens == hiding_tokens(nominal_rates("NVIDIA H200"), 2) == 9000
    assert estimate(run(active_share=0.25))["cpu_offload"].hiding_tokens == 36_000
    assert estimate(run(device=Device(None, None, 2**40)))["cpu_offload"].hiding_tokens == 0
    assert estimate(run())["gpu"].hiding_tokens is None


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("NVIDIA H100 80GB HBM3", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_devices_rates_go_by_its_name(name: str, like: str):
    assert nominal_rates(name) == nominal_rates(like) != nominal_rates("an unknown device")


def test_special_forms_of_a_device_have_their_own_rates():
    assert nominal_rates("NVIDIA H100 PCIe").flops_per_s < nominal_rates("NVIDIA H100 80GB HBM3").flops_per_s
    assert nominal_rates("NVIDIA GH200 480GB").bandwidth_bytes_per_s > nominal_rates("H200").bandwidth_bytes_per_s


def test_an_unknown_device_is_not_thought_to_hide_early():
    assert hiding_tokens(nominal_rates("an unknown device"), 2) >= 12_500
