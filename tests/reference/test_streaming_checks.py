"""What cannot be streamed is refused before the first step, by name and with what to use instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from axolotl_dpo_ext.reference.offload import OffloadError
from axolotl_dpo_ext.reference.streamed import StreamedReference
from axolotl_dpo_ext.vocabulary import RunStopped
from tests.reference.offloading import make_model
from tests.reference.tiny_models import SMALL


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
