"""One sweep a step, two layers at a time on the device, and weights that stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from axolotl_dpo_ext.reference.bandwidth import calibrate
from axolotl_dpo_ext.reference.streamed import StreamedReference
from tests.reference.offloading import BATCHES, make_batch, make_model, trl_values
from tests.reference.tiny_models import VOCABULARY


def values_on_slots(reference: StreamedReference) -> set[int]:
    """Layers whose parameters lie, at this moment, in the memory that stands for the device's."""
    ranges = [(place.block.data_ptr(), place.block.data_ptr() + place.block.numel()) for place in reference._places]
    layers = enumerate(reference._walk.layers)
    return {
        index
        for index, layer in layers
        if any(start <= parameter.data_ptr() < stop for parameter in layer.parameters() for start, stop in ranges)
    }


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_micro_batches_together_give_what_they_give_alone(kind: str):
    reference = StreamedReference(make_model(kind), "cpu")
    together = reference.token_log_probs(BATCHES)
    for batch, part in zip(BATCHES, together, strict=True):
        assert torch.equal(reference.token_log_probs([batch])[0], part)
    assert reference.token_log_probs([]) == []


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_one_sweep_a_call_however_many_micro_batches(layers: int):
    reference = StreamedReference(make_model(num_hidden_layers=layers), "cpu")
    for batches in (BATCHES[:1], BATCHES, BATCHES * 3):
        before = reference.copies
        reference.token_log_probs(batches)
        assert reference.copies - before == layers


def test_at_most_two_layers_and_nothing_but_them_the_head_and_the_rest_is_on_the_device():
    model = make_model(num_hidden_layers=4)
    reference = StreamedReference(model, "cpu")
    home = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    seen: list[set[int]] = []
    moved: set[str] = set()

    def look(module: nn.Module, given: Any) -> None:
        seen.append(values_on_slots(reference))
        moved.update(name for name, parameter in model.named_parameters() if parameter.data_ptr() != home[name])

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(look)
    model.lm_head.register_forward_pre_hook(look)
    reference.token_log_probs(BATCHES)
    # Each layer computes from a slot, alone: the other slot is being filled, and no module looks at it.
    assert seen == [{index} for index in range(4) for _ in BATCHES] + [set()] * len(BATCHES)
    assert "lm_head.weight" in moved
    assert "model.embed_tokens.weight" not in moved
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == home
    rest = 32 * 4 + 2 * 16  # the final norm, and the rotary frequencies with their originals
    assert reference.device_bytes <= 2 * reference.layer_bytes + VOCABULARY * 32 * 4 + rest + 4 * 256
    assert reference.sweep_parameters == sum(p.numel() for p in model.parameters()) - VOCABULARY * 32 - 32


def test_a_tied_head_is_copied_for_the_head_alone():
    model = make_model("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reference = StreamedReference(model, "cpu")
    home = model.lm_head.weight.data_ptr()
    places = []
    model.model.norm.register_forward_pre_hook(lambda *_: places.append(model.lm_head.weight.data_ptr() != home))
    model.model.layers[0].register_forward_pre_hook(lambda *_: places.append(model.lm_head.weight.data_ptr() != home))
    reference.token_log_probs(BATCHES[:1])
    # Layer 0 and norm while its arguments are recorded, layer 0 itself, and both again behind the last layer.
    assert places == [False, False, False, True, True]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == home
    assert reference._top_place is None


def test_a_call_cut_short_leaves_the_next_one_right():
    model = make_model()
    reference = StreamedReference(model, "cpu")
    expected = reference.token_log_probs(BATCHES)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        reference.token_log_probs(BATCHES)
    hook.remove()
    assert all(map(torch.equal, reference.token_log_probs(BATCHES), expected))


def test_masks_with_holes_and_padding_at_the_front_are_kept():
    model = make_model()
    batch = make_batch([9, 9])
    batch["attention_mask"][0, :2] = 0
    batch["attention_mask"][1, 4] = 0
    expected = trl_values(model, batch)
    torch.testing.assert_close(
        StreamedReference(model, "cpu").token_log_probs([batch])[0], expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_weights_are_the_same_bits_before_and_after(kind: str):
    model = make_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = StreamedReference(model, "cpu")
    reference.token_log_probs(BATCHES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "qwen2"])
def test_on_a_gpu_weights_stay_pinned_on_the_host_and_values_are_the_same(kind: str):
    model = make_model(kind, num_hidden_layers=4)
    expected = [trl_values(model, batch) for batch in BATCHES]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = StreamedReference(model, "cuda")
    assert all(block.home.is_pinned() for block in reference._layers)
    batches = [{name: value.cuda() for name, value in batch.items()} for batch in BATCHES]
    for _ in range(20):  # a copy that does not wait for its slot would show sooner or later
        found = reference.token_log_probs(batches)
        assert all(part.is_cuda for part in found)
        for part, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(part.cpu(), wanted, rtol=2e-3, atol=1e-4)
    assert all(torch.equal(value.cpu(), before[name]) for name, value in model.state_dict().items())
    layers = [parameter for layer in reference._walk.layers for parameter in layer.parameters()]
    assert not any(parameter.is_cuda for parameter in layers)
    calibration = calibrate("cuda", torch.bfloat16, 2**26)
    assert calibration.bandwidth_bytes_per_s > 1e9
    assert calibration.flops_per_s > 1e12
