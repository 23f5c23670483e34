"""Log-probabilities of answers under a model: prompts computed once, logits only where an answer is predicted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from axolotl_dpo_ext.reference.attention import Segments, shared_prompts
from axolotl_dpo_ext.reference.batching import Row
from axolotl_dpo_ext.reference.forwards import replaced_forwards

# Logits that exist at one moment, in elements: 32 M in float32 are 128 MiB.
HEAD_CHUNK_ELEMENTS = 2**25


def backbone_of(model: nn.Module) -> nn.Module:
    """Returns the part of a causal language model below its head.

    Args:
        model: A ``transformers`` causal language model, or a PEFT model around one.

    Raises:
        TypeError: The model is not built of a backbone and a head.
    """
    causal = causal_model_of(model)
    # Most heads call `base_model`; some, such as OPT's, the decoder inside it; Llama 4's prefix names what it lacks.
    for backbone in (causal.get_decoder(), causal.base_model, getattr(causal, "model", None)):
        if isinstance(backbone, nn.Module) and backbone is not causal:
            return backbone
    raise TypeError(f"{type(causal).__name__} has no backbone below its language-model head (get_decoder, base_model)")


def causal_model_of(model: nn.Module) -> Any:
    """Returns the ``transformers`` model inside a PEFT model, or the model itself."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) else model


def text_config(causal: Any) -> Any:
    """Returns the configuration of the part of a causal language model that reads text."""
    return causal.config.get_text_config()


class LanguageModelHead:
    """A model's own path from hidden states to logits, for any number of positions.

    The model's ``forward`` runs with its backbone standing in for itself, returning hidden states that were computed
    before: whatever an architecture does after its backbone (soft-capping, scaling, a bias) is its own code.
    """

    def __init__(self, model: nn.Module, chunk_elements: int = HEAD_CHUNK_ELEMENTS) -> None:
        self._model = causal_model_of(model)
        self._backbone = backbone_of(model)
        self._chunk = max(1, chunk_elements // int(text_config(self._model).vocab_size))

    def log_probs(self, hidden: Tensor, targets: Tensor, outputs: Any) -> Tensor:
        """Returns the log-probability of each target token.

        Args:
            hidden: Hidden states of the predicting positions, shape ``(positions, width)``.
            targets: Token ids that they predict, shape ``(positions,)``.
            outputs: What the backbone returned; the head's code may look at more than its hidden states.

        Returns:
            Natural log-probabilities, shape ``(positions,)``, float32.
        """
        parts = [
            _token_log_probs(self._logits(part, outputs), wanted)
            for part, wanted in zip(torch.split(hidden, self._chunk), torch.split(targets, self._chunk), strict=True)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)

    def _logits(self, hidden: Tensor, outputs: Any) -> Tensor:
        stand_in = type(outputs)(last_hidden_state=hidden[None])
        placeholder = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        with replaced_forwards([(self._backbone, lambda *args, **kwargs: stand_in)]):
            return self._model(input_ids=placeholder, use_cache=False).logits[0]  # type: ignore[no-any-return]


def _token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the log-softmax of logits at the targets, in float32 whatever the logits' dtype."""
    logits = logits.float()
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    return chosen - torch.logsumexp(logits, dim=-1)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors: either laid end to end in one sequence, or one below the other with padding.

    ``B`` sequences of ``T`` tokens, ``N`` predicted tokens in all.

    Attributes:
        input_ids: Token ids, shape ``(B, T)``, int64.
        position_ids: Each token's position in its own prompt and answer, shape ``(B, T)``.
        attention_mask: 1 for tokens, 0 for padding, shape ``(B, T)``.
        predicting: Flat indices ``sequence · T + column`` of the tokens whose hidden states predict, shape ``(N,)``.
        targets: The tokens that they predict, shape ``(N,)``.
        layout: Where each row stands in the one sequence; ``None`` where each row is a sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    predicting: Tensor
    targets: Tensor
    layout: tuple[Segments, ...] | None


def lay_out(rows: Sequence[Row], end_to_end: bool, device: torch.device) -> Batch:
    """Lays rows out as tensors.

    Args:
        rows: The rows of one batch.
        end_to_end: One sequence for all rows; otherwise one for each, padded at its end, where a causal model does
            not see it.
        device: Where the tensors go.
    """
    width = sum(row.length for row in rows) if end_to_end else max(row.length for row in rows)
    ids = np.zeros((1 if end_to_end else len(rows)) * width, dtype=np.int64)
    positions = np.zeros_like(ids)
    real = np.zeros_like(ids)
    predicting, targets, layout = [], [], []
    begin = 0
    for index, row in enumerate(rows):
        begin = begin if end_to_end else index * width
        prompt = row.answers[0].prompt
        layout.append(Segments(begin, len(prompt), tuple(answer.tokens - 1 for answer in row.answers)))
        last_of_prompt = begin + len(prompt) - 1
        ids[begin : begin + len(prompt)] = prompt
        positions[begin : begin + len(prompt)] = np.arange(len(prompt))
        begin += len(prompt)
        for answer in row.answers:
            fed = answer.completion[:-1]
            ids[begin : begin + len(fed)] = fed
            positions[begin : begin + len(fed)] = np.arange(len(prompt), len(prompt) + len(fed))
            predicting.append(np.concatenate([[last_of_prompt], np.arange(begin, begin + len(fed))]))
            targets.append(answer.completion)
            begin += len(fed)
        real[begin - row.length : begin] = 1
    planes = (plane.reshape(-1, width) for plane in (ids, positions, real))
    arrays = (*planes, np.concatenate(predicting), np.concatenate(targets))
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    ids_, positions_, real_, predicting_, targets_ = tensors
    return Batch(ids_, positions_, real_, predicting_, targets_, tuple(layout) if end_to_end else None)


class AnswerScorer:
    """Computes the log-probabilities of the tokens of answers under one model.

    Args:
        model: A ``transformers`` causal language model in evaluation mode, or a PEFT model around one.
        autocast: The dtype to compute in where it differs from the weights', as ``torch.autocast`` does it.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        self._model = model
        self._backbone = backbone_of(model)
        self._config = text_config(causal_model_of(model))
        self._head = LanguageModelHead(model)
        self._autocast = autocast

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self._autocast or next(self._model.parameters()).dtype

    def autocast(self) -> torch.autocast:
        """Returns the context in which the model computes in that dtype."""
        return torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None)

    @torch.inference_mode()
    def token_log_probs(self, rows: Sequence[Row], share_prompts: bool) -> Tensor:
        """Returns the log-probabilities of the answers' tokens.

        Args:
            rows: One batch.
            share_prompts: Lay the rows end to end, with attention that keeps them apart; otherwise each row must hold
                one answer, and the model's own attention is used.

        Returns:
            Those of all answers of all rows one after another, shape ``(tokens,)``, float32, on the model's device.
        """
        batch = lay_out(rows, share_prompts, self.device)
        given: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        attention: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if batch.layout is None:
            given["attention_mask"] = batch.attention_mask  # as TRL does
        else:
            given["position_ids"] = batch.position_ids
            attention = shared_prompts(self._config, batch.layout)
        with self.autocast():
            with attention:
                outputs = self._backbone(**given)
            hidden = outputs.last_hidden_state.flatten(0, 1)[batch.predicting]
            return self._head.log_probs(hidden, batch.targets, outputs)
