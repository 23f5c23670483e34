"""``DPOTrainer`` with a ``reference=`` argument: the log-probabilities come from the strategy that it names."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import set_seed
from trl import DPOTrainer  # type: ignore[attr-defined]

from axolotl_dpo_ext.messages import show_information
from axolotl_dpo_ext.reference.checks import AUTOCAST, StuckPolicyCallback, compare_online, is_low_precision
from axolotl_dpo_ext.reference.copies import frozen_copy
from axolotl_dpo_ext.reference.identity import Checkpoint, is_elsewhere, is_fresh_adapter, trains_base_weights
from axolotl_dpo_ext.reference.losses import check_loss
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.reference.randomness import random_state_kept
from axolotl_dpo_ext.reference.rows import LogProbDefinition
from axolotl_dpo_ext.reference.script_arguments import check_arguments
from axolotl_dpo_ext.reference.store import root_problem
from axolotl_dpo_ext.reference.strategies import Policy, Reference, ReferenceStrategy
from axolotl_dpo_ext.reference.trl_access import arguments_by_name, check_trl, load_as_trl, weights_not_hashed
from axolotl_dpo_ext.settings import ReferenceSettings, parse_settings
from axolotl_dpo_ext.vocabulary import ConfigurationError, RunStopped

if TYPE_CHECKING:
    from datasets import Dataset

LOG = logging.getLogger(__name__)

# Where TRL's batches carry the reference's log-probabilities.
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class ReferenceMixin:
    """Gives a subclass of TRL's ``DPOTrainer`` a choice of where its reference log-probabilities come from.

    Put it before the trainer class: ``class MyTrainer(ReferenceMixin, MyDPOTrainer)``.

    Args:
        *positional: Arguments of the trainer class, in its own order: ``model``, ``args`` … A ``ref_model`` of one's
            own is used by ``gpu`` as TRL does; ``precomputed`` and ``cpu_offload`` take it instead of the policy
            before its first step.
        reference: A strategy's name, or what stands under ``dpo_ext.reference`` in a YAML.
        checkpoint: Where a model that is given as an object was loaded from, if it is unchanged since: its files then
            identify the weights, and they need not be hashed in memory.
        **named: Further arguments of the trainer class.

    Raises:
        RunStopped: The strategy cannot serve this model, loss or TRL version; the message says what to change.
    """

    def __init__(
        self,
        *positional: Any,
        reference: str | Mapping[str, Any] | ReferenceSettings = "auto",
        checkpoint: Checkpoint | None = None,
        **named: Any,
    ) -> None:
        check_trl(type(self), ReferenceMixin)
        given = arguments_by_name(type(self), ReferenceMixin, positional, named)
        check_arguments(given, reference, checkpoint)
        if Processes().rank == 0:
            show_information()
        model, ref_model, args = given["model"], given.get("ref_model"), given["args"]
        self.reference_settings = _settings(reference)
        self._checkpoint = _checkpoint(model, args) if isinstance(model, str) else checkpoint
        self._given_reference = ref_model
        if ref_model is not None and self.reference_settings.strategy == "auto":
            LOG.info("reference = gpu (a reference model was given)")
            self.reference_settings = self.reference_settings.model_copy(update={"strategy": "gpu"})
        self._strategy = _choose(self.reference_settings, given, self._checkpoint)
        self.reference_is_initial_policy = ref_model is None and self._strategy.is_initial_policy
        self._reference: Reference | None = None
        # Whether a dataset has no log-probabilities of its own, so that the reference delivers them batch by batch.
        self._asked_for_batches = False
        # Whether a PEFT model's adapter is part of the reference; decided on the policy before its first step.
        self.adapter_is_reference: bool | None = None
        # For each dataset: its pairs, how many answers had to be computed, and in how many seconds.
        self.reference_record: dict[str, dict[str, float]] = {}
        self._extended: set[str] = set()  # fingerprints of the datasets that were given their columns here
        self._agreed = not self._strategy.hands_over
        self._made = False
        if self._strategy.hands_over:
            check_loss(self._strategy.name, args)
            given["args"] = copy.copy(args)  # the caller's may serve another trainer
            given["args"].precompute_ref_log_probs = True
            given.pop("ref_model", None)
        elif self._strategy.name == "gpu" and ref_model is None:
            second = _second_copy(self.reference_settings, given)
            given.update({} if second is None else {"ref_model": second})
        elif self._strategy.name == "adapter" and ref_model is not None:
            raise RunStopped(
                f"`ref_model` was given with `reference: {self._strategy.name}`\n"
                f"    why: that strategy takes the policy itself for a reference, so the model would go unused\n"
                f'    fix: leave out `ref_model`, or use `reference="gpu"`'
            )
        with weights_not_hashed() if self._strategy.hands_over else contextlib.nullcontext():
            parent: Any = super()
            parent.__init__(**given)
        self._made = True
        self._given_reference = None
        trainer: Any = self
        if not self._asked_for_batches:
            self._reference = None  # it may hold the policy, which training is about to change
        else:
            trainer.precompute_ref_logps = False  # `compute_loss` says when a batch has its values
        if self._strategy.name == "adapter":
            _check_adapter(trainer, self.reference_settings)
        elif self._strategy.hands_over and self.reference_settings.model == "base":
            _drop_copied_adapter(trainer)
        if self._strategy.hands_over:
            trainer.add_callback(StuckPolicyCallback(is_low_precision(trainer, trainer.model)))
        # Whatever a strategy loaded or computed: training draws the same random numbers (trl#7083).
        set_seed(args.seed)

    def __init_subclass__(cls, **named: Any) -> None:
        """Checks that the mix-in stands before the trainer class: behind it, nothing here would be called."""
        super().__init_subclass__(**named)
        before = cls.__mro__[: cls.__mro__.index(ReferenceMixin)]
        trainers = [one.__name__ for one in before if one.__name__ == "DPOTrainer"]
        if trainers:
            raise RunStopped(
                f"{cls.__name__} names {trainers[0]} before ReferenceMixin\n"
                f"    why: Python then asks the trainer first, and the reference strategy is never used\n"
                f"    fix: write `class {cls.__name__}(ReferenceMixin, …)`"
            )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str, *more: Any, **named: Any
    ) -> Any:
        """Sees every dataset before TRL does: one that is finished stays so, and foreign columns are dropped."""
        if self._strategy.hands_over:
            if self._is_extended(dataset):
                return dataset
            dataset = _without_foreign_columns(dataset, dataset_name)
        parent: Any = super()
        return parent._prepare_dataset(dataset, processing_class, args, dataset_name, *more, **named)

    def _is_extended(self, dataset: Any) -> bool:
        return getattr(dataset, "_fingerprint", None) in self._extended

    def _precompute_ref_logps(self, dataset: Dataset, name: str, *more: Any, **named: Any) -> Dataset:
        """Takes the place of TRL's own precomputation, of the training set and of every evaluation set."""
        if not self._strategy.hands_over:
            parent: Any = super()
            return parent._precompute_ref_logps(dataset, name, *more, **named)
        if self._is_extended(dataset):
            return dataset
        reference = self._reference or self._strategy.reference(self._policy())
        assert reference is not None, f"{self._strategy.name} hands over, so it must return a reference"
        found = reference.for_dataset(dataset, name)
        if found is None or not self._made:
            self._reference = reference
        if found is None:
            self._asked_for_batches = True
            return dataset
        self.reference_record[name] = {"pairs": len(dataset), "computed": found.computed, "seconds": found.seconds}
        extended = dataset.add_column(COLUMNS[0], found.chosen).add_column(COLUMNS[1], found.rejected)
        self._extended.add(extended._fingerprint)
        return extended

    def _policy(self) -> Policy:
        trainer: Any = self
        given = self._given_reference
        model: nn.Module = trainer.model if given is None else given
        if self.adapter_is_reference is None:
            is_peft = hasattr(model, "peft_config") and self.reference_settings.model != "base"
            self.adapter_is_reference = is_peft and not is_fresh_adapter(model)
        if self._made:
            self._check_reference_is_left()
        return Policy(
            model=model,
            adapter=self.adapter_is_reference,
            definition=LogProbDefinition(trainer.args.max_length, trainer.args.truncation_mode, trainer.args.ld_alpha),
            settings=self.reference_settings,
            device=trainer.accelerator.device,
            autocast=AUTOCAST.get(trainer.accelerator.mixed_precision),
            checkpoint=self._checkpoint if given is None else None,
        )

    def _check_reference_is_left(self) -> None:
        """Checks, for an evaluation set that comes later, that the policy still holds its reference."""
        trainer: Any = self
        policy = trainer.accelerator.unwrap_model(trainer.model)
        trained = trainer.state.global_step > 0 and (self.adapter_is_reference or trains_base_weights(policy))
        if trained or not self.reference_is_initial_policy:
            raise RunStopped(
                "`evaluate()` got a dataset that the trainer did not have when it was made\n"
                "    why: its reference log-probabilities are not known, and the reference (the policy before it was "
                "trained, or a model that the script gave) is not in memory any more\n"
                "    fix: pass the dataset as `eval_dataset` when making the trainer"
            )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Hands all micro-batches of a step over together, where the strategy works during training."""
        parent: Any = super()
        samples, items = parent.get_batch_samples(epoch_iterator, num_batches, device)
        return self._with_reference(samples), items

    def compute_loss(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        """Adds the reference's log-probabilities to batches that came another way, such as in evaluation."""
        parent: Any = super()
        trainer: Any = self
        if self._reference is None:
            return parent.compute_loss(model, inputs, *more, **named)
        inputs = self._with_reference([inputs])[0]
        trainer.precompute_ref_logps = True
        try:
            return parent.compute_loss(model, inputs, *more, **named)
        finally:
            trainer.precompute_ref_logps = False

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Keeps the log-probabilities in float32: DeepSpeed's bf16 would round sums of hundreds of nats."""
        parent: Any = super()
        if not isinstance(inputs, Mapping) or "ref_chosen_logps" not in inputs:
            return parent._prepare_inputs(inputs)
        trainer: Any = self
        kept = {name: inputs[name] for name in COLUMNS}
        prepared = parent._prepare_inputs({name: value for name, value in inputs.items() if name not in kept})
        return {**prepared, **{name: value.to(trainer.args.device) for name, value in kept.items()}}

    def training_step(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        """Compares the first batch with the model itself before it trains on it."""
        trainer: Any = self
        if not self._agreed:
            self._agreed = True
            prepared = trainer._prepare_inputs(inputs)
            compare_online(trainer, model, prepared)
            inputs = prepared
        parent: Any = super()
        return parent.training_step(model, inputs, *more, **named)

    def _with_reference(self, batches: list[Any]) -> list[Any]:
        if self._reference is None or not batches or "ref_chosen_logps" in batches[0]:
            return batches
        trainer: Any = self
        moved = [trainer._prepare_inputs(batch) for batch in batches]
        found: list[tuple[Tensor, Tensor]] = self._reference.for_batches(moved)
        return [
            {**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            for batch, (chosen, rejected) in zip(moved, found, strict=True)
        ]


class ReferenceDPOTrainer(ReferenceMixin, DPOTrainer):
    """TRL's ``DPOTrainer`` with a ``reference=`` argument; see ``ReferenceMixin``."""


def _settings(reference: str | Mapping[str, Any] | ReferenceSettings) -> ReferenceSettings:
    if isinstance(reference, ReferenceSettings):
        return reference
    settings = parse_settings({"reference": reference}).reference
    assert settings is not None
    return settings


# What a model may be loaded with and still have its files' weights under its name.
_HARMLESS = {"dtype", "torch_dtype", "attn_implementation", "revision", "device_map", "trust_remote_code", "use_cache"}


def _checkpoint(name: str, args: Any) -> Checkpoint | None:
    options = args.model_init_kwargs or {}
    return Checkpoint(name, options.get("revision")) if set(options) <= _HARMLESS else None


def _without_foreign_columns(dataset: Any, name: str) -> Any:
    """Drops log-probabilities that a dataset came with: nobody knows of which model and which tokens they are."""
    # A streamed dataset may not know its columns before it is read.
    names = dataset.column_names or next(iter(dataset), ())
    foreign = [column for column in COLUMNS if column in names]
    if not foreign:
        return dataset
    if Processes().rank == 0:
        LOG.warning(
            "the %s pairs came with %s, which this trainer did not compute: dropped\n"
            "    why: nothing says which model and which tokens the values belong to; the strategy delivers its own\n"
            "    fix: remove the columns, or hand values of your own over with a strategy of your own",
            name, " and ".join(foreign),
        )  # fmt: skip
    return dataset.remove_columns(foreign)


def _choose(settings: ReferenceSettings, given: Mapping[str, Any], checkpoint: Checkpoint | None) -> ReferenceStrategy:
    from axolotl_dpo_ext.plugins import extensions
    from axolotl_dpo_ext.reference.script_keys import keys_of_script
    from axolotl_dpo_ext.reference.selector import AUTO, choose_strategy

    keys = {**keys_of_script(given, checkpoint is not None), "dpo_ext": {"reference": settings.model_dump()}}
    strategies = extensions().reference_strategies
    strategy, decision = choose_strategy(settings.strategy, keys, strategies)
    if strategy.name == "precomputed" and (problem := root_problem(settings.store)):
        raise ConfigurationError([problem])
    processes = Processes()
    names = processes.gather(strategy.name)
    if settings.strategy == AUTO:
        if processes.rank == 0:
            LOG.info("reference = %s (%s)", decision.choice, decision.reason)
        return strategies[names[0]]  # the others may have looked at a store or a device a moment later
    _check_same_choice(names)
    return strategy


def _check_same_choice(names: list[str]) -> None:
    """Checks names that the processes were given: Axolotl's settle on one before they can talk to each other."""
    if len(set(names)) > 1:
        raise RunStopped(
            f"the processes chose different reference strategies: {', '.join(names)}\n"
            f"    why: `auto` saw different stores or devices, and the processes would wait for each other for ever\n"
            f"    fix: name one in `reference:`"
        )


def _second_copy(settings: ReferenceSettings, given: Mapping[str, Any]) -> Any:
    """Returns the second copy that TRL does not make itself, or makes of something else than the policy."""
    model = given["model"]
    if isinstance(model, str):
        if given.get("peft_config") is None:
            return None  # TRL loads it twice
        with random_state_kept():
            return load_as_trl(model, given["args"], given.get("quantization_config")).requires_grad_(False).eval()
    if hasattr(model, "peft_config") and settings.model != "base" and not is_fresh_adapter(model):
        raise RunStopped(
            "`reference: gpu` with a PEFT model whose adapter changes it already\n"
            "    why: a second copy of the base model is not the model that training starts from\n"
            "    fix: use `reference: adapter`, which keeps a frozen copy of the adapter, or `precomputed`; or set "
            "`reference.model: base` if the base model is what you want"
        )
    if any(is_elsewhere(parameter) for parameter in model.parameters()):
        return None  # TRL loads it by its name, sharded as the policy is
    # TRL would load the model's name again, which is another model if the script changed this one.
    return frozen_copy(model, keep_adapter=False)


def _check_adapter(trainer: Any, settings: ReferenceSettings) -> None:
    """Says which model the reference is, and takes the base model for it only where that is what was asked for."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    has_copy = "ref" in model.peft_config
    if settings.model == "base" and has_copy:
        _drop_copied_adapter(trainer)
        LOG.info("reference: the base model, with every adapter disabled (reference.model: base)")
    elif has_copy and not is_fresh_adapter(model):
        LOG.info("reference: the base model with a frozen copy of the adapter as it is now")
    elif not is_fresh_adapter(model) and settings.model != "base":
        raise RunStopped(
            "`reference: adapter`, and the adapter is not zero before training\n"
            "    why: with the adapter disabled the reference would be another model than training starts from: a "
            "continued adapter's base, or the changed base weights of PiSSA, OLoRA or LoftQ\n"
            "    fix: use `reference: precomputed`, or set `reference.model: base` if the base model is what you want"
        )
    else:
        LOG.info("reference: the base model, as the adapter is fresh")


def _drop_copied_adapter(trainer: Any) -> None:
    """Removes the frozen copy that TRL made of a continued adapter, where it is not part of the reference."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")
