"""A policy that does not learn is stopped, in every precision and with every loss; one that learns slowly is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from axolotl_dpo_ext.reference import ReferenceDPOTrainer, checks
from axolotl_dpo_ext.reference.checks import STUCK_STEPS, StuckPolicyCallback
from axolotl_dpo_ext.reference.processes import Processes
from axolotl_dpo_ext.vocabulary import RunStopped

pytestmark = [pytest.mark.stack, pytest.mark.filterwarnings("ignore::UserWarning")]

Arguments = Callable[..., dict[str, Any]]
BF16_WEIGHTS = {"model_init_kwargs": {"dtype": "bfloat16"}}
AUTOCAST = {"bf16": True}
STEPS = "from step 1 to 21, and no sampled element of a trained parameter has changed since training began"
ZERO = rf"the reward margins have been 0 \(at most .*\) {STEPS}"
ROUNDING = rf"the reward margins have been within rounding \(at most .*\) {STEPS}"
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


class Frozen(ReferenceDPOTrainer):
    def create_optimizer(self, *args: Any) -> Any:
        optimizer = super().create_optimizer(*args)
        optimizer.step = lambda *a, **k: None  # a policy that never changes
        return optimizer


@pytest.mark.parametrize(
    ("options", "evidence"),
    [
        ({}, ZERO),
        ({"loss_type": ["ipo"]}, ZERO),
        ({"loss_type": ["sigmoid", "sft"]}, ZERO),
        ({"loss_type": ["hinge"]}, ZERO),
        (BF16_WEIGHTS, ROUNDING),
        (BF16_WEIGHTS | {"loss_type": ["ipo"]}, ROUNDING),
        (AUTOCAST, ROUNDING),
        (AUTOCAST | {"loss_type": ["sigmoid", "sft"]}, ROUNDING),
    ],
)
def test_a_policy_that_does_not_change_stops_the_run(
    options: dict[str, Any], evidence: str, model_dir: Path, arguments: Arguments, store: Path
):
    trainer = Frozen(str(model_dir), **arguments(max_steps=40, **options), reference="precomputed")
    with pytest.raises(RunStopped, match=f"{evidence}(?s:.*)\n    fix: check that the trained parameters"):
        trainer.train()


def test_pairs_whose_answers_are_the_same_stop_the_run_though_weights_change(
    model_dir: Path, arguments: Arguments, store: Path
):
    given = arguments(max_steps=10 * STUCK_STEPS + 2, loss_type=["sigmoid", "sft"], learning_rate=1e-4)
    given["train_dataset"] = given["train_dataset"].map(lambda row: {"rejected": row["chosen"]})
    trainer = ReferenceDPOTrainer(str(model_dir), **given, reference="precomputed")
    with pytest.raises(RunStopped, match=rf"exactly 0 from step 1 to {10 * STUCK_STEPS + 1}, though parameters change"):
        trainer.train()


def test_a_learning_rate_that_is_lost_in_the_weights_stops_the_run(model_dir: Path, arguments: Arguments, store: Path):
    options = BF16_WEIGHTS | {"max_steps": 40, "learning_rate": 1e-12, "optim": "sgd"}
    trainer = ReferenceDPOTrainer(str(model_dir), **arguments(**options), reference="precomputed")
    with pytest.raises(RunStopped, match=ROUNDING):
        trainer.train()


@pytest.mark.parametrize("strategy", ["precomputed", "cpu_offload"])
@pytest.mark.parametrize(
    ("options", "peft"),
    [
        ({"learning_rate": 1e-6, "lr_scheduler_type": "linear", "warmup_steps": 1000}, LORA),
        (AUTOCAST | {"learning_rate": 1e-9}, None),
        (AUTOCAST | {"learning_rate": 1e-9}, LORA),
        (AUTOCAST | {"learning_rate": 1e-7, "lr_scheduler_type": "linear", "warmup_steps": 1000}, None),
        (BF16_WEIGHTS | {"learning_rate": 1e-6}, None),
        (BF16_WEIGHTS | {"learning_rate": 1e-4, "lr_scheduler_type": "cosine"}, None),
    ],
)
def test_a_policy_that_learns_slowly_goes_on(
    options: dict[str, Any], peft: Any, strategy: str, model_dir: Path, arguments: Arguments, store: Path
):
    given = arguments(max_steps=STUCK_STEPS + 5, **options)
    ReferenceDPOTrainer(str(model_dir), **given, peft_config=peft, reference=strategy).train()


class Logged:
    """Tells the callback of steps as a trainer would."""

    beta = 0.1

    def __init__(self, model: nn.Module, low_precision: bool = True) -> None:
        self.model = model
        self.callback = StuckPolicyCallback(low_precision)
        self.callback.on_train_begin(self, None, None, model=model)

    def steps(self, first: int, last: int, **logs: float) -> None:
        usual = {"loss": 0.69, "learning_rate": 1e-6, "rewards/margins": 0.01, "logps/chosen": -40.0}
        for step in range(first, last + 1):
            state = type("State", (), {"global_step": step})
            self.callback.on_log(self, state, None, logs={**usual, **logs}, model=self.model)


def test_parameters_that_cannot_be_seen_leave_the_margins_of_full_precision():
    elsewhere = nn.Linear(3, 3)
    elsewhere.weight.ds_id = 1  # as ZeRO-3 marks a partitioned one
    Logged(elsewhere).steps(1, 100)
    Logged(elsewhere, low_precision=False).steps(1, 100)
    with pytest.raises(RunStopped, match=r"have been 0 \(at most 1e-06\) from step 1 to 21\n"):
        Logged(elsewhere, low_precision=False).steps(1, 100, **{"rewards/margins": 1e-6})


def test_parameters_that_have_changed_once_are_enough():
    model = nn.Linear(100, 1000).to(torch.bfloat16)
    logged = Logged(model)
    logged.steps(1, 10)
    with torch.no_grad():
        model.weight[:100, ::7] += 1
    logged.steps(11, 100)  # later steps change nothing any more, as where the learning rate has come down


def test_a_process_whose_part_has_changed_speaks_for_all(monkeypatch: pytest.MonkeyPatch):
    class First(Processes):
        def __init__(self) -> None: ...

        def gather(self, value: Any) -> list[Any]:
            return [value, False]

    monkeypatch.setattr(checks, "Processes", First)
    Logged(nn.Linear(3, 3)).steps(1, 100)


@pytest.mark.parametrize(
    "logs",
    [
        {"rewards/margins": 5.0},
        {"rewards/margins": float("nan")},
        {"learning_rate": 0.0},
        {"logps/chosen": -0.001},
    ],
)
def test_margins_beyond_rounding_and_steps_without_a_learning_rate_are_no_evidence(logs: dict[str, float]):
    logged = Logged(nn.Linear(3, 3))
    logged.steps(1, 100, **logs)
    with pytest.raises(RunStopped, match="from step 101 to 121"):
        logged.steps(101, 200)
