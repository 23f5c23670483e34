"""Reads preference pairs in every form that TRL and Axolotl accept, as flat text.

Accepted sides (``chosen``, ``rejected``): plain text, one message, or a conversation. Messages may be
``{role, content}`` or ShareGPT's ``{from, value}``. The prompt is the first of the columns ``prompt``,
``conversations`` and ``messages`` that exists; without one it is what both sides have in common.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from axolotl_dpo_ext.quality.messages import (
    FaultError,
    Messages,
    answer_text,
    as_messages,
    is_whole_conversation,
    order_fault,
    prompt_text,
    role_of,
    template_message,
)
from axolotl_dpo_ext.quality.text import common_length, is_blank

# How chat templates and well-known datasets open the assistant's turn: the prompt ends with the last of them.
_ASSISTANT_TURN = re.compile(
    r"<\|im_start\|>assistant[ \t]*\n?"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\s*"
    r"|<start_of_turn>model[ \t]*\n?"
    r"|<\|assistant\|>[ \t]*\n?"
    r"|\[/INST\][ \t]*"
    r"|(?:^|(?<=\n))(?:#+[ \t]*)?(?:assistant|response|gpt|ai)[ \t]*:[ \t]*\n?",
    re.IGNORECASE,
)
# Where else a shared prompt may end, best first: a line, a sentence (but not the "1. " of a list).
_BOUNDARIES = (re.compile(r"\n"), re.compile(r"(?<!\d)[.!?][ \t]+|[。！？]"))  # noqa: RUF001 - CJK marks are meant
_IMPLICIT: Any = object()


class Conversation(NamedTuple):
    """The messages of a pair, as chat templates take them: ``role`` and ``content``, perhaps ``tool_calls``."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


class Pair(NamedTuple):
    """One row as flat text.

    Attributes:
        prompt: Several messages are joined as ``role: text`` lines; ``""`` without a prompt.
        chosen: The chosen answer, or the one answer of unpaired data.
        rejected: The rejected answer; ``""`` in unpaired data.
        fault: What is wrong with the row's form, ``""`` where nothing is.
        conversation: The messages, where the row has messages and no fault.
        desirable: For unpaired data, the answer's label.
    """

    prompt: str
    chosen: str
    rejected: str
    fault: str = ""
    conversation: Conversation | None = None
    desirable: bool | None = None


def parse_pair(chosen: Any, rejected: Any, prompt: Any = _IMPLICIT) -> Pair:
    """Returns one row as flat text, with what is wrong with it; never raises for what a row holds.

    Args:
        chosen: Text, a message, or a conversation.
        rejected: The same.
        prompt: Text or a conversation. Without it the prompt is what both sides begin with.
    """
    chosen, rejected = as_messages(chosen), as_messages(rejected)
    implicit = prompt is _IMPLICIT
    if isinstance(chosen, str) and isinstance(rejected, str) and implicit:
        prompt, chosen, rejected = _split_texts(chosen, rejected)
    elif is_whole_conversation(chosen) and is_whole_conversation(rejected):
        # Also with a prompt column: TRL too takes the prompt from the conversations then.
        common = _common_messages(chosen, rejected)
        if common or implicit:
            prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    faults: list[str] = []
    # Answers that share no prompt are still answers; a prompt that was given and is empty is a fault.
    prompt = None if prompt is _IMPLICIT or (implicit and not prompt) else as_messages(prompt)
    return Pair(
        prompt="" if prompt is None and implicit else _attempt("prompt", prompt_text, prompt, faults),
        chosen=_attempt("chosen", answer_text, chosen, faults),
        rejected=_attempt("rejected", answer_text, rejected, faults),
        fault="; ".join(faults) or _order_fault(prompt, {"chosen": chosen, "rejected": rejected}),
        conversation=None if faults else _conversation(prompt, chosen, rejected),
    )


def parse_single(completion: Any, label: Any, prompt: Any = _IMPLICIT) -> Pair:
    """Returns one row of unpaired data as flat text, with what is wrong with it; never raises for what a row holds.

    Args:
        completion: Text, a message, or a conversation.
        label: Whether the answer is desirable.
        prompt: Text or a conversation.
    """
    completion, faults = as_messages(completion), list[str]()
    implicit = prompt is _IMPLICIT
    prompt = None if implicit else as_messages(prompt)
    if label not in (True, False):
        faults.append("label: missing" if label is None else f"label: not true or false but {type(label).__name__}")
    return Pair(
        prompt="" if implicit else _attempt("prompt", prompt_text, prompt, faults),
        chosen=_attempt("completion", answer_text, completion, faults),
        rejected="",
        fault="; ".join(faults) or _order_fault(prompt, {"completion": completion}),
        conversation=None if faults else _conversation(prompt, completion, []),
        desirable=bool(label),
    )


def _order_fault(prompt: Any, answers: Mapping[str, Any]) -> str:
    """Returns what is wrong with the order of roles in a row whose sides are sound by themselves."""
    asked = prompt if isinstance(prompt, list) else []
    if fault := order_fault(asked):
        return f"prompt: {fault}"
    for side, answer in answers.items():
        said = answer if isinstance(answer, list) else [{"role": "assistant"}]
        if fault := order_fault([*asked, *said]):
            return f"{side}: {fault}"
    return ""


def _conversation(prompt: Any, chosen: Any, rejected: Any) -> Conversation | None:
    """Returns sound sides as messages, or ``None`` where the answers are plain text."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return None
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if prompt else []
    return Conversation(*([template_message(item) for item in side] for side in (asked, chosen, rejected)))


def _attempt(side: str, read: Callable[[Any], str], value: Any, faults: list[str]) -> str:
    try:
        return read(value)
    except FaultError as fault:
        faults.append(f"{side}: {fault}")
        return ""


def _common_messages(chosen: list[Any], rejected: list[Any]) -> int:
    """Returns how many messages both begin with, leaving each its answer if it has one."""
    most = min(len(chosen), len(rejected))
    common = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    # One side is the beginning of the other: its last message is the answer, unless the answer is missing.
    return common - 1 if common == most and role_of(chosen[common - 1]) == "assistant" else common


def _split_texts(chosen: str, rejected: str) -> tuple[Any, str, str]:
    """Splits two texts into their common prompt and the answers.

    The cut is after the last opening of an assistant's turn that both share; failing that, after the last
    line, and failing that, after the last sentence. Cutting at the first differing character, as TRL does,
    would add what answers happen to begin with to the prompt; one prompt would then look like several.
    """
    shared = common_length(chosen, rejected)
    turns = [m.end() for m in _ASSISTANT_TURN.finditer(chosen, 0, shared)]
    if turns:
        cut = turns[-1]
        return chosen[:cut], chosen[cut:], rejected[cut:]
    for boundary in _BOUNDARIES:
        for cut in reversed([m.end() for m in boundary.finditer(chosen, 0, shared)]):
            if not (is_blank(chosen[cut:]) or is_blank(rejected[cut:]) or is_blank(chosen[:cut])):
                return chosen[:cut], chosen[cut:], rejected[cut:]
    return "", chosen, rejected
