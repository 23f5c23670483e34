"""What a script gives a trainer, looked at before TRL is: wrong things fail there without a reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_dpo_ext.reference.identity import Checkpoint
from axolotl_dpo_ext.vocabulary import RunStopped


def check_arguments(given: Mapping[str, Any], reference: Any, checkpoint: Any) -> None:
    """Checks a trainer's arguments.

    Args:
        given: The arguments by name.
        reference: What was given as ``reference``.
        checkpoint: What was given as ``checkpoint``.

    Raises:
        RunStopped: One of them can't be what is meant.
    """
    if given.get("model") is None:
        _refuse("no `model` was given", "there is nothing to train", "pass a model, or the name of one, as `model`")
    if given.get("args") is None:
        _refuse(
            "no `args` were given", "the reference strategies set a part of them", "pass `args=DPOConfig(output_dir=…)`"
        )
    if reference is None or reference is False:
        _refuse(
            f"`reference` is {reference}",
            "this trainer exists to choose where the reference comes from",
            'pass a strategy, such as `reference="auto"`, or use TRL\'s own DPOTrainer',
        )
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        _refuse(
            f"`checkpoint` is {checkpoint!r}",
            "a name alone does not say which revision the weights are of",
            f"`from axolotl_dpo_ext.reference import Checkpoint` and pass `checkpoint=Checkpoint({str(checkpoint)!r})`",
        )
    if isinstance(given.get("ref_model"), str):
        _refuse(
            f"`ref_model` is the name {given['ref_model']!r}",
            "a reference model of one's own is given as a model",
            "load it with `AutoModelForCausalLM.from_pretrained`, or leave it out if it is the policy before training",
        )
    for name in ("train_dataset", "eval_dataset"):
        sets: Any = given.get(name)
        each: list[Any] = list(sets.values()) if isinstance(sets, Mapping) else [sets]
        if any(hasattr(dataset, "__len__") and len(dataset) == 0 for dataset in each):
            _refuse(f"`{name}` has no rows", "there is nothing to compute with", "check its file and its split")


def _refuse(found: str, reason: str, fix: str) -> None:
    raise RunStopped(f"{found}\n    why: {reason}\n    fix: {fix}")
