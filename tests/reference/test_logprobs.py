"""Reference log-probabilities are TRL's own on every architecture, and prompts are shared only where that is exact."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from axolotl_dpo_ext.reference.batching import Row, make_rows
from axolotl_dpo_ext.reference.logprobs import AnswerScorer, LanguageModelHead, backbone_of
from axolotl_dpo_ext.reference.precompute import Batching, reference_log_probs
from axolotl_dpo_ext.reference.precomputed import PrecomputedReference
from axolotl_dpo_ext.reference.probe import choose_batching
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.rows import Answer, LogProbDefinition, Pair, answer_key, read_pairs
from axolotl_dpo_ext.reference.store import ReferenceStore
from axolotl_dpo_ext.reference.strategies import Policy
from axolotl_dpo_ext.settings import ReferenceSettings
from axolotl_dpo_ext.vocabulary import RunStopped
from tests.reference.tiny_models import SMALL, VOCABULARY, trainer_that_scores

pytestmark = pytest.mark.stack

WINDOW = 4  # shorter than every sequence that has an answer of more than a few tokens
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SOFT = {"head_dim": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
SHARED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2 with windows": {"use_sliding_window": True, **MIXED},
    "qwen3": {"head_dim": 8},
    "mistral with a window": {"sliding_window": WINDOW},
    "gemma2, eager": {**SOFT, "attn_implementation": "eager"},
    "gemma3_text": {"head_dim": 8, **MIXED},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": WINDOW},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.5},
    "cohere": {"logit_scale": 0.5},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}
NOT_SHARED: dict[str, dict[str, Any]] = {
    # Without eager attention Gemma 2 leaves its soft-capping out, and so does TRL's value.
    "gemma2, sdpa": {**SOFT, "attn_implementation": "sdpa"},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **MIXED},  # attention sinks
    "qwen3_next": {"head_dim": 8, **EXPERTS, **LINEAR},
    "mamba": {"state_size": 4},
    "bloom": {},
    "falcon with alibi": {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
}
KINDS = {**SHARED, **NOT_SHARED}
PLAIN = LogProbDefinition()
BIG = 2048


def seeded(model: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = model()
        # Biases, norms and sinks too: at zero or one they would show in no value.
        for parameter in made.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval()


def make_model(kind: str = "llama", **more: Any) -> Any:
    name = kind.partition(",")[0].partition(" ")[0]
    options = {**SMALL, **KINDS[kind], **more}
    attention = options.pop("attn_implementation", None)
    if name == "mamba":  # flash-linear-attention, once imported, has its own under this name
        return seeded(lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**options)))
    config = transformers.AutoConfig.for_model(name, **options)
    return seeded(lambda: AutoModelForCausalLM.from_config(config, attn_implementation=attention))


def skip_without_kernels(model: Any) -> None:
    try:
        model(torch.tensor([[3, 4, 5]]))
    except RuntimeError as error:
        if "active drivers" not in str(error):
            raise
        pytest.skip("flash-linear-attention is installed, and computes this model on a GPU only")


def make_rows_of_dataset() -> list[dict[str, list[int]]]:
    """Pairs with common prompts, very short and long answers, none, and hardly any prompt."""
    generator = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, VOCABULARY) for _ in range(count)]

    first, second = tokens(9), tokens(3)
    lengths = [(first, 12, 5), (first, 1, 7), (second, 2, 1), (tokens(17), 6, 13), ([], 8, 4), (tokens(1), 3, 0)]
    return [
        {"prompt_ids": prompt, "chosen_ids": tokens(chosen), "rejected_ids": tokens(rejected)}
        for prompt, chosen, rejected in lengths
    ]


ROWS = make_rows_of_dataset()
DATASET = Dataset.from_list(ROWS)


def answers_of(definition: LogProbDefinition = PLAIN) -> list[Answer]:
    pairs: list[Pair] = list(read_pairs(DATASET, definition, 0, len(DATASET)))
    return [answer for pair in pairs for answer in (pair.chosen, pair.rejected) if answer.tokens]


ANSWERS = answers_of()


def trl_values(model: Any, definition: LogProbDefinition = PLAIN, autocast: Any = torch.no_grad) -> np.ndarray:
    """TRL's own values of the pairs, chosen and rejected: its collator and its method, on one padded batch."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collator = DataCollatorForPreference(0, definition.max_length, definition.truncation_mode)
    trainer = trainer_that_scores(model, definition.ld_alpha, autocast)
    with autocast():
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, collator(ROWS))
    return torch.stack([chosen, rejected]).float().numpy()


def our_values(
    model: Any, folder: Path, definition: LogProbDefinition = PLAIN, budget: int | None = None, **options: Any
) -> tuple[np.ndarray, Batching]:
    """The values that a fresh store then holds, and how they were computed."""
    used: list[Batching] = []

    def scorer(answers: Sequence[Answer]) -> tuple[AnswerScorer, Batching]:
        one = AnswerScorer(model, **options)
        chosen = choose_batching(one, model, answers)
        used.append(Batching(chosen.share_prompts, budget or chosen.budget))
        return one, used[-1]

    store = ReferenceStore(folder / f"store-{len(list(folder.iterdir()))}", {})
    found = reference_log_probs(DATASET, definition, store, scorer, Processes())
    assert found.computed == len({answer_key(answer, definition.ld_alpha) for answer in answers_of(definition)})
    return np.stack([found.chosen, found.rejected]), used[0]


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


def test_attention_sinks_are_named_as_the_reason(caplog: pytest.LogCaptureFixture):
    model = make_model("gpt_oss")
    assert not choose_batching(AnswerScorer(model), model, ANSWERS).share_prompts
    assert "GptOssAttention passes s_aux to its attention" in caplog.text


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
