"""Reads preference pairs in every form that TRL and Axolotl accept, as flat text.

Accepted sides (``chosen``, ``rejected``): plain text, one message, or a conversation. Messages may be
``{role, content}`` or ShareGPT's ``{from, value}``. The prompt is the first of the columns ``prompt``,
``conversations`` and ``messages`` that exists; without one it is what both sides have in common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from axolotl_dpo_ext.quality.base import PairBatch
from axolotl_dpo_ext.quality.text import is_blank
from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem

if TYPE_CHECKING:
    from datasets import Dataset

    CountTokens = Callable[[list[str]], list[int]]

PROMPT_COLUMNS = ("prompt", "conversations", "messages")
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


class Pair(NamedTuple):
    """One pair as flat text; ``fault`` says what is wrong with its form, ``""`` where nothing is."""

    prompt: str
    chosen: str
    rejected: str
    fault: str = ""


class _Message(NamedTuple):
    role: str
    text: str


class _FaultError(ValueError):
    """Something in one side of a pair is not what it has to be."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset hold the pairs; ``prompt`` is ``None`` where the prompt is implicit."""

    prompt: str | None

    @property
    def names(self) -> list[str]:
        """Names of the columns to read."""
        return ["chosen", "rejected", *([self.prompt] if self.prompt else [])]


def find_columns(dataset: Dataset) -> Columns:
    """Finds the columns that hold the pairs.

    Raises:
        ConfigurationError: If there is no column ``chosen`` or ``rejected``, or if the dataset has no length.
    """
    names = getattr(dataset, "column_names", None)
    if names is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "select"):
        raise ConfigurationError(
            [
                Problem(
                    setting="datasets",
                    found=type(dataset).__name__,
                    reason="the audit reads every pair and selects rows, which needs a `datasets.Dataset`",
                    fix="load the data without streaming, and pass one split at a time",
                )
            ]
        )
    missing = [name for name in ("chosen", "rejected") if name not in names]
    if missing:
        raise ConfigurationError(
            [
                Problem(
                    setting="datasets",
                    found=f"columns {', '.join(names) or '(none)'}",
                    reason=f"there is no column {' and no column '.join(map(repr, missing))}, so no pairs",
                    fix="rename the columns to `chosen` and `rejected`, or set the dataset's `type:` so that "
                    "they are made",
                )
            ]
        )
    return Columns(prompt=next((name for name in PROMPT_COLUMNS if name in names), None))


def iter_pairs(dataset: Dataset, batch_size: int) -> Iterator[list[Pair]]:
    """Yields the pairs of a dataset, ``batch_size`` rows at a time; only one batch is in memory."""
    columns = find_columns(dataset)
    # Selecting the columns keeps images and the like from being decoded; a format could make arrays of text.
    plain = dataset.select_columns(columns.names).with_format(None)
    for start in range(0, len(plain), batch_size):
        yield _parse_columns(plain[start : start + batch_size], columns)


def read_pairs(dataset: Dataset, rows: Iterable[int]) -> list[Pair]:
    """Returns the pairs of the given rows."""
    columns = find_columns(dataset)
    plain = dataset.select_columns(columns.names).with_format(None)
    return _parse_columns(plain[list(rows)], columns)


def _parse_columns(values: Mapping[str, Sequence[Any]], columns: Columns) -> list[Pair]:
    chosen, rejected = values["chosen"], values["rejected"]
    prompts = values[columns.prompt] if columns.prompt else [_IMPLICIT] * len(chosen)
    return [parse_pair(c, r, p) for c, r, p in zip(chosen, rejected, prompts, strict=True)]


def to_batch(pairs: Sequence[Pair], count_tokens: CountTokens) -> PairBatch:
    """Counts the answers' tokens and returns the pairs as a batch; malformed pairs are not counted.

    Raises:
        ValueError: If ``count_tokens`` does not return one count per text.
    """
    sound = [row for row, pair in enumerate(pairs) if not pair.fault]
    texts = [pairs[row].chosen for row in sound] + [pairs[row].rejected for row in sound]
    counts = np.asarray(count_tokens(texts) if texts else [], dtype=np.int64)
    if counts.shape != (len(texts),):
        raise ValueError(f"count_tokens returned shape {counts.shape} for {len(texts)} texts, not one count each")
    lengths = np.zeros((2, len(pairs)), dtype=np.int64)
    lengths[:, sound] = counts.reshape(2, -1)
    return PairBatch(
        prompts=[pair.prompt for pair in pairs],
        chosen=[pair.chosen for pair in pairs],
        rejected=[pair.rejected for pair in pairs],
        chosen_tokens=lengths[0],
        rejected_tokens=lengths[1],
        faults=[pair.fault for pair in pairs],
    )


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
    promptless = prompt is _IMPLICIT or (implicit and not prompt)
    return Pair(
        prompt="" if promptless else _attempt("prompt", _prompt_text, _as_messages(prompt), faults),
        chosen=_attempt("chosen", _answer_text, chosen, faults),
        rejected=_attempt("rejected", _answer_text, rejected, faults),
        fault="; ".join(faults),
    )


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
    shared = _common_length(chosen, rejected)
    turns = [m.end() for m in _ASSISTANT_TURN.finditer(chosen, 0, shared)]
    if turns:
        cut = turns[-1]
        return chosen[:cut], chosen[cut:], rejected[cut:]
    for boundary in _BOUNDARIES:
        for cut in reversed([m.end() for m in boundary.finditer(chosen, 0, shared)]):
            if not (is_blank(chosen[cut:]) or is_blank(rejected[cut:]) or is_blank(chosen[:cut])):
                return chosen[:cut], chosen[cut:], rejected[cut:]
    return "", chosen, rejected


def _common_length(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: a few comparisons of whole slices instead of one per character
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


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
