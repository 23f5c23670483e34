"""Every form of preference data is read as the same pairs; whatever is wrong is said, and nothing raises."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, Features, IterableDataset, Value

from axolotl_dpo_ext.quality import audit
from axolotl_dpo_ext.quality.pairs import Pair, parse_pair
from axolotl_dpo_ext.quality.reading import PairReader, read_pairs
from axolotl_dpo_ext.quality.tokens import TextTokenizer
from axolotl_dpo_ext.settings import QualitySettings
from axolotl_dpo_ext.vocabulary import ConfigurationError

from .conftest import make_pairs

USER = {"role": "user", "content": "What is 2+2?"}
YES, NO = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
HUMAN = {"from": "human", "value": "What is 2+2?"}
GPT_YES, GPT_NO = {"from": "gpt", "value": "4"}, {"from": "gpt", "value": "5"}
PLAIN = ("What is 2+2?", "4", "5", "")


def texts(data: Dataset, size: int) -> list[list[tuple[str, ...]]]:
    """Returns the texts of a dataset's pairs with what is wrong with them, by batch."""
    batches = PairReader(data, TextTokenizer.of(None)).batches(size)
    return [list(zip(b.prompts, b.chosen, b.rejected, b.faults, strict=True)) for b in batches]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": "What is 2+2?", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"conversations": [HUMAN], "chosen": GPT_YES, "rejected": GPT_NO},
        {"messages": [USER], "chosen": YES, "rejected": NO},
        {"messages": [USER], "chosen": "4", "rejected": "5"},
        {"chosen": [HUMAN, GPT_YES], "rejected": [HUMAN, GPT_NO]},
    ],
    ids=[
        "text",
        "messages",
        "text+conversations",
        "implicit",
        "sharegpt",
        "axolotl",
        "mixed",
        "sharegpt-implicit",
    ],
)
def test_every_form_is_the_same_pair(row: dict[str, Any]):
    data = Dataset.from_list([row, row])
    assert texts(data, 1) == [[PLAIN], [PLAIN]]
    assert [pair[:4] for pair in read_pairs(data, [1])] == [PLAIN]


def test_multi_turn_prompts_and_content_parts():
    turns = [{"role": "system", "content": ""}, USER, YES, {"role": "user", "content": "Sure?"}]
    parts = {"role": "assistant", "content": [{"type": "text", "text": "Y"}, {"type": "text", "text": "es"}]}
    pair = parse_pair([*turns, parts], [*turns, NO])
    assert pair[:3] == ("system: \nuser: What is 2+2?\nassistant: 4\nuser: Sure?", "Yes", "5")


def test_conversations_that_part_early_keep_all_later_turns():
    more = {"role": "user", "content": "Sure?"}
    assert parse_pair([USER, YES, more, YES], [USER, NO])[:4] == ("What is 2+2?", "4\nSure?\n4", "5", "")
    assert parse_pair([USER, YES, more, YES], [USER, YES])[:4] == ("What is 2+2?", "4\nSure?\n4", "4", "")
    assert parse_pair([USER, YES], [USER, YES])[:4] == ("What is 2+2?", "4", "4", "")


