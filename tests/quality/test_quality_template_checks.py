"""The checks of what the model will see, after chat template, special tokens and truncation."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import AuditResult, PairBatch, audit
from axolotl_dpo_ext.quality.checks import DoubledBos, SameTokens, Truncated
from axolotl_dpo_ext.quality.embedders import LexicalEmbedder
from axolotl_dpo_ext.quality.tokens import TokenIds
from axolotl_dpo_ext.settings import QualitySettings

from .conftest import sentence

BOS, EOS = 1, 2
EVERYTHING = QualitySettings(policy={"malformed": "flag", "length_ratio": "flag"}, max_drop_fraction=1.0)
LLAMA_2 = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def score(check: Any, prompt: list[int], chosen: list[int], rejected: list[int], most: int | None = None) -> float:
    """Returns the score of one pair of these token ids."""
    batch = PairBatch(
        prompts=["why?"],
        chosen=["this"],
        rejected=["that"],
        prompt_ids=TokenIds.of([prompt]),
        chosen_ids=TokenIds.of([chosen]),
        rejected_ids=TokenIds.of([rejected]),
        max_length=most,
        bos=BOS,
    )
    return float(check.score(batch, EVERYTHING, LexicalEmbedder())[0])


def audited(tokenizer: Any, *rows: dict[str, Any], **given: Any) -> AuditResult:
    return audit(Dataset.from_list(list(rows)), tokenizer, EVERYTHING, **given)


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "most", "share"),
    [
        ([5] * 4, [6, 7, EOS], [8, EOS], 7, 0),  # exactly as long as there is room for
        ([5] * 4, [6, 7, EOS], [8, EOS], 6, 1 / 3),  # the end-of-sequence token alone
        ([5] * 4, [6, EOS], [8, 8, 8, EOS], 6, 1 / 2),  # the answer that loses most
        ([5] * 9, [6, 7, EOS], [8, EOS], 6, 1),  # the prompt alone fills it
        ([], [6, 7, 7, EOS], [8, EOS], 3, 1 / 4),
        ([5] * 900, [6, EOS], [8, EOS], None, np.nan),
    ],
)
def test_truncated_is_the_share_that_is_cut_off(
    prompt: list[int], chosen: list[int], rejected: list[int], most: int | None, share: float
):
    assert score(Truncated(), prompt, chosen, rejected, most) == pytest.approx(share, nan_ok=True)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "most", "same"),
    [
        ([5], [6, 7, EOS], [6, 7, EOS], None, True),  # two texts, one tokenization
        ([5], [6, 7, EOS], [6, 8, EOS], None, False),
        ([5], [6, 7, 8, EOS], [6, 7, 9, EOS], 3, True),
        ([5], [6, 7, 8, EOS], [6, 7, 9, EOS], 4, False),
        ([5], [6, EOS], [6, 7, EOS], None, False),
        ([5], [6, EOS], [6, 7, EOS], 2, True),  # what tells them apart is where they end
        ([5] * 4, [6, EOS], [7, EOS], 4, True),  # nothing is left of either
        ([5] * 9, [6, EOS], [7, EOS], 4, True),
    ],
)
def test_same_tokens_after_truncation(
    prompt: list[int], chosen: list[int], rejected: list[int], most: int | None, same: bool
):
    assert score(SameTokens(), prompt, chosen, rejected, most) == same


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "extra"),
    [
        ([BOS, 5], [6, EOS], [7, EOS], 0),
        ([5, BOS], [6, EOS], [7, EOS], 0),
        ([BOS, BOS, 5], [6, EOS], [7, EOS], 1),
        ([BOS, BOS, BOS, 5], [6, EOS], [7, EOS], 2),
        ([BOS, 5], [BOS, 6, EOS], [7, EOS], 1),
        ([BOS, 5], [6, EOS], [BOS, BOS, 7, EOS], 2),
        ([BOS, BOS, 5], [BOS, 6], [7], 2),
        ([BOS], [BOS], [BOS, BOS], 2),
        ([], [BOS, 6, EOS], [BOS, 7, EOS], 0),  # no prompt: the sequence begins with the answer
        ([], [BOS, BOS, 6], [7, EOS], 1),
        ([], [], [], 0),
    ],
)
def test_doubled_bos_counts_what_is_too_many(prompt: list[int], chosen: list[int], rejected: list[int], extra: float):
    assert score(DoubledBos(), prompt, chosen, rejected) == extra


def test_a_template_laid_on_before_a_tokenizer_that_adds_bos_itself(chat_tokenizer: Any):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = LLAMA_2
    user, good, bad = message("user", sentence(1)), message("assistant", sentence(2)), message("assistant", sentence(3))
    # What Axolotl's chat_template strategies hand to TRL: the rendered text, which TRL tokenizes as plain text.
    whole = [tokenizer.apply_chat_template([user, answer], tokenize=False) for answer in (good, bad)]
    prompt = tokenizer.apply_chat_template([user], tokenize=False)
    rendered = {"prompt": prompt, **dict(zip(("chosen", "rejected"), (t[len(prompt) :] for t in whole), strict=True))}
    bare = {**rendered, "prompt": prompt.removeprefix("<s>")}
    assert audited(tokenizer, rendered, bare).scores["doubled_bos"].tolist() == [1, 0]
    # An implicit prompt is found in both texts, and begins as they do.
    implicit = dict(zip(("chosen", "rejected"), whole, strict=True))
    assert audited(tokenizer, implicit).scores["doubled_bos"].tolist() == [1]
    # A conversation is rendered with its special tokens, to which nothing is added.
    conversation = {"prompt": [user], "chosen": [good], "rejected": [bad]}
    assert audited(tokenizer, conversation).scores["doubled_bos"].tolist() == [0]


def test_the_template_counts_for_truncation(chat_tokenizer: Any):
    asked, good, bad = sentence(1, 5), sentence(2, 6), sentence(3, 6)
    row = {"prompt": [message("user", asked)], "chosen": [message("assistant", good)]}
    row["rejected"] = [message("assistant", bad)]
    sequences = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
    longest = max(len(chat_tokenizer.apply_chat_template(s, return_dict=True)["input_ids"]) for s in sequences)
    fits, cut = (audited(chat_tokenizer, row, max_length=most) for most in (longest, longest - 1))
    assert fits.scores["truncated"].tolist() == [0]
    assert 0 < cut.scores["truncated"][0] < 0.5


def test_what_the_template_refuses_is_malformed_and_says_why(chat_tokenizer: Any):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = LLAMA_2
    good, bad = [message("assistant", sentence(2))], [message("assistant", sentence(3))]
    # A role that the pack knows nothing of, so that nobody but the template can refuse the order.
    twice = [message("user", "Hello?"), message("critic", "Say more.")]
    result = audited(
        tokenizer,
        {"prompt": twice, "chosen": good, "rejected": bad},
        {"prompt": twice[:1], "chosen": good, "rejected": bad},
    )
    (record,) = [record for record in result.records if record["check"] == "malformed"]
    assert record["row"] == 0
    assert record["reason"].startswith("the chat template refuses it: Conversation roles must alternate")
    assert np.isnan(result.scores["length_ratio"]).tolist() == [True, False]
    assert record["reason"] in result.section().data["checks"]["malformed"]["example"]


def test_a_tokenizer_without_a_template_still_counts_tokens(chat_tokenizer: Any):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = None
    row = {"prompt": [message("user", "Why?")], "chosen": [message("assistant", "a " * 30)]}
    result = audited(tokenizer, {**row, "rejected": [message("assistant", "b")]})
    assert result.counts["malformed"] == 0
    assert result.scores["length_ratio"][0] > 10
