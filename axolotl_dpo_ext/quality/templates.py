"""A pair's texts as the model will see them: what the run's chat template makes of a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from axolotl_dpo_ext.quality.text import common_length

if TYPE_CHECKING:
    from axolotl_dpo_ext.quality.messages import Messages
    from axolotl_dpo_ext.quality.pairs import Pair


class Rendered(NamedTuple):
    """Prompt, chosen and rejected answer behind one another make the text of a sequence."""

    prompt: str
    chosen: str
    rejected: str


class TemplateFaultError(ValueError):
    """The chat template refuses the conversation; the message says why."""


def render(pair: Pair, tokenizer: Any, tools: Any = None, options: Mapping[str, Any] | None = None) -> Rendered:
    """Returns a pair of conversations as text, as TRL renders it (trl/trainer/dpo_trainer.py: tokenize_fn).

    Args:
        pair: A pair with a conversation.
        tokenizer: A tokenizer with a chat template.
        tools: The row's tools: a list of function schemas, or that as JSON.
        options: The row's ``chat_template_kwargs``.

    Raises:
        TemplateFaultError: The template refuses the messages, for example because roles do not alternate, or the
            tools cannot be read.
    """
    asked, chosen, rejected = pair.conversation or ([], [], [])
    more = {"tools": _parsed(tools), **{key: value for key, value in (options or {}).items() if value is not None}}
    try:
        opened = _apply(tokenizer, asked, more, add_generation_prompt=True) if asked else ""
        return Rendered(opened, *(_answer(tokenizer, asked, side, more, opened) for side in (chosen, rejected)))
    except Exception as error:  # a template raises what it likes: jinja2's errors, TypeError, KeyError
        raise TemplateFaultError(f"the chat template refuses it: {error or type(error).__name__}") from error


def tool_text(tools: Any) -> str:
    """Returns a row's tools as text that is equal for equal tools, ``""`` without any."""
    if not tools:
        return ""
    return tools if isinstance(tools, str) else json.dumps(tools, sort_keys=True, ensure_ascii=False, default=str)


def _parsed(tools: Any) -> Any:
    """Returns a row's tools as templates take them."""
    if not isinstance(tools, str):
        return tools or None
    try:
        parsed = json.loads(tools) if tools else None
        # JSON can spell half a character ("\ud83d"); it has no UTF-8, and a tokenizer takes nothing else.
        json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise TemplateFaultError(f"tools: not valid JSON in UTF-8 ({error})") from error
    return parsed or None


def _answer(tokenizer: Any, asked: Messages, answer: Messages, more: Mapping[str, Any], opened: str) -> str:
    if not answer:
        return ""
    whole = _apply(tokenizer, [*asked, *answer], more)
    # Some templates write the opening of a turn otherwise when its answer follows (an empty thinking block).
    return whole[common_length(opened, whole) :]


def _apply(tokenizer: Any, messages: Sequence[dict[str, Any]], more: Mapping[str, Any], **options: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **more, **options))
