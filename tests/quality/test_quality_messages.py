"""Roles in an order that no chat has are named; what a model thought, and what only a template reads, is kept."""

from __future__ import annotations

from typing import Any

import pytest

from axolotl_dpo_ext.quality.pairs import parse_pair, parse_single

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}


def said(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": f"{number}. {role}"} for number, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("prompt", "answer", "fault"),
    [
        (said("user", "user"), said("assistant"), "prompt: a message of 'user' follows another of 'user'"),
        (
            said("user", "system"),
            said("assistant"),
            "prompt: a message of 'system' stands behind one of 'user', not at the beginning",
        ),
        (
            said("user", "assistant"),
            said("assistant"),
            "chosen: a message of 'assistant' follows another of 'assistant'",
        ),
        (
            said("user"),
            said("assistant", "assistant"),
            "chosen: a message of 'assistant' follows another of 'assistant'",
        ),
        (said("user", "assistant"), "text", "chosen: a message of 'assistant' follows another of 'assistant'"),
        (said("system", "developer", "user"), said("assistant"), ""),
        (said("assistant", "user"), said("assistant"), ""),
        (said("user"), said("assistant", "user", "assistant"), ""),
        (said("user", "critic", "critic"), said("assistant"), ""),
        ([*said("user"), CALL, *said("tool", "tool")], said("assistant"), ""),
        ([*said("user"), CALL], said("assistant"), ""),
    ],
)
def test_the_order_of_roles(prompt: Any, answer: Any, fault: str):
    other = answer if isinstance(answer, str) else [*answer[:-1], {**answer[-1], "content": "other"}]
    pair = parse_pair(answer, f"{other}!" if isinstance(other, str) else other, prompt)
    assert pair.fault == fault
    assert parse_single(answer, True, prompt).fault == fault.replace("chosen:", "completion:")


def test_thoughts_are_part_of_an_answer_and_templates_see_all_of_a_message():
    chosen, rejected = (
        [{"role": "assistant", "content": "4", "reasoning_content": thought, "name": "tutor", "weight": None}]
        for thought in ("Two and two.", "A guess.")
    )
    pair = parse_pair(chosen, rejected, said("user"))
    assert (pair.chosen, pair.rejected) == ("Two and two.\n4", "A guess.\n4")
    assert pair.conversation is not None
    assert pair.conversation.chosen == [
        {"role": "assistant", "content": "4", "reasoning_content": "Two and two.", "name": "tutor"}
    ]
