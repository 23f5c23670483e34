"""The private parts of TRL that this pack relies on: all of them, looked for before anything loads."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any
from unittest import mock

from axolotl_dpo_ext.vocabulary import RunStopped

# Methods that are overridden or called, with parameters that must be there. TRL 1.9, 1.14 and 1.16 have them all.
_METHODS = {
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "_precompute_ref_logps": ("dataset", "name"),
    "compute_ref_log_probs": ("model", "inputs"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "training_step": (),
}
TESTED_TRL = "1.9.0, 1.14.1 and 1.16.0"


def check_trl(trainer_class: type, mixin: type) -> None:
    """Checks that a trainer class has what the reference strategies need of TRL.

    Args:
        trainer_class: A subclass of a mix-in and of TRL's ``DPOTrainer``.
        mixin: The mix-in; what it overrides must be there in the classes after it.

    Raises:
        RunStopped: Naming what is gone, and the versions that have it.
    """
    order = trainer_class.__mro__
    theirs = [vars(cls) for cls in order[order.index(mixin) + 1 :]]
    gone = [
        f"{name}({', '.join(parameters)})"
        for name, parameters in _METHODS.items()
        if not _has(next((names[name] for names in theirs if name in names), None), parameters)
    ]
    if gone:
        raise RunStopped(
            f"{trainer_class.__name__} of trl {version('trl')} lacks {', '.join(gone)}\n"
            f"    why: the reference strategies hand over log-probabilities there, and this TRL works differently\n"
            f"    fix: use a tested TRL ({TESTED_TRL}), or a newer axolotl-dpo-ext"
        )


def _has(method: Any, parameters: tuple[str, ...]) -> bool:
    return callable(method) and set(parameters) <= set(inspect.signature(method).parameters)


@contextlib.contextmanager
def weights_not_hashed() -> Iterator[None]:
    """Keeps TRL ≥ 1.16 from hashing all weights when a trainer with stored log-probabilities is made.

    The hash names TRL's own cache file, which is not used here.
    """
    import trl.trainer.dpo_trainer as module

    if not hasattr(module, "hash_module"):
        yield
        return
    with mock.patch.object(module, "hash_module", return_value="not used"):
        yield


def load_as_trl(name: str, args: Any, quantization_config: Any) -> Any:
    """Loads a model as ``DPOTrainer`` loads the one whose name it is given (``DPOTrainer.__init__``).

    Args:
        name: A folder or a name on the hub.
        args: TRL's ``DPOConfig``.
        quantization_config: As given to the trainer, or ``None``.
    """
    module: Any = importlib.import_module("trl.trainer.dpo_trainer")
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    return module.create_model_from_path(name, **options)
