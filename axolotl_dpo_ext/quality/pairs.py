"""Reads preference pairs in every form that TRL and Axolotl accept, as flat text.

Accepted sides (``chosen``, ``rejected``): plain text, one message, or a conversation. Messages may be
``{role, content}`` or ShareGPT's ``{from, value}``. The prompt is the first of the columns ``prompt``,
``conversations`` and ``messages`` that exists; without one it is what both sides have in common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from axolotl_dpo_ext.quality.text import common_length, is_blank

_ROLES = {
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
}
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


Messages = list[dict[str, Any]]


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


class _Message(NamedTuple):
    role: str
    text: str


class _FaultError(ValueError):
    """Something in one side of a pair is not what it has to be."""


def parse_pair(chosen: Any, rejected: Any, prompt: Any = _IMPLICIT) -> Pair:
    """Returns one row as flat text, with what is wrong with it; never raises for what a row holds.

    Args:
        chosen: Text, a message, or a conversation.
        rejected: The same.
        prompt: Text or a conversation. Without it the prompt is what both sides begin with.
    """
    chosen, rejected = _as_messages(chosen), _as_messages(rejected)
    implicit = prompt is _IMPLICIT
    if isinstance(chosen, str) and isinstance(rejected, str) and implicit:
        prompt, chosen, rejected = _split_texts(chosen, rejected)
    elif _is_whole_conversation(chosen) and _is_whole_conversation(rejected):
        # Also with a prompt column: TRL too takes the prompt from the conversations then.
        common = _common_messages(chosen, rejected)
        if common or implicit:
            prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    faults: list[str] = []
    # Answers that share no prompt are still answers; a prompt that was given and is empty is a fault.
    prompt = None if prompt is _IMPLICIT or (implicit and not prompt) else _as_messages(prompt)
    return Pair(
        prompt="" if prompt is None and implicit else _attempt("prompt", _prompt_text, prompt, faults),
        chosen=_attempt("chosen", _answer_text, chosen, faults),
        rejected=_attempt("rejected", _answer_text, rejected, faults),
        fault="; ".join(faults),
        conversation=None if faults else _conversation(prompt, chosen, rejected),
    )


def parse_single(completion: Any, label: Any, prompt: Any = _IMPLICIT) -> Pair:
    """Returns one row of unpaired data as flat text, with what is wrong with it; never raises for what a row holds.

    Args:
        completion: Text, a message, or a conversation.
        label: Whether the answer is desirable.
        prompt: Text or a conversation.
    """
    completion, faults = _as_messages(completion), list[str]()
    implicit = prompt is _IMPLICIT
    prompt = None if implicit else _as_messages(prompt)
    if label not in (True, False):
        faults.append("label: missing" if label is None else f"label: not true or false but {type(label).__name__}")
    return Pair(
        prompt="" if implicit else _attempt("prompt", _prompt_text, prompt, faults),
        chosen=_attempt("completion", _answer_text, completion, faults),
        rejected="",
        fault="; ".join(faults),
        conversation=None if faults else _conversation(prompt, completion, []),
        desirable=bool(label),
    )


def _conversation(prompt: Any, chosen: Any, rejected: Any) -> Conversation | None:
    """Returns sound sides as messages, or ``None`` where the answers are plain text."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return None
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if prompt else []
    return Conversation(*([_template_message(item) for item in side] for side in (asked, chosen, rejected)))


def _template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    text = _content_text(message.get("value") if content is None else content)
    calls = message.get("tool_calls")
    return {"role": _role(message), "content": text, **({"tool_calls": calls} if calls else {})}


def _attempt(side: str, read: Callable[[Any], str], value: Any, faults: list[str]) -> str:
    try:
        return read(value)
    except _FaultError as fault:
        faults.append(f"{side}: {fault}")
        return ""


def _as_messages(value: Any) -> Any:
    """Returns a message as a list of one, a mapping of columns as a list of messages, all else unchanged."""
    if not isinstance(value, Mapping):
        return value
    columns = {key: column for key, column in value.items() if isinstance(column, list)}
    if columns and ("role" in columns or "from" in columns):
        # What datasets makes of `Sequence({...})` features: one list per key.
        length = max(map(len, columns.values()))
        padded = {key: [*column, *[None] * (length - len(column))] for key, column in columns.items()}
        return [dict(zip(padded, row, strict=True)) for row in zip(*padded.values(), strict=True)]
    return [value]


def _is_whole_conversation(value: Any) -> bool:
    """Tells whether a side begins before the answer, that is with somebody else's message."""
    return isinstance(value, list) and bool(value) and _role(value[0]) not in ("", "assistant")


def _common_messages(chosen: list[Any], rejected: list[Any]) -> int:
    """Returns how many messages both begin with, leaving each its answer if it has one."""
    most = min(len(chosen), len(rejected))
    common = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    # One side is the beginning of the other: its last message is the answer, unless the answer is missing.
    return common - 1 if common == most and _role(chosen[common - 1]) == "assistant" else common


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


def _prompt_text(value: Any) -> str:
    if isinstance(value, list):
        messages = [_message(item) for item in value]
        if not messages:
            raise _FaultError("empty, no message")
        # One message is its text, so that a plain and a conversational prompt can be recognised as the same.
        value = messages[0].text if len(messages) == 1 else "\n".join(f"{m.role}: {m.text}" for m in messages)
        if all(is_blank(message.text) for message in messages):
            raise _FaultError("empty")
    return _text(value)


def _answer_text(value: Any) -> str:
    if not isinstance(value, list):
        return _text(value)
    messages = [_message(item) for item in value]
    if not messages:
        raise _FaultError("missing, no message")
    for message, place in ((messages[0], "begins"), (messages[-1], "ends")):
        if message.role != "assistant":
            raise _FaultError(f"answer {place} with a message of {message.role!r}, not of 'assistant'")
    _text(messages[-1].text)
    return "\n".join(message.text for message in messages)


def _message(value: Any) -> _Message:
    if not isinstance(value, Mapping):
        raise _FaultError(f"not a message but {type(value).__name__}")
    role = _role(value)
    if not role:
        raise _FaultError("a message without a role")
    content = value.get("content")
    if content is None:
        content = value.get("value")
    text = _content_text(content)
    if value.get("tool_calls"):
        text += json.dumps(value["tool_calls"], sort_keys=True, ensure_ascii=False, default=str)
    elif content is None:
        raise _FaultError(f"a message of {role!r} without text")
    return _Message(role, text)


def _content_text(content: Any) -> str:
    """Returns a message's text; a list of ``{type: text, text: …}`` parts is joined."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise _FaultError(f"not text but {type(content).__name__}")


def _role(message: Any) -> str:
    if not isinstance(message, Mapping):
        return ""
    role = message.get("role") or message.get("from") or ""
    return _ROLES.get(str(role).strip().lower(), str(role).strip().lower())


def _text(value: Any) -> str:
    if value is None:
        raise _FaultError("missing")
    if not isinstance(value, str):
        raise _FaultError(f"not text but {type(value).__name__}")
    if is_blank(value):
        raise _FaultError("only whitespace" if value else "empty")
    return value
