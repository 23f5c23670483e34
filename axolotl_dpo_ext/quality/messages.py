"""Reads messages, ``{role, content}`` or ShareGPT's ``{from, value}``, as text and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from axolotl_dpo_ext.quality.text import is_blank

Messages = list[dict[str, Any]]
_ROLES = {
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
}
# Who opens a conversation, and who may speak twice in a row: of other roles nothing is known.
_OPENING, _ONCE = ("system", "developer"), ("user", "assistant")
# What a model thought before it answered, as templates and data sets call it. It is trained on, so it counts.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class FaultError(ValueError):
    """Something in one side of a pair is not what it has to be."""


class _Message(NamedTuple):
    role: str
    text: str


def as_messages(value: Any) -> Any:
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


def is_whole_conversation(value: Any) -> bool:
    """Tells whether a side begins before the answer, that is with somebody else's message."""
    return isinstance(value, list) and bool(value) and role_of(value[0]) not in ("", "assistant")


def prompt_text(value: Any) -> str:
    """Returns the text of a prompt, a text or messages.

    Raises:
        FaultError: It is not a prompt.
    """
    if isinstance(value, list):
        messages = [_message(item) for item in value]
        if not messages:
            raise FaultError("empty, no message")
        # One message is its text, so that a plain and a conversational prompt can be recognised as the same.
        value = messages[0].text if len(messages) == 1 else "\n".join(f"{m.role}: {m.text}" for m in messages)
        if all(is_blank(message.text) for message in messages):
            raise FaultError("empty")
    return _text(value)


def answer_text(value: Any) -> str:
    """Returns the text of an answer, a text or messages that begin and end with the assistant's.

    Raises:
        FaultError: It is not an answer.
    """
    if not isinstance(value, list):
        return _text(value)
    messages = [_message(item) for item in value]
    if not messages:
        raise FaultError("missing, no message")
    for message, place in ((messages[0], "begins"), (messages[-1], "ends")):
        if message.role != "assistant":
            raise FaultError(f"answer {place} with a message of {message.role!r}, not of 'assistant'")
    _text(messages[-1].text)
    return "\n".join(message.text for message in messages)


def _message(value: Any) -> _Message:
    if not isinstance(value, Mapping):
        raise FaultError(f"not a message but {type(value).__name__}")
    role = role_of(value)
    if not role:
        raise FaultError("a message without a role")
    content = value.get("content")
    if content is None:
        content = value.get("value")
    text = "".join(f"{value[key]}\n" for key in _THOUGHTS if isinstance(value.get(key), str)) + _content_text(content)
    if value.get("tool_calls"):
        text += json.dumps(value["tool_calls"], sort_keys=True, ensure_ascii=False, default=str)
    elif content is None:
        raise FaultError(f"a message of {role!r} without text")
    return _Message(role, text)


def order_fault(messages: Sequence[Any]) -> str:
    """Returns what is wrong with the order of a conversation's roles, ``""`` where nothing is."""
    before: Any = None
    for message in messages:
        role, last = role_of(message), role_of(before)
        if role in _OPENING and last not in ("", *_OPENING):
            return f"a message of {role!r} stands behind one of {last!r}, not at the beginning"
        # An assistant that called a tool may say more, where the tool's answer is not in the data.
        if role == last and role in _ONCE and not before.get("tool_calls"):
            return f"a message of {role!r} follows another of {role!r}"
        before = message
    return ""


def template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a sound message as chat templates take it, with whatever else it holds but nulls."""
    content = message.get("content")
    text = _content_text(message.get("value") if content is None else content)
    more = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    return {**more, "role": role_of(message), "content": text}


def _content_text(content: Any) -> str:
    """Returns a message's text; a list of ``{type: text, text: …}`` parts is joined."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise FaultError(f"not text but {type(content).__name__}")


def role_of(message: Any) -> str:
    """Returns who wrote a message, ``""`` where it is no message or does not say."""
    if not isinstance(message, Mapping):
        return ""
    role = message.get("role") or message.get("from") or ""
    return _ROLES.get(str(role).strip().lower(), str(role).strip().lower())


def _text(value: Any) -> str:
    if value is None:
        raise FaultError("missing")
    if not isinstance(value, str):
        raise FaultError(f"not text but {type(value).__name__}")
    if is_blank(value):
        raise FaultError("only whitespace" if value else "empty")
    return value
