"""An audit sees the very tokens that TRL will train on, for every form of preference data that TRL takes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_dpo_ext.quality import audit
from axolotl_dpo_ext.quality.reading import PairReader
from axolotl_dpo_ext.quality.tokens import TextTokenizer
from axolotl_dpo_ext.settings import QualitySettings

from .conftest import make_pairs

pytestmark = pytest.mark.stack

# Writes tools and BOS itself, as Llama 3's does.
WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes, hello."}]


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows(form: str) -> list[dict[str, Any]]:
    """Returns 20 pairs in one of the forms."""
    pairs = make_pairs(20)
    made = []
    for prompt, chosen, rejected in zip(*pairs.values(), strict=True):
        asked, good, bad = messages("user", prompt), messages("assistant", chosen), messages("assistant", rejected)
        made.append(
            {
                "text": {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"},
                "conversation": {"prompt": asked, "chosen": good, "rejected": bad},
                "turns": {"prompt": [SYSTEM, *EARLIER, *asked], "chosen": good, "rejected": bad + EARLIER},
                "implicit": {"chosen": [SYSTEM, *asked, *good], "rejected": [SYSTEM, *asked, *bad]},
                "tools": {"prompt": asked, "chosen": good, "rejected": bad, "tools": json.dumps([TOOL])},
            }[form]
        )
    return made


def trl_ids(data: Dataset, tokenizer: Any, folder: Path) -> list[dict[str, list[int]]]:
    """Returns what a real ``DPOTrainer`` makes of the data."""
    from trl import DPOConfig, DPOTrainer

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)) for _ in range(2))
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    args = DPOConfig(str(folder), max_length=None, **quiet)
    trainer = DPOTrainer(model, reference, args=args, processing_class=tokenizer, train_dataset=data)
    return [{side: row[f"{side}_ids"] for side in ("prompt", "chosen", "rejected")} for row in trainer.train_dataset]


def our_ids(data: Dataset, tokenizer: Any) -> list[dict[str, list[int]]]:
    found = []
    for batch in PairReader(data, TextTokenizer.of(tokenizer)).batches(7):
        assert not any(batch.faults), batch.faults
        sides = zip(batch.prompt_ids, batch.chosen_ids, batch.rejected_ids, strict=True)
        found += [dict(zip(("prompt", "chosen", "rejected"), map(list, ids), strict=True)) for ids in sides]
    return found


@pytest.fixture(params=["its own template", "a template with tools"])
def tokenizer(request: pytest.FixtureRequest, chat_tokenizer: Any) -> Any:
    made = copy.deepcopy(chat_tokenizer)
    if request.param == "a template with tools":
        made.chat_template = WITH_TOOLS
    return made


@pytest.mark.parametrize("form", ["text", "conversation", "turns", "implicit", "tools"])
def test_the_tokens_are_those_of_trl(form: str, tokenizer: Any, tmp_path: Path):
    data = Dataset.from_list(rows(form))
    assert our_ids(data, tokenizer) == trl_ids(data, tokenizer, tmp_path)


def test_sharegpt_is_the_same_conversation(tokenizer: Any, tmp_path: Path):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    conversations = rows("turns")
    sharegpt = [
        {
            name: [{"from": names[m["role"]], "value": m["content"]} for m in row[side]]
            for name, side in (("conversations", "prompt"), ("chosen", "chosen"), ("rejected", "rejected"))
        }
        for row in conversations
    ]
    assert our_ids(Dataset.from_list(sharegpt), tokenizer) == trl_ids(
        Dataset.from_list(conversations), tokenizer, tmp_path
    )


def test_tools_are_part_of_the_prompt_as_a_list_and_as_json(chat_tokenizer: Any):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = WITH_TOOLS
    plain = rows("conversation")
    as_json = [{**row, "tools": json.dumps([TOOL])} for row in plain]
    as_list = [{**row, "tools": [TOOL]} for row in plain]
    none = [{**row, "tools": None if i % 2 else ""} for i, row in enumerate(plain)]
    without, of_json, of_list, of_none = (
        our_ids(Dataset.from_list(some), tokenizer) for some in (plain, as_json, as_list, none)
    )
    assert of_json == of_list
    assert of_none == without
    assert '"name": "add"' in tokenizer.decode(of_json[0]["prompt"])
    assert [len(ids["prompt"]) for ids in of_json] > [len(ids["prompt"]) for ids in without]
    assert [ids["chosen"] for ids in of_json] == [ids["chosen"] for ids in without]


def test_tools_that_are_no_json_are_named(chat_tokenizer: Any):
    data = Dataset.from_list([{**rows("conversation")[0], "tools": "[{"}])
    result = audit(data, chat_tokenizer, QualitySettings(policy={"malformed": "flag"}))
    assert "tools: not valid JSON in UTF-8 (Expecting property name" in result.records[0]["reason"]


def test_a_prompt_in_both_texts_ends_before_words_that_the_answers_share(chat_tokenizer: Any, tmp_path: Path):
    # TRL cuts at the first difference, also within a word. The sequences are the same, only the cut is not.
    pairs = make_pairs(5)
    data = Dataset.from_list(
        [
            {"chosen": f"{prompt}\nWell, {chosen}", "rejected": f"{prompt}\nWell, {rejected}"}
            for prompt, chosen, rejected in zip(*pairs.values(), strict=True)
        ]
    )
    for ours, theirs in zip(our_ids(data, chat_tokenizer), trl_ids(data, chat_tokenizer, tmp_path), strict=True):
        assert len(ours["prompt"]) < len(theirs["prompt"])
        for side in ("chosen", "rejected"):
            texts = [chat_tokenizer.decode(ids["prompt"] + ids[side]) for ids in (ours, theirs)]
            assert texts[0] == texts[1]
