"""A reference computed from host memory: TRL's own values, one sweep a step, two layers at a time, or a refusal."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from axolotl_dpo_ext.reference.bandwidth import Calibration, active_fraction, calibrate, hiding_tokens, predict
from axolotl_dpo_ext.reference.offload import CpuReference, OffloadError, StreamedReference
from axolotl_dpo_ext.vocabulary import RunStopped

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from the usual 0.02, with which a random model's layers change next to nothing.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
    },
    "phi": {},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1},
    "bloom": {},
    "falcon": {"new_decoder_architecture": True},
    # Does not get along without a mask of the padding.
    "doge": {},
    # Layers that read the keys and values of others: they pass through arguments, so streaming keeps them.
    "gemma3n_text": {
        **{
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
        },
        **{"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
        **{"laurel_rank": 4, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4},
    },
    "lfm2": {},  # convolutions between attention
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **CONFIGS[kind], **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


def make_batch(lengths: list[int], seed: int = 0, prompt: int = 3) -> dict[str, Tensor]:
    """What TRL's collator makes of half as many pairs: chosen rows first, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    answers = mask.clone()
    answers[:, :prompt] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "completion_mask": answers}


BATCHES = [make_batch([11, 8, 13, 5]), make_batch([7, 9], seed=1), make_batch([13, 13], seed=2, prompt=0)]


def trl_values(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """TRL's per-token values, asked for one token at a time: it returns sums over the completion mask only."""
    from trl.trainer import utils
    from trl.trainer.dpo_trainer import DPOTrainer

    model = copy.deepcopy(model)
    if hasattr(utils, "add_fused_lm_head"):
        utils.add_fused_lm_head(model)
    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=torch.no_grad, unwrap_model=lambda one: one)
    trainer: Any = DPOTrainer.__new__(DPOTrainer)  # with no more than its method reads
    trainer.accelerator, trainer.model, trainer.ref_model = accelerator, model, model
    trainer.args, trainer.ld_alpha, trainer.use_liger_kernel = (
        SimpleNamespace(gradient_checkpointing_kwargs=None),
        None,
        False,
    )
    rows, columns = batch["completion_mask"][:, 1:].nonzero(as_tuple=True)
    one_token = torch.zeros(len(rows), batch["input_ids"].shape[1], dtype=torch.long)
    one_token[torch.arange(len(rows)), columns + 1] = 1
    inputs = {name: batch[name][rows] for name in ("input_ids", "attention_mask")}
    chosen, rejected = trainer.compute_ref_log_probs(model, {**inputs, "completion_mask": one_token})
    values = torch.zeros(batch["input_ids"][:, 1:].shape)
    values[rows, columns] = torch.cat([chosen, rejected])
    return values


def values_on_slots(reference: StreamedReference) -> set[int]:
    """Layers whose parameters lie, at this moment, in the memory that stands for the device's."""
    ranges = [(place.block.data_ptr(), place.block.data_ptr() + place.block.numel()) for place in reference._places]
    layers = enumerate(reference._walk.layers)
    return {
        index
        for index, layer in layers
        if any(start <= parameter.data_ptr() < stop for parameter in layer.parameters() for start, stop in ranges)
    }


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


def test_masks_with_holes_and_padding_at_the_front_are_kept():
    model = make_model()
    batch = make_batch([9, 9])
    batch["attention_mask"][0, :2] = 0
    batch["attention_mask"][1, 4] = 0
    expected = trl_values(model, batch)
    torch.testing.assert_close(
        StreamedReference(model, "cpu").token_log_probs([batch])[0], expected, rtol=1e-4, atol=1e-5
    )


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_weights_are_the_same_bits_before_and_after(kind: str):
    model = make_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = StreamedReference(model, "cpu")
    reference.token_log_probs(BATCHES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


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


class _Remembering(LlamaDecoderLayer):
    """Adds what the layer before it left behind, as cross-layer sharing of keys and values does."""

    kept: list[Tensor]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(hidden_states, *args, **kwargs)
        if self.self_attn.layer_idx:
            output = output + self.kept[-1]
        self.kept.append(output)
        return output


def _with_hidden_dependency() -> Any:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    kept: list[Tensor] = []
    for layer in model.model.layers:
        layer.__class__ = _Remembering
        layer.kept = kept
    return model


def _with_scaling_between_layers() -> Any:
    model = make_model()
    model.model.layers[1].register_forward_hook(lambda _, __, output: output * 1.5)
    return model


def _with_an_unknown_form() -> Any:
    model = make_model()
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda _, __, output: {"hidden": output})
    model.model.layers[2].register_forward_pre_hook(lambda _, given: (given[0]["hidden"], *given[1:]))
    return model


def _with_two_stacks() -> Any:
    model = make_model()
    model.model.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_with_hidden_dependency, "depends on more than its arguments"),
        (_with_scaling_between_layers, "hidden states are changed between layers 1 and 2"),
        (_with_an_unknown_form, "its layers return dict"),
        (_with_two_stacks, "2 lists of 3 modules"),
        (lambda: make_model().model, "no backbone"),
    ],
)
def test_a_structure_that_cannot_be_streamed_is_refused(make: Any, words: str):
    model = make()
    with pytest.raises(OffloadError) as caught:
        StreamedReference(model, "cpu")
    assert isinstance(caught.value, RunStopped)
    message = str(caught.value)
    assert words in message
    assert type(model).__name__ in message
    assert "reference: precomputed" in message


class _Quantised(nn.Parameter):
    pass


def _with_a_parameter(parameter: nn.Parameter) -> Any:
    model = make_model()
    model.model.layers[0].mlp.up_proj._parameters["weight"] = parameter
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: _with_a_parameter(_Quantised(torch.zeros(48, 32))), "is a _Quantised"),
        (
            lambda: _with_a_parameter(nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)),
            "torch.int8",
        ),
        (lambda: _with_a_parameter(nn.Parameter(torch.zeros(48, 32, device="meta"))), "on meta"),
    ],
)
def test_weights_that_cannot_be_streamed_are_refused(model: Any, words: str):
    with pytest.raises(OffloadError, match="cpu_offload, with LlamaForCausalLM") as caught:
        StreamedReference(model(), "cpu")
    assert words in str(caught.value)


def test_a_quantised_model_is_refused():
    model = make_model()
    model.is_quantized = True
    with pytest.raises(OffloadError, match="unquantised"):
        StreamedReference(model, "cpu")


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
    assert not prediction.hides
    assert prediction.hiding_tokens == 18200
    assert prediction.seconds == prediction.copy_seconds == pytest.approx(0.108)
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
