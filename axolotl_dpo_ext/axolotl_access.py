"""The private parts of Axolotl that this pack relies on: all of them, looked for before anything loads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any
from unittest import mock

from axolotl_dpo_ext.reference import Checkpoint
from axolotl_dpo_ext.settings import ReferenceSettings
from axolotl_dpo_ext.vocabulary import RunStopped

TESTED_AXOLOTL = "0.19.0 and 0.21.0"


@contextlib.contextmanager
def reference_strategy_in_charge(
    settings: ReferenceSettings, loads_second_model: bool, checkpoint: Checkpoint | None
) -> Iterator[None]:
    """Makes Axolotl build its DPO trainer with a reference strategy, while the context lasts.

    Two places are changed: the trainer class that Axolotl takes for `rl: dpo` and `ipo` (a plugin's
    ``get_trainer_cls`` would drop the model, core/builders/rl.py), and the loading of a second model, which Axolotl
    does for all full fine-tuning (train.py: setup_reference_model).

    Args:
        settings: What stands under ``dpo_ext.reference``, with the strategy that was decided on.
        loads_second_model: Whether the strategy uses the second model.
        checkpoint: Where Axolotl loads the base model from, if it leaves the weights as they are.

    Raises:
        RunStopped: This Axolotl has one of the places no longer.
    """
    import axolotl.train
    from axolotl.core.trainers.dpo import DPOStrategy

    load = getattr(axolotl.train, "setup_reference_model", None)
    make_class = getattr(DPOStrategy, "get_trainer_class", None)
    if load is None or make_class is None:
        gone = "axolotl.train.setup_reference_model" if load is None else "DPOStrategy.get_trainer_class"
        raise RunStopped(
            f"axolotl {version('axolotl')} has no {gone}\n"
            f"    why: the reference strategies act there, and this Axolotl works differently\n"
            f"    fix: use a tested Axolotl ({TESTED_AXOLOTL}), a newer axolotl-dpo-ext, or remove dpo_ext.reference"
        )

    def load_or_not(*args: Any, **kwargs: Any) -> Any:
        if not loads_second_model:
            return None
        return load(*args, **kwargs)

    trainer_class = _trainer_class(make_class(), settings, checkpoint)
    with (
        mock.patch.object(axolotl.train, "setup_reference_model", load_or_not),
        mock.patch.object(DPOStrategy, "get_trainer_class", return_value=trainer_class),
    ):
        yield


def _trainer_class(axolotl_class: Any, settings: ReferenceSettings, checkpoint: Checkpoint | None) -> type:
    from transformers import set_seed

    from axolotl_dpo_ext.reference.trainer import ReferenceMixin

    class AxolotlReferenceTrainer(ReferenceMixin, axolotl_class):  # type: ignore[misc]
        """Axolotl's DPO trainer with the reference strategy of this run."""

        def __init__(self, model: Any, ref_model: Any = None, *more: Any, **named: Any) -> None:
            # TRL makes the LoRA before anything is seeded: with Axolotl it would differ in every run.
            set_seed(named["args"].seed)
            source = checkpoint if checkpoint and _is_as_loaded(model, checkpoint) else None
            super().__init__(model, ref_model, *more, reference=settings, checkpoint=source, **named)

    return AxolotlReferenceTrainer


def _is_as_loaded(model: Any, checkpoint: Checkpoint) -> bool:
    """Whether the model still has the checkpoint's vocabulary: rows that were added to it are in no file."""
    from transformers import PretrainedConfig

    saved, _ = PretrainedConfig.get_config_dict(checkpoint.name, revision=checkpoint.revision)
    vocabulary = saved.get("text_config", saved).get("vocab_size")
    weight = model.get_input_embeddings().weight
    return bool(getattr(weight, "ds_shape", weight.shape)[0] == vocabulary)  # ZeRO-3 leaves an empty tensor


@contextlib.contextmanager
def broken_rows_kept() -> Iterator[None]:
    """Lets Axolotl load rows with an empty or missing side, so that the audit can say which they are and drop them.

    Its length filter (utils/data/rl.py) ends the run at the first such row, and names none. An Axolotl that no longer
    has that filter loads as it does.
    """
    import axolotl.utils.data.rl as rl_data

    upstream = getattr(rl_data, "_drop_long_sequences", None)
    if upstream is None:
        yield
        return

    def keep_broken_or_fitting(sample: dict[str, Any], rl: Any, tokenizer: Any, sequence_len: int) -> bool:
        sides = ("prompt", "completion") if str(getattr(rl, "value", rl)) == "kto" else ("prompt", "chosen", "rejected")
        return not all(sample.get(side) for side in sides) or upstream(sample, rl, tokenizer, sequence_len)

    with mock.patch.object(rl_data, "_drop_long_sequences", keep_broken_or_fitting):
        yield
