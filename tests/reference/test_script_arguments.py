"""A trainer of the user's own keeps its signatures, and arguments that can't be meant are refused with what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOTrainer

from axolotl_dpo_ext.reference import ReferenceDPOTrainer, ReferenceMixin
from axolotl_dpo_ext.vocabulary import ConfigurationError, RunStopped
from tests.reference.conftest import make_pairs

pytestmark = pytest.mark.stack

Arguments = Callable[..., dict[str, Any]]


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Full(DPOTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert "ref_chosen_logps" in inputs
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class PassingOn(DPOTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **named: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs, **named)

    def get_batch_samples(self, *given: Any, **named: Any) -> Any:
        return super().get_batch_samples(*given, **named)


class OwnOrder(DPOTrainer):
    def __init__(self, model: Any, args: Any, train_dataset: Any, tokenizer: Any) -> None:
        super().__init__(model, args=args, train_dataset=train_dataset, processing_class=tokenizer)


@pytest.mark.parametrize("mine", [Full, PassingOn])
@pytest.mark.parametrize("strategy", ["precomputed", "cpu_offload"])
def test_the_mixin_goes_before_a_trainer_of_ones_own(
    mine: type, strategy: str, model_dir: Path, arguments: Arguments, store: Path
):
    class Both(ReferenceMixin, mine):  # type: ignore[misc, valid-type]
        pass

    plain = losses(DPOTrainer(str(model_dir), **arguments()))
    assert losses(Both(str(model_dir), **arguments(), reference=strategy)) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_trainer_with_arguments_in_its_own_order_keeps_it(
    by_name: bool, model_dir: Path, arguments: Arguments, store: Path
):
    class Both(ReferenceMixin, OwnOrder):
        pass

    plain = losses(DPOTrainer(str(model_dir), **arguments()))
    given = arguments()
    values = [str(model_dir), given["args"], given["train_dataset"], given["processing_class"]]
    names = ("model", "args", "train_dataset", "tokenizer")
    trainer = (
        Both(**dict(zip(names, values, strict=True)), reference="precomputed")
        if by_name
        else Both(*values, reference="precomputed")
    )
    assert losses(trainer) == pytest.approx(plain, rel=1e-4)
    with pytest.raises(TypeError, match="model by position and by name"):
        Both(*values, model="twice")


def test_a_method_that_leaves_something_out_is_named_with_its_class(model_dir: Path, arguments: Arguments):
    class Short(DPOTrainer):
        def compute_loss(self, model: Any, inputs: Any) -> Any: ...

    class Both(ReferenceMixin, Short):
        pass

    with pytest.raises(RunStopped, match=r"Short\.compute_loss takes no return_outputs, num_items_in_batch"):
        Both(str(model_dir), **arguments(), reference="precomputed")


def test_a_trl_without_what_is_needed_is_named(model_dir: Path, arguments: Arguments):
    def compute_loss(self: Any, model: Any, batch: Any) -> None: ...

    future = type("DPOTrainer", (), {"compute_loss": compute_loss, "__module__": "trl.trainer.future"})
    newer = type("Newer", (ReferenceMixin, future), {})
    with pytest.raises(RunStopped, match=r"lacks .*_precompute_ref_logps(?s:.*)1\.9\.0, 1\.14\.1 and 1\.16\.0"):
        newer(str(model_dir), **arguments(), reference="precomputed")


@pytest.mark.parametrize("others", [(), (Trainer,)])
def test_what_is_no_dpo_trainer_is_named(others: tuple[type, ...], model_dir: Path, arguments: Arguments):
    alone = type("Alone", (ReferenceMixin, *others), {})
    with pytest.raises(RunStopped, match=r"Alone is no DPOTrainer(?s:.*)class Alone\(ReferenceMixin, YourDPOTrainer\)"):
        alone(model=str(model_dir), **arguments(), reference="precomputed")


def test_the_mixin_behind_the_trainer_is_refused_where_the_class_is_made():
    with pytest.raises(RunStopped, match=r"names DPOTrainer before ReferenceMixin(?s:.*)class Wrong\(ReferenceMixin"):

        class Wrong(DPOTrainer, ReferenceMixin):
            pass


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"reference": None}, "`reference` is None"),
        ({"reference": False}, "`reference` is False"),
        ({"checkpoint": "org/name"}, r"checkpoint=Checkpoint\('org/name'\)"),
        ({"ref_model": "org/name"}, "load it with `AutoModelForCausalLM"),
        ({"args": None}, "no `args` were given"),
        ({"model": None}, "no `model` was given"),
        ({"train_dataset": Dataset.from_list([])}, "`train_dataset` has no rows"),
        ({"eval_dataset": {"one": make_pairs(2), "none": Dataset.from_list([])}}, "`eval_dataset` has no rows"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(
    wrong: dict[str, Any], told: str, model_dir: Path, arguments: Arguments, store: Path
):
    given: dict[str, Any] = {"model": str(model_dir), "reference": "precomputed", **arguments(), **wrong}
    with pytest.raises(RunStopped, match=rf"{told}") as stopped:
        ReferenceDPOTrainer(**given)
    for part in ("why:", "fix:"):
        assert part in str(stopped.value)


def test_a_file_in_the_place_of_the_store_is_told_before_anything_loads(arguments: Arguments, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigurationError, match="where no reference store can be"):
        ReferenceDPOTrainer(
            "nobody/model", **arguments(), reference={"strategy": "precomputed", "store": tmp_path / "file"}
        )


def test_auto_does_not_choose_what_a_streamed_dataset_rules_out(model_dir: Path, arguments: Arguments, store: Path):
    ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed")
    rows = make_pairs(8).to_list()
    streamed = {**arguments(), "train_dataset": IterableDataset.from_generator(lambda: iter(rows))}
    assert ReferenceDPOTrainer(str(model_dir), **arguments())._strategy.name == "precomputed"
    assert ReferenceDPOTrainer(str(model_dir), **streamed)._strategy.name == "gpu"


def test_auto_counts_no_stored_values_for_weights_of_unknown_origin(model_dir: Path, arguments: Arguments, store: Path):
    ReferenceDPOTrainer(str(model_dir), **arguments(), reference="precomputed")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert ReferenceDPOTrainer(model, **arguments())._strategy.name == "gpu"


@pytest.mark.parametrize("strategy", ["gpu", "adapter", "precomputed", "cpu_offload"])
def test_a_continued_adapters_base_is_the_reference_where_that_is_asked_for(
    strategy: str, model_dir: Path, arguments: Arguments, store: Path, caplog: pytest.LogCaptureFixture
):
    def continued() -> Any:
        torch.manual_seed(2)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model_dir),
            LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        return model

    base = AutoModelForCausalLM.from_pretrained(model_dir)
    plain = losses(DPOTrainer(continued(), ref_model=base, **arguments()))
    caplog.set_level("INFO")
    ours = losses(ReferenceDPOTrainer(continued(), **arguments(), reference={"strategy": strategy, "model": "base"}))
    assert ours == pytest.approx(plain, rel=1e-4)
    assert "is not compared" not in caplog.text
    if strategy in ("precomputed", "cpu_offload"):
        assert "the first batch recomputed with the model agrees" in caplog.text
