"""The ``precomputed`` strategy: a store of log-probabilities behind a run's datasets."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from axolotl_dpo_ext.reference.identity import (
    changes_base_weights,
    check_on_one_device,
    reference_identity,
    whole_everywhere,
)
from axolotl_dpo_ext.reference.precompute import Batching, PairLogProbs, Scorer, reference_log_probs
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.randomness import random_state_kept
from axolotl_dpo_ext.reference.rows import Answer
from axolotl_dpo_ext.reference.store import ReferenceStore, store_root
from axolotl_dpo_ext.reference.store_upkeep import stores_of_weights
from axolotl_dpo_ext.reference.strategies import Policy, Reference
from axolotl_dpo_ext.vocabulary import RunStopped

if TYPE_CHECKING:
    from datasets import Dataset

LOG = logging.getLogger(__name__)


class PrecomputedReference(Reference):
    """Reads a store, after computing what it lacks with the policy as it is before the first step.

    Args:
        policy: The policy. Not kept longer than this object.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._store: ReferenceStore | None = None

    def for_dataset(self, dataset: Dataset, name: str) -> PairLogProbs:
        """Returns the stored log-probabilities of a dataset; see the base class.

        Raises:
            StoreError: The store is damaged, foreign, or cannot be written.
            RunStopped: A value is not finite, or has to be computed where the model is not whole.
        """
        if not hasattr(dataset, "__len__"):
            raise RunStopped(
                f"`reference: precomputed` with {type(dataset).__name__} for the {name} pairs\n"
                f"    why: stored log-probabilities belong to rows, and a streamed dataset has no fixed set of them\n"
                f"    fix: load it without streaming, or use `reference: cpu_offload` or `gpu`"
            )
        with random_state_kept():
            processes = Processes()
            store = self._open(processes)
            whole = whole_everywhere(self._policy.model, processes)
            if len(set(processes.gather(store.path.name))) > 1:
                raise _not_whole("the processes hold different weights, which would each have a store of their own")
            with contextlib.ExitStack() as stack:

                def scorer(answers: Sequence[Answer]) -> tuple[Scorer, Batching]:
                    if processes.rank == 0 and not len(store):
                        _say_what_differs(store)
                    model = stack.enter_context(self._ready(whole))
                    return self._scorer(model, answers)

                found = reference_log_probs(dataset, self._policy.definition, store, scorer, processes, name)
        if processes.rank == 0:
            LOG.info(
                "reference log-probabilities of %d %s pairs: %d answers computed, %d read from %s (%s)",
                len(dataset), name, found.computed, found.read, store.path, _computing(store.identity),
            )  # fmt: skip
        return found

    def _open(self, processes: Processes) -> ReferenceStore:
        if self._store is None:
            with processes.first_alone():  # it may have to hash the weight files, and remembers what it found
                self._store = self._find()
        return self._store

    def _find(self) -> ReferenceStore:
        policy = self._policy
        root = store_root(policy.settings.store)
        checkpoint = None if changes_base_weights(policy.model) else policy.checkpoint
        identity = reference_identity(
            policy.model, policy.adapter, policy.definition, policy.autocast, checkpoint, root
        )
        name = policy.checkpoint.name if policy.checkpoint else f"{type(policy.model).__name__}, made in memory"
        return ReferenceStore(root, identity, name)

    @contextlib.contextmanager
    def _ready(self, whole: bool) -> Iterator[nn.Module]:
        """Puts the model in the state in which it computes the reference, and back."""
        model: Any = self._policy.model
        check_on_one_device(model, "precomputed")
        if not whole:
            raise _not_whole("reference log-probabilities are missing from the store")
        training = {module: module.training for module in model.modules()}
        home = next(model.parameters()).device
        disabled = contextlib.nullcontext()
        if hasattr(model, "disable_adapter") and hasattr(model, "peft_config") and not self._policy.adapter:
            disabled = model.disable_adapter()
        model.to(self._policy.device)
        model.eval()
        try:
            with disabled:
                yield model
        finally:
            for module, mode in training.items():
                module.training = mode
            model.to(home)

    def _scorer(self, model: nn.Module, answers: Sequence[Answer]) -> tuple[Scorer, Batching]:
        from axolotl_dpo_ext.reference.logprobs import AnswerScorer
        from axolotl_dpo_ext.reference.probe import choose_batching

        scorer = AnswerScorer(model, self._policy.autocast)
        # Each time: what is exact for the rows of one dataset need not be for the longer ones of another.
        return scorer, choose_batching(scorer, model, answers)


def _computing(identity: Mapping[str, Any]) -> str:
    autocast = f", autocast to {identity['autocast']}" if identity["autocast"] else ""
    return f"weights in {identity['dtype']}{autocast}, attention {identity['attention']}"


def _say_what_differs(store: ReferenceStore) -> None:
    """Names the stores whose values would have served, had the model been loaded in the same way."""
    for path, identity in stores_of_weights(store.path.parent, store.identity["weights"]):
        changed = {name: value for name, value in identity.items() if value != store.identity.get(name)}
        if changed:
            found = ", ".join(f"{name} {value} (now {store.identity.get(name)})" for name, value in changed.items())
            LOG.info("reference: %s holds values of the same weights, which can't serve: %s", path, found)


def _not_whole(found: str) -> RunStopped:
    return RunStopped(
        f"{found}, and not every process holds the whole model\n"
        f"    why: with ZeRO-3, or FSDP with CPU-efficient loading, no process can compute them by itself\n"
        f"    fix: run `axolotl dpo-precompute CONFIG.yaml` first, which loads the model whole in each process"
    )
