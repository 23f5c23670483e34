"""The strategy interface: what a run's configuration says of a strategy, and what delivers its log-probabilities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from axolotl_dpo_ext.vocabulary import Problem

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import Tensor, nn

    from axolotl_dpo_ext.reference.identity import Checkpoint
    from axolotl_dpo_ext.reference.precompute import PairLogProbs
    from axolotl_dpo_ext.reference.rows import LogProbDefinition
    from axolotl_dpo_ext.settings import ReferenceSettings


@dataclass(frozen=True)
class Policy:
    """The policy as it is before the first step, when it still equals its reference.

    Attributes:
        model: The policy, a PEFT model for adapters; or the reference model that a script gave the trainer itself.
        adapter: Whether the PEFT model's adapter is part of the reference, as that of a continued adapter is.
        definition: What the log-probability of an answer is in this run.
        settings: What stands under ``dpo_ext.reference``.
        device: Where the policy is trained.
        autocast: The dtype of ``torch.autocast`` in training, or ``None``.
        checkpoint: Where the base weights were loaded from, or ``None`` if a script made or changed them.
    """

    model: nn.Module
    adapter: bool
    definition: LogProbDefinition
    settings: ReferenceSettings
    device: torch.device
    autocast: torch.dtype | None
    checkpoint: Checkpoint | None


class Reference:
    """Delivers the log-probabilities of a run's answers under the reference: before training, or during it."""

    def for_dataset(self, dataset: Dataset, name: str) -> PairLogProbs | None:
        """Returns the log-probabilities of a whole dataset before training starts.

        Args:
            dataset: A dataset as TRL tokenized it, with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
            name: ``train``, ``eval``, or the name of one of several evaluation sets.

        Returns:
            The summed log-probability of each pair's answers, or ``None`` to be asked for each step's batches.
        """
        return None

    def for_batches(self, batches: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Returns the log-probabilities of all micro-batches of one optimizer step.

        Args:
            batches: As TRL's collator makes them: ``input_ids``, ``attention_mask``, ``completion_mask``, each of
                shape ``(2 · pairs, length)``, the chosen answers before the rejected ones.

        Returns:
            For each micro-batch the summed log-probabilities of its chosen and of its rejected answers, each of shape
            ``(pairs,)``, float32, on the batch's device.
        """
        raise NotImplementedError(f"{type(self).__name__} delivers log-probabilities before training only")


class ReferenceStrategy(ABC):
    """One way to obtain the reference log-probabilities of a DPO run.

    Attributes:
        name: What users write under ``reference:``.
        summary: One sentence: what it does, and which model the reference is.
        hands_over: Whether it delivers the log-probabilities itself (``reference`` returns something); TRL then loads
            no reference model.
        is_initial_policy: Whether the reference is the policy before its first step; what a strategy hands over is
            then compared with the policy on the first batch.
    """

    name: str
    summary: str
    hands_over: bool = False
    is_initial_policy: bool = True

    @abstractmethod
    def problems(self, config: Mapping[str, Any]) -> list[Problem]:
        """Says why this strategy cannot serve a run.

        Args:
            config: The run's Axolotl keys, as in its YAML.

        Returns:
            One problem for each obstacle; an empty list if it can serve.
        """

    def axolotl_keys(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the Axolotl keys that bring the strategy about; they override the YAML's.

        Args:
            config: The run's Axolotl keys, as in its YAML.
        """
        return {}

    def reference(self, policy: Policy) -> Reference | None:
        """Returns what delivers the log-probabilities; ``None`` where TRL's own path does.

        Args:
            policy: The policy before its first step. Keeping its model would keep memory and, once trained, refer to
                another model.
        """
        return None


class GpuStrategy(ReferenceStrategy):
    """A second, frozen copy of the base model beside the policy: TRL's path for full fine-tuning."""

    name = "gpu"
    summary = "a frozen second copy of base_model beside the policy"

    def problems(self, config: Mapping[str, Any]) -> list[Problem]:
        """Returns no problem: a second copy needs memory, and nothing else."""
        return []

    def axolotl_keys(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """With an adapter, tells Axolotl to load the second copy that it otherwise leaves out."""
        return {"rl_adapter_ref_model": True} if config.get("adapter") else {}


class AdapterStrategy(ReferenceStrategy):
    """The policy itself with its adapter disabled: no second model in memory."""

    name = "adapter"
    summary = "the policy with its LoRA disabled (base_model as loaded), or a frozen copy of a continued adapter"

    def problems(self, config: Mapping[str, Any]) -> list[Problem]:
        """Says why a disabled adapter cannot serve a run; see the base class."""
        found: list[Problem] = []
        if not config.get("adapter"):
            found.append(
                Problem(
                    setting="dpo_ext.reference",
                    found=f"{self.name}, without `adapter:` (full fine-tuning)",
                    reason="full fine-tuning changes the base weights, so no frozen model is left to refer to",
                    fix="set `reference: precomputed` or `gpu`, or train a LoRA with `adapter: lora`",
                )
            )
        found += _second_model(self.name, config)
        init = config.get("peft_init_lora_weights")
        if init not in (None, True, "gaussian"):
            found.append(
                Problem(
                    setting="dpo_ext.reference",
                    found=f"{self.name}, with peft_init_lora_weights: {init}",
                    reason="that initialisation is not zero or changes the base weights, so the policy with its "
                    "adapter disabled is not the model that training starts from",
                    fix="set `reference: precomputed`, or remove peft_init_lora_weights",
                )
            )
        return found


class PrecomputedStrategy(ReferenceStrategy):
    """Log-probabilities computed once, with the policy before its first step, and stored for later runs."""

    name = "precomputed"
    summary = "computed once with the policy before its first step, stored, and reused by later runs"
    hands_over = True

    def problems(self, config: Mapping[str, Any]) -> list[Problem]:
        """Says why stored log-probabilities cannot serve a run; see the base class."""
        return _second_model(self.name, config)

    def reference(self, policy: Policy) -> Reference:
        """Returns what computes and reads the store."""
        from axolotl_dpo_ext.reference.precomputed import PrecomputedReference

        return PrecomputedReference(policy)


class CpuOffloadStrategy(ReferenceStrategy):
    """A frozen copy in host memory: streamed layer by layer to an accelerator, or computed on the CPU."""

    name = "cpu_offload"
    summary = "a frozen copy in host memory: streamed layer by layer to an accelerator, computed there without one"
    hands_over = True

    def problems(self, config: Mapping[str, Any]) -> list[Problem]:
        """Says why a copy in host memory cannot serve a run; see the base class."""
        found = _second_model(self.name, config)
        for key in ("load_in_4bit", "load_in_8bit"):
            if config.get(key):
                found.append(
                    Problem(
                        setting="dpo_ext.reference",
                        found=f"{self.name}, with {key}: true",
                        reason="bitsandbytes weights cannot be copied to the device layer by layer",
                        fix="set `reference: adapter`: it needs no second model",
                    )
                )
        return found

    def reference(self, policy: Policy) -> Reference:
        """Returns what holds the copy in host memory."""
        from axolotl_dpo_ext.reference.offloaded import HostReference

        return HostReference(policy)


def _second_model(name: str, config: Mapping[str, Any]) -> list[Problem]:
    if not config.get("rl_adapter_ref_model"):
        return []
    return [
        Problem(
            setting="dpo_ext.reference",
            found=f"{name}, with rl_adapter_ref_model: true",
            reason="that key loads the second model which this strategy exists to avoid",
            fix="remove rl_adapter_ref_model, or set `reference: gpu`",
        )
    ]
