"""The private parts of TRL that this pack relies on: all of them, looked for before anything loads."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
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
        RunStopped: Naming what is gone, and the versions that have it; or what a class of the user's leaves out.
    """
    after = _after(trainer_class, mixin)
    if not any(cls.__name__ == "DPOTrainer" and _is_trls(cls) for cls in after):
        raise RunStopped(
            f"{trainer_class.__name__} is no DPOTrainer\n"
            f"    why: the reference strategies serve TRL's DPO trainer and its subclasses\n"
            f"    fix: write `class {trainer_class.__name__}({mixin.__name__}, YourDPOTrainer)`"
        )
    gone = []
    for name, parameters in _METHODS.items():
        having = [cls for cls in after if name in vars(cls)]
        if not any(_is_trls(cls) and set(parameters) <= set(_parameters(cls, name)) for cls in having):
            gone.append(f"{name}({', '.join(parameters)})")
        for cls in having:
            _check_override(cls, name, parameters)
    if gone:
        raise RunStopped(
            f"{trainer_class.__name__} of trl {version('trl')} lacks {', '.join(gone)}\n"
            f"    why: the reference strategies hand over log-probabilities there, and this TRL works differently\n"
            f"    fix: use a tested TRL ({TESTED_TRL}), or a newer axolotl-dpo-ext"
        )


def _after(trainer_class: type, mixin: type) -> list[type]:
    order = trainer_class.__mro__
    return list(order[order.index(mixin) + 1 :])


def _is_trls(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("trl", "transformers")


def _parameters(cls: type, name: str) -> Mapping[str, inspect.Parameter]:
    method = vars(cls)[name]
    return inspect.signature(method).parameters if callable(method) else {}


def _check_override(cls: type, name: str, parameters: tuple[str, ...]) -> None:
    """Checks that a method of the user's own passes on what TRL's takes."""
    taken = _parameters(cls, name)
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    lacking = [parameter for parameter in parameters if parameter not in taken]
    if lacking and not passes_on and not _is_trls(cls):
        raise RunStopped(
            f"{cls.__name__}.{name} takes no {', '.join(lacking)}\n"
            f"    why: TRL's has it, and the reference strategies pass it on\n"
            f"    fix: add it to the method, or `**kwargs`, and pass it to `super().{name}`"
        )


def arguments_by_name(
    trainer_class: type, mixin: type, positional: tuple[Any, ...], named: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of a trainer by their names, whatever order the user's own ``__init__`` has.

    Args:
        trainer_class: A subclass of a mix-in and of TRL's ``DPOTrainer``.
        mixin: The mix-in, whose ``__init__`` was called.
        positional: Its positional arguments.
        named: Its keyword arguments.

    Raises:
        TypeError: They do not fit the first ``__init__`` that names ``model`` and ``args``.
    """
    for cls in _after(trainer_class, mixin):
        taken = _parameters(cls, "__init__") if "__init__" in vars(cls) else {}
        if {"model", "args"} <= set(taken):
            # Only those without a name: classes before this one may take named arguments that it does not know.
            bound = inspect.signature(vars(cls)["__init__"]).bind_partial(None, *positional).arguments
            by_name = dict(list(bound.items())[1:])
            twice = [name for name in by_name if name in named]
            if twice:
                raise TypeError(f"{trainer_class.__name__} got {', '.join(twice)} by position and by name")
            return {"args": None, **by_name, **named}
    raise TypeError(f"no __init__ of {trainer_class.__name__} takes `model` and `args`")


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
