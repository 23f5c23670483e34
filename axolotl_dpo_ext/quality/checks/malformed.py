"""Pairs that are not two answers to one prompt."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck
from axolotl_dpo_ext.quality.text import is_blank

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from axolotl_dpo_ext.settings import Policy, QualitySettings


# How the special tokens look that templates put around an answer: <|im_end|>, <|eot_id|>, </s>, <end_of_turn>, <eos>.
_SPECIAL_TOKEN = re.compile(
    r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>)(?:system|user|assistant|model|tool)\b"
    r"|<\|[^<>|\s]+\|>|</?s>|<(?:start|end)_of_turn>|<eos>|\[/?INST\]"
)
# Axolotl renders an answer behind this message and cuts it off in front of the answer's text; where that is empty
# it finds no text and leaves all of it (axolotl/prompt_strategies/dpo/chat_template.py).
_AXOLOTL_PLACEHOLDER = "[[dummy_message]]"


class Malformed(PairCheck):
    """Finds sides that are empty, whitespace, missing or not text, and answers not given by the assistant."""

    name = "malformed"
    summary = "empty, missing, not text, or not the assistant's answer"
    default_policy: Policy = "drop"
    sees_malformed = True
    on_singles = True

    def threshold(self, settings: QualitySettings) -> float:
        """Returns 0.5, between well-formed (0) and malformed (1)."""
        return 0.5

    def score(self, batch: PairBatch, settings: QualitySettings, embedder: Embedder) -> NDArray[np.float64]:
        """Returns 1 for malformed pairs, else 0."""
        faults = batch.faults or [""] * len(batch)
        answers = [batch.chosen] if batch.desirable is not None else [batch.chosen, batch.rejected]
        rows = zip(faults, batch.prompts, *answers, strict=True)
        return np.array([bool(f) or _no_words(p) or any(map(_is_empty, sides)) for f, p, *sides in rows], dtype=float)


def _no_words(prompt: str) -> bool:
    """Whether a prompt is only what a chat template puts around it. Pairs without any prompt are legitimate."""
    return bool(prompt) and _is_empty(prompt)


def _is_empty(answer: str) -> bool:
    """Whether an answer is empty, also after a chat template has been laid around it."""
    return is_blank(_SPECIAL_TOKEN.sub("", answer)) or _AXOLOTL_PLACEHOLDER in answer
