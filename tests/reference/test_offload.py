"""What is asked of every reference in host memory, streamed or not: TRL's own values, and nothing beside them."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from axolotl_dpo_ext.reference.offload import CpuReference, OffloadError
from axolotl_dpo_ext.reference.streamed import StreamedReference
from tests.reference.offloading import BATCHES, CONFIGS, make_model, trl_values
from tests.reference.tiny_models import SMALL, VOCABULARY


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_gives_the_values_of_trl(kind: str):
    model = make_model(kind)
    expected = [trl_values(model, batch) for batch in BATCHES]
    for reference in (CpuReference(copy.deepcopy(model)), StreamedReference(model, "cpu")):
        found = reference.token_log_probs(BATCHES)
        assert [(part.shape, part.dtype, part.device) for part in found] == [
            (part.shape, torch.float32, part.device) for part in expected
        ]
        for part, wanted, batch in zip(found, expected, BATCHES, strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-5)
            assert not part[batch["completion_mask"][:, 1:] == 0].any()


def test_a_multimodal_model_is_computed_from_its_text_alone_and_refuses_images():
    text = {**SMALL, **CONFIGS["gemma3_text"]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 28,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "patch_size": 14}, image_token_id=60)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    expected = CpuReference(copy.deepcopy(model)).token_log_probs(BATCHES)
    reference = StreamedReference(model, "cpu")
    assert all(map(torch.allclose, reference.token_log_probs(BATCHES), expected))
    # The vision tower never goes to the device.
    assert (
        reference.sweep_parameters
        == sum(p.numel() for p in model.model.language_model.layers.parameters()) + VOCABULARY * 32
    )
    for one in (reference, CpuReference(model)):
        with pytest.raises(OffloadError, match="a batch with pixel_values"):
            one.token_log_probs([{**BATCHES[0], "pixel_values": torch.zeros(1, 3, 28, 28)}])


def test_autocast_around_a_call_does_what_it_does_around_the_model():
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        # Autocast may remember the weights it has cast; the places on the device hold one layer's after another's.
        expected = CpuReference(copy.deepcopy(model)).token_log_probs(BATCHES)
        found = StreamedReference(model, "cpu").token_log_probs(BATCHES)
    exact = CpuReference(model).token_log_probs(BATCHES)
    for part, wanted, unrounded in zip(found, expected, exact, strict=True):
        assert (part - wanted).norm() / wanted.norm() < 1e-2
        assert not torch.equal(part, unrounded)


@pytest.mark.parametrize("kind", [CpuReference, lambda model: StreamedReference(model, "cpu")])
def test_no_gradients_no_dropout_and_no_random_numbers(kind: Any):
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    reference = kind(model)
    first, second = reference.token_log_probs(BATCHES[:1]), reference.token_log_probs(BATCHES[:1])
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(first[0], second[0])
    assert not first[0].requires_grad
    # Not an inference tensor: it goes into a loss that is differentiated.
    assert not first[0].is_inference()


@pytest.mark.parametrize("kind", [CpuReference, lambda model: StreamedReference(model, "cpu")])
def test_a_bfloat16_model_computes_in_bfloat16(kind: Any):
    model = make_model(dtype=torch.bfloat16)
    expected = make_model(dtype=torch.bfloat16).float()
    dtypes = set()
    model.model.layers[1].mlp.register_forward_hook(
        lambda _, given, output: dtypes.update({given[0].dtype, output.dtype})
    )
    model.lm_head.register_forward_hook(lambda _, given, output: dtypes.add(output.dtype))
    found = kind(model).token_log_probs(BATCHES[:1])[0]
    assert dtypes == {torch.bfloat16}
    assert found.dtype == torch.float32
    wanted = CpuReference(expected).token_log_probs(BATCHES[:1])[0]
    assert (found - wanted).norm() / wanted.norm() < 3e-2


def test_a_peft_model_is_computed_with_its_adapter():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        make_model(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    expected = CpuReference(copy.deepcopy(adapted)).token_log_probs(BATCHES)
    plain = CpuReference(make_model()).token_log_probs(BATCHES)
    found = StreamedReference(adapted, "cpu").token_log_probs(BATCHES)
    assert all(torch.allclose(left, right, rtol=1e-4, atol=1e-5) for left, right in zip(found, expected, strict=True))
    assert not torch.allclose(found[0], plain[0], rtol=1e-2)