def test_a_tool_call_is_an_answer():
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": "2,2"}}],
    }
    pair = parse_pair([call], [NO], [USER])
    assert not pair.fault
    assert '"add"' in pair.chosen


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("\n\nHuman: Hi\n\nAssistant: ", "The cat", "The dog"),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Ab", "Ac"),
        ("[INST] Hi [/INST] ", "The cat", "The dog"),
        ("Name one.\n", "The cat", "The dog"),
        ("List:\n", "1. Apple", "1. Pear"),
        ("What is it? ", "The cat", "The dog"),
        ("\u4f55\u3067\u3059\u304b\u3002", "\u732b", "\u72ac"),
        ("", "The cat", "The dog"),
        ("", "1. Apple", "1. Pear"),
        ("Human: Hi\nAssistant: Hello\nHuman: And?\nAssistant: ", "The cat", "The dog"),
        ("Same line\n", "Same end", "Same end"),
    ],
)
def test_a_prompt_in_both_texts_ends_where_the_answer_begins(prompt: str, chosen: str, rejected: str):
    assert parse_pair(prompt + chosen, prompt + rejected) == Pair(prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ((None, "5", "q"), "chosen: missing"),
        (("4", "", "q"), "rejected: empty"),
        (("4", " \n", "q"), "rejected: only whitespace"),
        ((4, 5.0, "q"), "chosen: not text but int; rejected: not text but float"),
        (("4", "5", None), "prompt: missing"),
        (("4", "5", "  "), "prompt: only whitespace"),
        (("4", "5", []), "prompt: empty, no message"),
        (("4", "5", 7), "prompt: not text but int"),
        (([], [NO], [USER]), "chosen: missing, no message"),
        (([USER], [NO], [USER]), "chosen: answer begins with a message of 'user', not of 'assistant'"),
        (([YES, USER], [NO], [USER]), "chosen: answer ends with a message of 'user', not of 'assistant'"),
        (
            ([{"role": "assistant", "content": None}], [NO], [USER]),
            "chosen: a message of 'assistant' without text",
        ),
        (([{"role": "assistant", "content": " "}], [NO], [USER]), "chosen: only whitespace"),
        (([{"content": "4"}], [NO], [USER]), "chosen: a message without a role"),
        (([{"role": "assistant", "content": 4}], [NO], [USER]), "chosen: not text but int"),
        ((["4"], [NO], [USER]), "chosen: not a message but str"),
        (("Human: Hi\nAssistant:", "Human: Hi\nAssistant: Yes"), "chosen: empty"),
        (([USER], [USER, YES]), "chosen: missing, no message"),
    ],
)
def test_what_is_wrong_is_said(row: tuple[Any, ...], fault: str):
    pair = parse_pair(*row)
    assert pair.fault == fault
    for side in ("prompt", "chosen", "rejected"):
        assert (getattr(pair, side) == "") == (f"{side}:" in fault)


def test_conversations_without_a_common_prompt_are_malformed():
    other = {"role": "user", "content": "What is 3+3?"}
    assert "begins with a message of 'user'" in parse_pair([USER, YES], [other, NO]).fault


def test_numbers_instead_of_text_are_malformed_rows_not_a_crash():
    data = Dataset.from_dict({**make_pairs(4), "rejected": [1, 2, None, 4]})
    result = audit(data, settings=QualitySettings(policy={"malformed": "flag"}))
    assert [record["reason"] for record in result.records] == [
        "rejected: not text but int",
        "rejected: not text but int",
        "rejected: missing",
        "rejected: not text but int",
    ]
    assert len(result.train) == 4


def test_a_set_format_makes_no_difference():
    rows = [{"chosen": [USER, YES], "rejected": [USER, NO]}] * 2
    assert [pair[:4] for pair in read_pairs(Dataset.from_list(rows).with_format("numpy"), [0, 1])] == [PLAIN] * 2
    assert texts(Dataset.from_list(rows).with_format("numpy"), 2) == [[PLAIN] * 2]


def test_a_column_of_nulls_is_a_missing_prompt():
    features = Features({"prompt": Value("null"), "chosen": Value("string"), "rejected": Value("string")})
    data = Dataset.from_dict({**make_pairs(2), "prompt": [None, None]}, features=features).with_format("numpy")
    assert [pair.fault for pair in read_pairs(data, [0, 1])] == ["prompt: missing"] * 2


def test_other_columns_are_neither_read_nor_lost():
    data = Dataset.from_dict({**make_pairs(3), "margin": [0.1, 0.2, 0.3]})
    result = audit(data, settings=QualitySettings())
    assert result.train["margin"][:] == [0.1, 0.2, 0.3]


def test_missing_columns_and_streams_are_configuration_errors():
    with pytest.raises(ConfigurationError, match="no column 'rejected'"):
        audit(Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]}), settings=QualitySettings())
    stream = IterableDataset.from_generator(lambda: iter([{"chosen": "a", "rejected": "b"}]))
    with pytest.raises(ConfigurationError, match="IterableDataset"):
        audit(stream, settings=QualitySettings())
