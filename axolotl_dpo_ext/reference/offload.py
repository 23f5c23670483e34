"""A frozen reference whose weights stay in host memory, computed there; ``streamed`` computes it on an accelerator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_dpo_ext.reference.logprobs import LanguageModelHead, backbone_of, causal_model_of
from axolotl_dpo_ext.vocabulary import RunStopped

# What TRL's collator puts into a batch and TRL does not hand to the model (compute_ref_log_probs).
NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
# What the part of a model that reads text understands. Anything else (images) it would drop without a word.
TEXT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class OffloadError(RunStopped):
    """A reference cannot be computed from host memory: what was found, why it cannot work, what to use instead."""

    def __init__(self, architecture: str, found: str, reason: str, fix: str | None = None) -> None:
        fix = fix or "set `reference: precomputed`, or `reference: gpu` where a second copy fits on the device"
        super().__init__(f"reference: cpu_offload, with {architecture}: {found}\n    why: {reason}\n    fix: {fix}")


class OffloadedReference(ABC):
    """A frozen reference that leaves the accelerator's memory to the policy."""

    @abstractmethod
    def token_log_probs(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Returns the log-probability of each token of the answers.

        Args:
            batches: The micro-batches of one optimizer step, each as TRL's ``DataCollatorForPreference`` makes it:
                ``input_ids``, ``attention_mask`` and ``completion_mask`` of shape ``(B, L)``, chosen rows first.

        Returns:
            For each micro-batch the log-probabilities of ``input_ids[:, 1:]``, shape ``(B, L - 1)``, float32, on the
            batch's device; zero where ``completion_mask[:, 1:]`` is. They are what TRL's ``compute_ref_log_probs`` sums
            up. The random state is not touched.
        """


class CpuReference(OffloadedReference):
    """A reference computed on the CPU, in the dtype of its weights, by its own forward.

    Args:
        model: A ``transformers`` causal language model, or a PEFT model around one. It is frozen and set to evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        self._architecture = type(causal_model_of(model)).__name__
        self._backbone = backbone_to_offload(model)
        self._head = LanguageModelHead(model)
        freeze(model)

    @torch.no_grad()
    def token_log_probs(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Computes one micro-batch after the other; see the base class."""
        results = []
        for batch in batches:
            work = MicroBatch.of(batch, torch.device("cpu"), self._architecture)
            results.append(work.log_probs(self._head, self._backbone(**work.given)))
        return results


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch as the model gets it, with the positions whose log-probabilities are wanted.

    Attributes:
        given: The model's keyword arguments, on the computing device.
        rows: Row of each position that predicts a token of an answer, shape ``(N,)``.
        columns: Its column, shape ``(N,)``.
        targets: The token that it predicts, shape ``(N,)``.
        shape: ``(B, L - 1)``.
        home: Device of the batch, and of the result.
    """

    given: dict[str, Any]
    rows: Tensor
    columns: Tensor
    targets: Tensor
    shape: torch.Size
    home: torch.device

    @classmethod
    def of(cls, batch: Mapping[str, Any], device: torch.device, architecture: str) -> MicroBatch:
        """Returns a micro-batch as the model gets it.

        Args:
            batch: As TRL's collator makes it.
            device: The computing device.
            architecture: Name of the model's class.

        Raises:
            OffloadError: The batch holds more than text.
        """
        given = {name: to_device(value, device) for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}
        if unknown := sorted(set(given) - set(TEXT)):
            found = f"a batch with {', '.join(unknown)}"
            reason = "only the part of a model that reads text is computed from host memory"
            raise OffloadError(architecture, found, reason)
        ids: Tensor = given["input_ids"]
        given["use_cache"] = False
        wanted = batch["completion_mask"][:, 1:].to(device) != 0
        rows, columns = wanted.nonzero(as_tuple=True)
        return cls(given, rows, columns, ids[rows, columns + 1], wanted.shape, batch["input_ids"].device)

    def forget_padding(self) -> None:
        """Gives the model a mask of ones where padding is at the ends of rows only: a causal model does not see it.

        That spares the ``(B, 1, L, L)`` masks that ``transformers`` would make, and that a sweep would hold for all
        micro-batches at once.
        """
        mask = self.given.get("attention_mask")
        if mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all()):
            self.given["attention_mask"] = torch.ones_like(mask)

    def log_probs(self, head: LanguageModelHead, outputs: Any) -> Tensor:
        """Returns the result for this micro-batch, as ``token_log_probs`` does.

        Args:
            head: The model's way from hidden states to log-probabilities.
            outputs: What the backbone returned.
        """
        hidden = outputs.last_hidden_state[self.rows, self.columns]
        result = torch.zeros(self.shape, dtype=torch.float32, device=hidden.device)
        result[self.rows, self.columns] = head.log_probs(hidden, self.targets, outputs)
        return result.to(self.home)


def to_device(value: Any, device: torch.device) -> Any:
    """Returns a tensor on a device, and anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def backbone_to_offload(model: nn.Module) -> nn.Module:
    """Returns the part of a causal language model below its head.

    Args:
        model: A ``transformers`` causal language model, or a PEFT model around one.

    Raises:
        OffloadError: The model is not built of a backbone and a head.
    """
    try:
        return backbone_of(model)
    except TypeError as error:
        reason = "logits are computed for the answers only, from what its backbone returns"
        raise OffloadError(type(model).__name__, str(error), reason) from error


def freeze(model: nn.Module) -> None:
    """Sets a model to evaluation, without gradients."""
    model.eval()
    model.requires_grad_(False)
