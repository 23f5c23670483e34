"""Attention over rows laid end to end, in which the answers of a prompt see the prompt and themselves only.

``transformers`` looks its attention up by name, so any model that does so can be run with this one: no padding is
computed, no mask is built for most answers, and a prompt's keys and values are computed once for all its answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - everybody's name for it
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "dpo_shared_prompts"


@dataclass(frozen=True)
class Segments:
    """Where a row stands among rows laid end to end.

    Attributes:
        start: Index of the prompt's first token.
        prompt: Number of tokens of the prompt.
        answers: Number of tokens of each answer; they follow the prompt one after another.
    """

    start: int
    prompt: int
    answers: tuple[int, ...]


class NotSharableError(RuntimeError):
    """A model's attention asks for something that this one does not do."""


_layout: ContextVar[Sequence[Segments]] = ContextVar("layout")


@contextlib.contextmanager
def shared_prompts(config: Any, layout: Sequence[Segments]) -> Iterator[None]:
    """Makes the models of a configuration attend within these rows.

    Args:
        config: The ``transformers`` configuration that the model's layers hold.
        layout: The rows of the one sequence that the model is about to be run on.

    Raises:
        NotSharableError: The models have attention that is not told to its function, so that short rows can't show it.
    """
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise NotSharableError("its mask alone says that it attends in chunks")
    before = config._attn_implementation
    token = _layout.set(layout)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _layout.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attends within the rows of the current layout; called by the model's attention layers.

    Args:
        module: The layer.
        query: Shape ``(1, heads, tokens, width)``.
        key: Shape ``(1, key_heads, tokens, width)``.
        value: As ``key``.
        attention_mask: Not used: the layout says what may be seen.
        scaling: Factor of the scores; default ``width ** -0.5``.
        dropout: Not used: log-probabilities are computed without.
        sliding_window: How many tokens back a token sees, itself included; ``None`` for all.
        softcap: Scores ``s`` become ``softcap · tanh(s / softcap)`` (Gemma 2).
        **more: What else the layer passes on.

    Returns:
        The attended values, shape ``(1, tokens, heads, width)``, and no weights.

    Raises:
        NotSharableError: The layer passes something that changes attention and is not known here.
    """
    unknown = [name for name in ("s_aux", "position_bias", "head_mask", "cu_seq_lens_q") if more.get(name) is not None]
    if unknown:
        raise NotSharableError(f"{type(module).__name__} passes {', '.join(unknown)} to its attention")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []
    for segments in _layout.get():
        prompt_end = segments.start + segments.prompt
        first = segments.answers[0] if segments.answers else 0
        # The prompt and its first answer are one ordinary causal sequence.
        here = slice(segments.start, prompt_end + first)
        parts.append(_causal(query[:, :, here], key[:, :, here], value[:, :, here], scaling, sliding_window, softcap))
        begin = here.stop
        for tokens in segments.answers[1:]:
            own = slice(begin, begin + tokens)
            seen = [torch.cat([x[:, :, segments.start : prompt_end], x[:, :, own]], dim=2) for x in (key, value)]
            parts.append(_causal(query[:, :, own], seen[0], seen[1], scaling, sliding_window, softcap))
            begin += tokens
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention in which the last query stands at the last key."""
    asked, seen = query.shape[2], key.shape[2]
    if window is not None and window >= seen:
        window = None
    if asked == seen and window is None and softcap is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = torch.ones(asked, seen, dtype=torch.bool, device=query.device).tril(seen - asked)
    if window is not None:
        mask = mask.triu(seen - asked - window + 1)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
