"""Ways of computing that are not exact are found on real rows, and left or refused with the reason."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from axolotl_dpo_ext.reference.batching import make_rows
from axolotl_dpo_ext.reference.logprobs import AnswerScorer
from axolotl_dpo_ext.reference.precomputed import PrecomputedReference
from axolotl_dpo_ext.reference.probe import choose_batching
from axolotl_dpo_ext.reference.strategies import Policy
from axolotl_dpo_ext.settings import ReferenceSettings
from axolotl_dpo_ext.vocabulary import RunStopped
from tests.reference.scoring import (
    ANSWERS,
    BIG,
    DATASET,
    EXPERTS,
    PLAIN,
    ROWS,
    make_model,
    our_values,
    seeded,
    trl_values,
)
from tests.reference.tiny_models import SMALL, VOCABULARY

pytestmark = pytest.mark.stack


def test_attention_sinks_are_named_as_the_reason(caplog: pytest.LogCaptureFixture):
    model = make_model("gpt_oss")
    assert not choose_batching(AnswerScorer(model), model, ANSWERS).share_prompts
    assert "GptOssAttention passes s_aux to its attention" in caplog.text


class Fooled(LlamaModel):
    """A backbone that does not do what it is asked to."""

    def forward(self, input_ids: Any, position_ids: Any = None, **more: Any) -> Any:
        return super().forward(input_ids, position_ids=None, **more)


class Recurrent(LlamaModel):
    """A backbone in which a token sees all tokens before it, whatever its attention is told."""

    def forward(self, input_ids: Any, **more: Any) -> Any:
        outputs = super().forward(input_ids, **more)
        outputs.last_hidden_state = outputs.last_hidden_state + 0.1 * outputs.last_hidden_state.cumsum(1)
        return outputs


class Stubborn(LlamaModel):
    """A backbone that takes no positions."""

    def forward(self, input_ids: Any, position_ids: Any = None, **more: Any) -> Any:
        if position_ids is not None:
            raise KeyError("position_ids")
        return super().forward(input_ids, **more)


class Mistaken(LlamaModel):
    """A backbone whose answers are not finite if it is given positions."""

    def forward(self, input_ids: Any, position_ids: Any = None, **more: Any) -> Any:
        outputs = super().forward(input_ids, position_ids=position_ids, **more)
        if position_ids is not None:
            outputs.last_hidden_state = outputs.last_hidden_state * float("nan")
        return outputs


class Looking(nn.Linear):
    """A head that looks at the hidden state before the one that it is asked about."""

    def forward(self, hidden: Any) -> Any:
        return super().forward(hidden + nn.functional.pad(hidden, (0, 0, 1, 0))[..., :-1, :])


def llama_with(backbone: type[LlamaModel] = LlamaModel, head: type[nn.Linear] = nn.Linear) -> Any:
    def make() -> Any:
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
        model.model.__class__ = backbone
        model.lm_head.__class__ = head
        return model

    return seeded(make)


@pytest.mark.parametrize("backbone", [Fooled, Recurrent, Stubborn, Mistaken])
def test_a_model_whose_prompts_cannot_be_shared_exactly_is_found_out_and_said(
    backbone: type[LlamaModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = llama_with(backbone)
    caplog.set_level(logging.INFO)
    found, batching = our_values(model, tmp_path)
    assert not batching.share_prompts
    np.testing.assert_allclose(found, trl_values(model), rtol=1e-4, atol=1e-5)
    warning = next(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "LlamaForCausalLM: each answer is computed with its own prompt" in warning
    assert ("position_ids" if backbone is Stubborn else "values differ by") in warning


def test_attention_in_chunks_is_found_out_before_a_row_is_longer_than_a_chunk(tmp_path: Path):
    options = {"head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": [], "attention_chunk_size": 40}
    config = transformers.AutoConfig.for_model("llama4_text", **{**SMALL, **options})
    model = seeded(lambda: AutoModelForCausalLM.from_config(config))
    assert "chunked_attention" in config.layer_types
    found, batching = our_values(model, tmp_path)
    assert not batching.share_prompts
    with torch.no_grad():
        ids = torch.tensor([ROWS[0]["prompt_ids"] + ROWS[0]["chosen_ids"]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    expected = log_probs[range(8, 20), ids[0, 9:]].sum()
    assert found[0, 0] == pytest.approx(expected.item(), rel=1e-4)


def test_sharing_is_tried_even_if_no_two_answers_of_the_probe_have_one_prompt():
    # Such as after truncation at the start. What is chosen is remembered, and a later dataset is not like this one.
    alone = [answer for row in make_rows(ANSWERS, True, BIG) for answer in row.answers[:1]]
    assert len(make_rows(alone, True, BIG)) == len(alone)
    model = llama_with(Fooled)
    assert not choose_batching(AnswerScorer(model), model, alone).share_prompts
    model = make_model()
    assert choose_batching(AnswerScorer(model), model, alone).share_prompts


def test_a_shared_prompt_is_said(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    model = make_model()
    assert choose_batching(AnswerScorer(model), model, ANSWERS).share_prompts
    assert "LlamaForCausalLM: prompts are computed once for all their answers" in caplog.text


class TwoWays(LlamaModel):
    """A backbone in which a token sees the last of all tokens."""

    def forward(self, input_ids: Any, **more: Any) -> Any:
        outputs = super().forward(input_ids, **more)
        outputs.last_hidden_state = outputs.last_hidden_state + 0.1 * outputs.last_hidden_state[:, -1:]
        return outputs


@pytest.mark.parametrize("parts", [{"head": Looking}, {"backbone": TwoWays}])
def test_a_model_that_needs_other_positions_is_refused_with_the_reason(parts: dict[str, Any], tmp_path: Path):
    model = llama_with(**parts)
    with pytest.raises(RunStopped) as stopped:
        our_values(model, tmp_path)
    for words in (
        "LlamaForCausalLM",
        "its head needs more than the hidden states",
        "depend on tokens that come after",
        "fix: use `reference: gpu`",
    ):
        assert words in str(stopped.value)
    assert not list(tmp_path.glob("*/*/shard-*"))


# Models that know their window from the mask only, which sharing prompts leaves out.
MASKED = {
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1, "shared_expert_intermediate_size": 16, **EXPERTS},
}


@pytest.mark.parametrize("name", MASKED)
def test_what_is_exact_for_rows_within_a_window_is_looked_at_again_for_longer_ones(name: str, tmp_path: Path):
    config = transformers.AutoConfig.for_model(name, **SMALL, **MASKED[name], sliding_window=12)
    model = seeded(lambda: AutoModelForCausalLM.from_config(config))
    settings = ReferenceSettings(strategy="precomputed", store=str(tmp_path))
    reference = PrecomputedReference(Policy(model, False, PLAIN, settings, torch.device("cpu"), None, None))
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in ROWS]
    short = [index for index, length in enumerate(lengths) if length <= 12]
    assert 1 < len(short) < len(ROWS)
    expected = trl_values(model)
    for rows in (short, list(range(len(ROWS)))):
        found = reference.for_dataset(DATASET.select(rows), "train")
        np.testing.assert_allclose([found.chosen, found.rejected], expected[:, rows], rtol=1e-4, atol=1e-5)


def test_memory_that_is_not_enough_for_the_probe_shortens_it_and_says_so(caplog: pytest.LogCaptureFixture):
    model = make_model("mistral with a window")
    longest = max(len(answer.ids) for answer in ANSWERS)
    limit = longest - 1

    class Scarce(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **given: Any) -> Any:
            if input_ids.numel() > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().forward(input_ids=input_ids, **given)

    model.__class__ = Scarce
    chosen = choose_batching(AnswerScorer(model), model, ANSWERS)
    assert not chosen.share_prompts  # what a longer row would have shown is not known
    assert "ran out of memory; going on with answers of at most" in caplog.text
    limit = 0
    with pytest.raises(RunStopped, match=r"(?s)why: computing a longer one ran out of memory.*larger device"):
        choose_batching(AnswerScorer(model), model, ANSWERS)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_scaled_by_the_longest_row_of_a_batch_are_refused_with_that_reason(kind: str):
    length = max(len(answer.ids) for answer in ANSWERS)
    longrope = {"long_factor": [3.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": length // 2}
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0, **(longrope if kind == "longrope" else {})}
    model = make_model(max_position_embeddings=length // 2, rope_parameters=rope)
    with pytest.raises(RunStopped, match=rf"(?s)depend on which answers are computed together.*\({kind}\)"):
        choose_batching(AnswerScorer(model), model, ANSWERS)
    short = [answer for answer in ANSWERS if len(answer.ids) <= length // 2]
    assert choose_batching(AnswerScorer(model), model, short).share_prompts


def test_answers_too_long_to_be_compared_are_named(monkeypatch: pytest.MonkeyPatch):
    from axolotl_dpo_ext.reference import probe

    model = make_model()
    shortest = min(len(answer.ids) for answer in ANSWERS)
    monkeypatch.setattr(probe, "PROBE_LOGITS", VOCABULARY * (shortest - 1))
    with pytest.raises(RunStopped, match="lower sequence_len"):
        choose_batching(AnswerScorer(model), model, ANSWERS)
    monkeypatch.setattr(probe, "PROBE_LOGITS", VOCABULARY * 15)  # some are short enough
    assert choose_batching(AnswerScorer(model), model, ANSWERS).share_prompts
