"""Reference log-probabilities of one dataset, computed in both ways: ours, and TRL's own."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.inputs import SIDES, Pair
from support.measure import Taken, in_turns, say, seconds_of

MAX_LENGTH = 1024
BATCH_SIZES = (1, 2, 4, 8, 16)
DEFAULT_BATCH_SIZE = 8  # of trl's DPOConfig; trl_trainer checks it
# TRL's fastest batch size is looked for on this part of the pairs.
SEARCH_PART = 4


def trl_trainer(model: Any, tokenizer: Any, pairs: Sequence[Pair], scratch: Path, max_length: int = MAX_LENGTH) -> Any:
    """Makes TRL's trainer, which tokenizes the pairs. It computes no reference yet, and takes the policy for it."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(scratch / "trl"),
        max_length=max_length,
        bf16=False,  # no autocast: the model computes in the dtype of its weights
        gradient_checkpointing=False,
        use_cpu=model.device.type == "cpu",
        report_to=[],
    )
    assert (args.precompute_ref_batch_size or args.per_device_train_batch_size) == DEFAULT_BATCH_SIZE
    dataset = Dataset.from_list(list(pairs))
    # Given something for a reference, TRL loads none. The policy takes its place, as where TRL precomputes.
    trainer = DPOTrainer(model, torch.nn.Identity(), args, train_dataset=dataset, processing_class=tokenizer)
    trainer.ref_model = None
    return trainer


class Sides:
    """Both ways to compute the reference log-probabilities of a dataset.

    Args:
        trainer: TRL's trainer; its model is the reference.
        dataset: Pairs as TRL tokenized them, in memory: TRL then has no cache file to find.
        folder: Where the model was loaded from, ``None`` if it was made in memory.
    """

    def __init__(self, trainer: Any, dataset: Any, folder: Path | None) -> None:
        assert not dataset.cache_files
        self._trainer = trainer
        self._dataset = dataset
        self._folder = folder

    def ours(self) -> Any:
        """Computes into a new store, and reads it."""
        from axolotl_dpo_ext.reference import Checkpoint, Policy
        from axolotl_dpo_ext.reference.precomputed import PrecomputedReference
        from axolotl_dpo_ext.reference.rows import LogProbDefinition
        from axolotl_dpo_ext.settings import ReferenceSettings

        with tempfile.TemporaryDirectory() as store:
            policy = Policy(
                model=self._trainer.model,
                adapter=False,
                definition=LogProbDefinition(self._trainer.args.max_length),
                settings=ReferenceSettings(strategy="precomputed", store=store),
                device=self._trainer.accelerator.device,
                autocast=None,
                checkpoint=None if self._folder is None else Checkpoint(str(self._folder)),
            )
            found = PrecomputedReference(policy).for_dataset(self._dataset, "train")
        return np.stack([found.chosen, found.rejected])

    def trl(self, batch_size: int) -> Any:
        """Computes as TRL does where it finds no cache file."""
        found = self._trainer._precompute_ref_logps(self._dataset, "train", batch_size)
        return np.stack([np.asarray(found[f"ref_{side}_logps"], np.float64) for side in SIDES])


def compare(trainer: Any, dataset: Any, folder: Path | None, repeats: int, tolerance: float) -> dict[str, Any]:
    """Measures both sides on one dataset, in turns.

    Args:
        trainer: As for ``Sides``.
        dataset: As for ``Sides``.
        folder: As for ``Sides``.
        repeats: How often each side runs; the median counts.
        tolerance: Largest relative difference of a value.

    Raises:
        SystemExit: The two sides' values differ.
    """
    sides = Sides(trainer, dataset, folder)
    best = fastest_batch_size(trainer, dataset.select(range(math.ceil(len(dataset) / SEARCH_PART))).flatten_indices())
    runs: dict[str, Callable[[], Any]] = {"ours": sides.ours, "trl_default": lambda: sides.trl(DEFAULT_BATCH_SIZE)}
    if best != DEFAULT_BATCH_SIZE:
        runs["trl_best"] = lambda: sides.trl(best)
    taken = in_turns(runs, repeats)
    taken.setdefault("trl_best", taken["trl_default"])
    difference = _largest_difference(taken["ours"].value, taken["trl_default"].value)
    if not difference <= tolerance:
        raise SystemExit(f"the values differ by {difference:.1e} (relative), more than {tolerance}")
    return {
        "pairs": len(dataset),
        "prompts": len({tuple(ids) for ids in dataset["prompt_ids"]}),
        "mean_tokens": mean_tokens(dataset),
        **{name: _side(one, dataset, trainer.args.max_length) for name, one in taken.items()},
        "trl_best_batch_size": best,
        "ratio_default": taken["trl_default"].seconds / taken["ours"].seconds,
        "ratio_best": taken["trl_best"].seconds / taken["ours"].seconds,
        "cpu_ratio_default": taken["trl_default"].cpu_seconds / taken["ours"].cpu_seconds,
        "cpu_ratio_best": taken["trl_best"].cpu_seconds / taken["ours"].cpu_seconds,
        "largest_relative_difference": difference,
    }


def fastest_batch_size(trainer: Any, dataset: Any) -> int:
    """Returns the batch size at which TRL computes a dataset fastest."""
    sides = Sides(trainer, dataset, None)
    sides.trl(DEFAULT_BATCH_SIZE)  # the first run of a process is slower
    seconds = {size: seconds_of(lambda size=size: sides.trl(size))[0] for size in BATCH_SIZES}
    say(f"  TRL, seconds by batch size: { {size: round(taken, 2) for size, taken in seconds.items()} }")
    return min(seconds, key=lambda size: seconds[size])


def mean_tokens(dataset: Any) -> dict[str, float]:
    """Returns the mean lengths of prompts and answers."""
    return {name: float(np.mean([len(ids) for ids in dataset[f"{name}_ids"]])) for name in ("prompt", *SIDES)}


def _largest_difference(ours: Any, theirs: Any) -> float:
    return float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1.0)).max())


def _side(taken: Taken, dataset: Any, max_length: int) -> dict[str, float]:
    """Returns one side's figures; its tokens are those that TRL's batches hold besides padding."""
    lengths = [min(len(row["prompt_ids"]) + len(row[f"{side}_ids"]), max_length) for row in dataset for side in SIDES]
    return {
        "seconds": taken.seconds,
        "cpu_seconds": taken.cpu_seconds,
        "pairs_per_s": len(dataset) / taken.seconds,
        "tokens_per_s": sum(lengths) / taken.seconds,
    }


def print_table(found: dict[str, dict[str, Any]]) -> None:
    """Prints one line for each workload."""
    print(f"{'precompute':<14} {'pairs/s ours':>12} {'TRL at 8':>9} {'ratio':>6} {'TRL at its best':>16} {'ratio':>6}")
    for name, one in found.items():
        best = f"{one['trl_best']['pairs_per_s']:.2f} at {one['trl_best_batch_size']}"
        print(
            f"{name:<14} {one['ours']['pairs_per_s']:>12.2f} {one['trl_default']['pairs_per_s']:>9.2f} "
            f"{one['ratio_default']:>5.2f}x {best:>16} {one['ratio_best']:>5.2f}x"
        )
