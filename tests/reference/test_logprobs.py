"""Reference log-probabilities are TRL's own on every architecture, and prompts are shared only where that is exact."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from axolotl_dpo_ext.reference.batching import Row, make_rows
from axolotl_dpo_ext.reference.logprobs import AnswerScorer, LanguageModelHead, backbone_of
from axolotl_dpo_ext.reference.rows import LogProbDefinition
from tests.reference.scoring import (
    ANSWERS,
    BIG,
    KINDS,
    ROWS,
    SHARED,
    make_model,
    our_values,
    trl_values,
)
from tests.reference.tiny_models import SMALL, VOCABULARY

pytestmark = pytest.mark.stack


def skip_without_kernels(model: Any) -> None:
    try:
        model(torch.tensor([[3, 4, 5]]))
    except RuntimeError as error:
        if "active drivers" not in str(error):
            raise
        pytest.skip("flash-linear-attention is installed, and computes this model on a GPU only")


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_gives_the_values_of_trl_with_prompts_shared_where_that_is_exact(kind: str, tmp_path: Path):
    if kind == "gemma2, sdpa" and not transformers.Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("this transformers computes Gemma 2 with its soft-capping only")
    model = make_model(kind)
    skip_without_kernels(model)
    expected = trl_values(model)
    for budget in (8, 64, BIG):
        found, batching = our_values(model, tmp_path, budget=budget)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert batching.share_prompts == (kind in SHARED)
    assert found[1, -1] == 0  # an answer of no tokens


@pytest.mark.parametrize("window", [1, 2, 9, 10, 19, 20, 21])  # the longest row but one has 20 tokens
def test_windows_of_every_size_are_those_of_the_model(window: int, tmp_path: Path):
    model = make_model("mistral with a window", sliding_window=window)
    found, batching = our_values(model, tmp_path)
    assert batching.share_prompts
    np.testing.assert_allclose(found, trl_values(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral with a window", "mamba"])
@pytest.mark.parametrize(
    "definition",
    [
        LogProbDefinition(ld_alpha=0.5),
        LogProbDefinition(10, "keep_end"),
        LogProbDefinition(10, "keep_start"),
        LogProbDefinition(12, "keep_end", 0.5),
    ],
    ids=str,
)
def test_truncation_and_ld_alpha_are_those_of_trl(kind: str, definition: LogProbDefinition, tmp_path: Path):
    model = make_model(kind)
    expected = trl_values(model, definition)
    for budget in (8, BIG):
        found, _ = our_values(model, tmp_path, definition, budget)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected, trl_values(model), rtol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "mistral with a window", "gemma3_text"])
def test_bfloat16_weights_give_the_values_of_trl_up_to_rounding(kind: str, tmp_path: Path):
    model = make_model(kind).to(torch.bfloat16)
    exact = trl_values(copy.deepcopy(model).float())
    theirs, (ours, batching) = trl_values(model), our_values(model, tmp_path)
    assert batching.share_prompts
    np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.5)
    # The logits of both are bfloat16; ours are summed in float32.
    assert np.abs(ours - exact).sum() <= 1.5 * np.abs(theirs - exact).sum()


def test_autocast_gives_the_values_of_trl_under_autocast(tmp_path: Path):
    model = make_model()
    under = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    theirs, (ours, batching) = trl_values(model, autocast=under), our_values(model, tmp_path, autocast=torch.bfloat16)
    assert batching.share_prompts
    np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.5)
    exact = trl_values(model)
    assert 1e-5 < np.abs(ours / np.where(exact, exact, 1) - 1)[exact != 0].mean() < 0.02


def test_an_adapter_is_the_reference_or_is_disabled(tmp_path: Path):
    base = make_model()
    expected = trl_values(base)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    with model.disable_adapter():
        np.testing.assert_allclose(our_values(model, tmp_path)[0], expected, rtol=1e-4, atol=1e-5)
    with_adapter, batching = our_values(model, tmp_path)
    assert batching.share_prompts
    np.testing.assert_allclose(with_adapter, trl_values(model.merge_and_unload()), rtol=1e-4, atol=1e-5)
    assert not np.allclose(with_adapter, expected, rtol=0.01)


def test_a_model_that_trl_has_changed_is_computed_all_the_same(tmp_path: Path):
    from trl.trainer import utils

    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL leaves the model's forward alone")
    model = make_model("gemma2, eager")
    expected = trl_values(model)
    utils.add_fused_lm_head(model)
    np.testing.assert_allclose(our_values(model, tmp_path)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2, eager", "granite", "cohere", "opt", "phi", "mixtral", "mamba"])
def test_the_head_gives_the_logits_of_the_model_in_chunks_of_any_size(kind: str):
    model = make_model(kind)
    ids = torch.tensor([ROWS[0]["prompt_ids"] + ROWS[0]["chosen_ids"]])
    targets = torch.arange(ids.shape[1]) % VOCABULARY
    sizes: list[int] = []
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].log_softmax(-1)[torch.arange(ids.shape[1]), targets]
        outputs = backbone_of(model)(input_ids=ids)
        model.get_output_embeddings().register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-2]))
        for elements, chunks in ((1, [1] * 21), (4 * VOCABULARY, [4] * 5 + [1]), (2**25, [21])):
            head = LanguageModelHead(model, elements)
            found = head.log_probs(outputs.last_hidden_state[0], targets, outputs)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert sizes == chunks
            sizes.clear()
        assert head.log_probs(outputs.last_hidden_state[0][:0], targets[:0], outputs).shape == (0,)


def test_logits_exist_at_positions_that_predict_answers_only():
    model = make_model()
    positions: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, given: positions.append(given[0].shape[-2]))
    AnswerScorer(model).token_log_probs(make_rows(ANSWERS, True, BIG), True)
    assert sum(positions) == sum(answer.tokens for answer in ANSWERS)


def test_prompts_go_through_the_model_once_and_nothing_is_padded():
    model = make_model()
    fed: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: fed.append(given[0].numel()))
    AnswerScorer(model).token_log_probs(make_rows(ANSWERS, True, BIG), True)
    prompts = {answer.prompt.tobytes(): len(answer.prompt) for answer in ANSWERS}
    assert fed == [sum(prompts.values()) + sum(answer.tokens - 1 for answer in ANSWERS)]


def state_of(model: Any) -> list[Any]:
    config = model.config.get_text_config()
    return [
        config._attn_implementation,
        [(name, vars(module).get("forward"), module.training) for name, module in model.named_modules()],
        [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()],
    ]


class Cut(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("where", [None, "layer", "head"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_afterwards_as_it_was_also_after_an_exception(share: bool, where: str | None, attention: str):
    model = make_model(attn_implementation=attention)
    # Such as accelerate puts on a model that it spreads over devices.
    backbone, own = model.model, type(model.model).forward
    backbone.forward = lambda *given, **named: own(backbone, *given, **named)
    before = state_of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(torch.tensor([[3, 4, 5]])).logits
    scorer = AnswerScorer(model)
    rows = make_rows(ANSWERS, share, BIG)
    if where is None:
        assert len(scorer.token_log_probs(rows, share)) == sum(answer.tokens for answer in ANSWERS)
    else:

        def cut(*_: Any) -> None:
            raise Cut

        hook = {"layer": model.model.layers[1], "head": model.lm_head}[where].register_forward_pre_hook(cut)
        with pytest.raises(Cut):
            scorer.token_log_probs(rows, share)
        hook.remove()
    assert state_of(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[3, 4, 5]])).logits, expected)


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_no_random_numbers_and_no_gradients(kind: str, tmp_path: Path):
    model = make_model(kind, **({"resid_pdrop": 0.5, "attn_pdrop": 0.5} if kind == "gpt2" else {}))
    assert all(parameter.requires_grad for parameter in model.parameters())
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    values = AnswerScorer(model).token_log_probs(make_rows(ANSWERS, False, BIG), False)
    first, second = our_values(model, tmp_path)[0], our_values(model, tmp_path)[0]
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert np.array_equal(first, second)
    assert not values.requires_grad
    assert values.dtype == torch.float32
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_a_backbone_is_refused():
    class Whole(transformers.PreTrainedModel):
        config_class = LlamaConfig
        base_model_prefix = ""

        def get_decoder(self) -> Any:
            return self

    with pytest.raises(TypeError, match="has no backbone below its language-model head"):
        AnswerScorer(Whole(LlamaConfig(**SMALL)))


def test_a_row_of_several_answers_gives_what_each_gives_alone():
    model = make_model("mistral with a window")
    scorer = AnswerScorer(model)
    rows = make_rows(ANSWERS, True, BIG)
    assert max(len(row.answers) for row in rows) == 4
    together = scorer.token_log_probs(rows, True)
    alone = [scorer.token_log_probs([Row((answer,), (0,))], True) for row in rows for answer in row.answers]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
