"""Log-probabilities that a third party hands over are used; those that a dataset came with are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from axolotl_dpo_ext.reference import (
    PairLogProbs,
    Reference,
    ReferenceDPOTrainer,
    ReferenceStrategy,
)
from axolotl_dpo_ext.vocabulary import RunStopped
from tests.reference.conftest import make_pairs
from tests.reference.training import Arguments, changed_in_memory, trajectory

pytestmark = pytest.mark.stack


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that registers a strategy called ``third``, whose reference is the one given."""
    from axolotl_dpo_ext import plugins

    def register(reference: Reference, initial_policy: bool = False) -> None:
        class Third(ReferenceStrategy):
            name, summary, hands_over, is_initial_policy = "third", "a third party's", True, initial_policy

            def problems(self, config: Any) -> list[Any]:
                return []

            def reference(self, policy: Any) -> Reference:
                return reference

        monkeypatch.setitem(plugins.extensions().reference_strategies, "third", Third())

    return register


class Constant(Reference):
    def __init__(self, value: float = -7.0) -> None:
        self.value = value

    def for_batches(self, batches: Any) -> Any:
        return [(torch.full((len(b["input_ids"]) // 2,), self.value),) * 2 for b in batches]


def test_a_third_partys_strategy_hands_over_its_own(model_dir: Path, arguments: Arguments, third_party: Any):
    third_party(Constant())
    trainer = ReferenceDPOTrainer(str(model_dir), **arguments(), reference="third")
    assert len(trajectory(trainer)) == 6


class KnowsTrainingPairs(Constant):
    def for_dataset(self, dataset: Dataset, name: str) -> PairLogProbs | None:
        values = np.full(len(dataset), self.value, np.float32)
        return PairLogProbs(values, values, computed=len(dataset), seconds=0.0) if name == "train" else None


def test_a_third_partys_reference_may_know_one_dataset_and_be_asked_for_the_batches_of_another(
    model_dir: Path, arguments: Arguments, third_party: Any
):
    def train(reference: Reference) -> list[float]:
        third_party(reference)
        given = arguments(eval_strategy="steps", eval_steps=1) | {"eval_dataset": make_pairs(4, first=50)}
        return trajectory(ReferenceDPOTrainer(str(model_dir), **given, reference="third"))

    assert train(KnowsTrainingPairs()) == pytest.approx(train(Constant()), rel=1e-5)


def test_a_third_partys_reference_is_asked_for_the_batches_of_an_evaluation_set_that_comes_later(
    model_dir: Path, arguments: Arguments, third_party: Any
):
    losses = []
    for reference in (KnowsTrainingPairs(), Constant()):
        third_party(reference, initial_policy=True)
        trainer = ReferenceDPOTrainer(str(model_dir), **arguments(), reference="third")
        losses.append(trainer.evaluate(make_pairs(4, first=50))["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def with_stale_columns(dataset: Dataset) -> Dataset:
    return dataset.add_column("ref_chosen_logps", [-1.0] * len(dataset)).add_column(
        "ref_rejected_logps", [-500.0] * len(dataset)
    )


@pytest.mark.parametrize("strategy", ["precomputed", "cpu_offload", "third"])
def test_columns_that_a_dataset_came_with_are_dropped_with_a_warning(
    strategy: str,
    model_dir: Path,
    arguments: Arguments,
    store: Path,
    third_party: Any,
    caplog: pytest.LogCaptureFixture,
):
    third_party(Constant())

    def losses(change: Callable[[Dataset], Dataset]) -> list[float]:
        caplog.clear()
        given = arguments(eval_strategy="steps", eval_steps=1)
        given["train_dataset"] = change(given["train_dataset"])
        sets = {"first": change(make_pairs(4, first=50)), "second": make_pairs(4, first=80)}
        # A reference of one's own: the values of the first batch can't be compared with the policy's.
        own = None if strategy == "third" else changed_in_memory(model_dir)
        trainer = ReferenceDPOTrainer(str(model_dir), own, **given, eval_dataset=sets, reference=strategy)
        trainer.train()
        kept = ("loss", "eval_first_loss", "eval_second_loss")
        return [entry[name] for entry in trainer.state.log_history for name in kept if name in entry]

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if "came with" in record.getMessage()]

    plain = losses(lambda dataset: dataset)
    assert (len(plain), warnings()) == (9, [])
    assert losses(with_stale_columns) == pytest.approx(plain, rel=1e-5)
    assert [text.partition(" came with")[0] for text in warnings()] == ["the train pairs", "the first pairs"]
    assert all("ref_chosen_logps and ref_rejected_logps" in text for text in warnings())
    assert all("fix: remove the columns" in text for text in warnings())


@pytest.mark.parametrize("strategy", ["precomputed", "cpu_offload"])
def test_columns_of_an_evaluation_set_that_comes_later_are_dropped_too(
    strategy: str, model_dir: Path, arguments: Arguments, store: Path
):
    trainer = ReferenceDPOTrainer(str(model_dir), **arguments(), reference=strategy)
    assert trainer.evaluate(with_stale_columns(make_pairs(4, first=50)))["eval_loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("known", [True, False])
def test_columns_of_a_streamed_dataset_are_dropped_too(known: bool, model_dir: Path, arguments: Arguments):
    def first_loss(change: Callable[[Dataset], Dataset]) -> float:
        streamed = change(make_pairs(12)).to_iterable_dataset()
        streamed = streamed if known else streamed.map(lambda row: row)  # its columns are not known from here on
        given = arguments() | {"train_dataset": streamed}
        own = changed_in_memory(model_dir)
        return trajectory(ReferenceDPOTrainer(str(model_dir), own, **given, reference="cpu_offload"))[0]

    assert first_loss(with_stale_columns) == pytest.approx(first_loss(lambda dataset: dataset), rel=1e-5)


def test_values_that_are_not_finite_stop_the_run_before_the_first_step(
    model_dir: Path, arguments: Arguments, third_party: Any
):
    third_party(Constant(-math.inf))
    trainer = ReferenceDPOTrainer(str(model_dir), **arguments(), reference="third")
    # Nothing is stored by most strategies, and a store takes no such values: there is nothing to remove.
    with pytest.raises(RunStopped, match=r"not finite\n +why: .*\n +fix: compute them in bfloat16 or float32"):
        trainer.train()
