"""The preference log of real runs, of resumed ones, and of what a trainer may log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig

from trl_callbacks import PreferenceLogCallback

pytestmark = pytest.mark.stack


def steps(records: list[dict[str, Any]], event: str) -> list[int]:
    return [record["step"] for record in records if record["event"] == event]


def last(records: list[dict[str, Any]], event: str) -> dict[str, Any]:
    return [record for record in records if record["event"] == event][-1]


class StopAt(TrainerCallback):
    """Ends a run early, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


class FailAt(TrainerCallback):
    """Kills a run: no hook of any callback is called after this."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_is_recorded_from_start_to_end(trainer_of, log_of):
    trainer_of().train()
    records = log_of()

    start = records[0]
    assert start.pop("time") > 1.7e9
    assert start == {
        "event": "start",
        "beta": 0.5,
        "loss_type": ["sigmoid"],
        "max_steps": 4,
        "num_train_epochs": 3.0,
        "resumed_at": 0,
        "has_reference": True,
    }
    assert steps(records, "train") == [1, 2, 3, 4]
    assert steps(records, "eval") == [0, 3, 4]
    assert [record["event"] for record in records][-2:] == ["summary", "end"]
    assert last(records, "summary")["train_runtime"] > 0
    assert last(records, "end")["reason"] == "finished"


def test_metrics_keep_their_names_and_rewards_are_divided_by_beta(trainer_of, log_of):
    trainer_of().train()
    records = log_of()

    for event in ("train", "eval"):
        record = last(records, event)
        assert {"epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies"} <= set(record)
        assert not [name for name in record if name.startswith("eval_")]
        assert record["rewards/margins_per_beta"] == pytest.approx(record["rewards/margins"] / 0.5)
    before = next(record for record in records if record["event"] == "eval")
    assert (before["rewards/margins"], before["rewards/accuracies"]) == (0.0, 0.0)
    assert last(records, "eval")["rewards/margins"] > 0.0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"eval_steps": 2}, [0, 2, 4], id="the last step is due anyway"),
        pytest.param({"eval_steps": 3, "eval_delay": 5}, [0, 4], id="the delay outlasts the run"),
        pytest.param({"eval_strategy": "epoch", "max_steps": 3}, [0, 2, 3], id="by epoch, ended within one"),
        pytest.param({"eval_strategy": "no", "eval_on_start": False}, [], id="never"),
    ],
)
def test_the_last_step_is_evaluated_once(trainer_of, log_of, options, expected):
    trainer_of(**options).train()

    assert steps(log_of(), "eval") == expected


@pytest.mark.parametrize(("final_eval", "expected"), [(True, [0, 2]), (False, [0])])
def test_a_run_stopped_early_is_evaluated_where_it_stopped(trainer_of, log_of, final_eval, expected):
    trainer_of(StopAt(2), log=PreferenceLogCallback(final_eval=final_eval)).train()
    records = log_of()

    assert steps(records, "eval") == expected
    assert last(records, "end")["reason"] == "stopped_early"
    assert last(records, "end")["step"] == 2


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_strategy": "steps"}


def test_the_best_checkpoint_is_named_where_it_is_loaded_at_the_end(trainer_of, log_of):
    # the loss falls, so that the first checkpoint is the best where the greatest counts as best
    trainer_of(**BEST, greater_is_better=True, save_steps=1, eval_steps=1, eval_on_start=False).train()

    assert last(log_of(), "end")["best_step"] == 1
    assert steps(log_of(), "eval") == [1, 2, 3, 4]


def test_no_evaluation_is_added_where_the_best_checkpoint_is_kept(trainer_of, log_of):
    trainer_of(StopAt(3), **BEST, save_steps=2, eval_steps=2, eval_on_start=False).train()

    assert last(log_of(), "end")["best_step"] == 2
    assert steps(log_of(), "eval") == [2]


def test_a_killed_run_keeps_what_it_had_and_its_resumption_repeats_nothing(trainer_of, log_of, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        trainer_of(FailAt(3), **saves).train()
    assert steps(log_of(), "train") == [1, 2, 3]
    assert steps(log_of(), "eval") == [0, 1, 2, 3]
    assert steps(log_of(), "end") == []
    log = tmp_path / "run" / "preference_log.jsonl"
    with log.open("a") as file:
        file.write('{"event": "train", "step": 3, "lo')

    trainer_of(**saves).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    records = log_of()

    assert steps(records, "train") == [1, 2, 3, 4]
    # eval_on_start measures step 2 again when the run is resumed there
    assert steps(records, "eval") == [0, 1, 2, 3, 4]
    assert [r["resumed_at"] for r in records if r["event"] == "start"] == [0, 2]
    assert sorted(path.name for path in log.parent.glob("*preference_log*")) == [log.name]


def test_a_finished_run_that_is_extended_has_one_end(trainer_of, log_of, tmp_path):
    trainer_of(save_strategy="steps", save_steps=4).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    trainer_of(save_strategy="no", max_steps=6).train(resume_from_checkpoint=checkpoint)
    records = log_of()

    assert steps(records, "train") == [1, 2, 3, 4, 5, 6]
    assert steps(records, "end") == [6]
    assert steps(records, "summary") == [6]


def test_a_fresh_run_starts_a_fresh_file(trainer_of, log_of):
    trainer_of().train()
    trainer_of(max_steps=1, eval_strategy="no", eval_on_start=False).train()

    assert [record["event"] for record in log_of()] == ["start", "train", "summary", "end"]


def test_an_evaluation_outside_training_leaves_the_log_alone(trainer_of, log_of):
    trainer = trainer_of()
    trainer.train()
    before = log_of()
    trainer.evaluate()

    assert log_of() == before


def test_several_evaluation_sets_are_told_apart(trainer_of, log_of):
    from tests.trl_callbacks.conftest import pairs

    trainer_of(eval_dataset={"easy": pairs(4), "hard_2": pairs(2)}).train()
    evals = [record for record in log_of() if record["event"] == "eval"]

    assert [(record["step"], record["dataset"]) for record in evals] == [
        (step, name) for step in (0, 3, 4) for name in ("easy", "hard_2")
    ]
    assert all({"loss", "runtime", "rewards/margins"} <= set(record) for record in evals)
    assert not [name for record in evals for name in record if "easy" in name or "hard_2" in name]


def test_another_folder_can_be_named(trainer_of, tmp_path):
    trainer_of(log=PreferenceLogCallback(output_dir=str(tmp_path / "a" / "b"))).train()

    assert (tmp_path / "a" / "b" / "preference_log.jsonl").is_file()
    assert not (tmp_path / "run" / "preference_log.jsonl").exists()


def begin(folder: Path, args: TrainingArguments | None = None, first: bool = True, **state: Any):
    """A callback as the trainer leaves it after on_train_begin, with what the trainer passes to its hooks."""
    callback = PreferenceLogCallback()
    args = args or DPOConfig(output_dir=str(folder), beta=0.5, use_cpu=True, bf16=False)
    given = (args, TrainerState(max_steps=9, is_world_process_zero=first, **state), TrainerControl())
    callback.on_train_begin(*given)
    return callback, given


def records_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "preference_log.jsonl").read_text().splitlines()]


def test_non_finite_numbers_are_written_as_words(tmp_path):
    callback, given = begin(tmp_path)
    logs = {"loss": float("nan"), "rewards/margins": float("-inf"), "grad_norm": float("inf")}
    callback.on_log(*given, logs=logs)
    record = records_in(tmp_path)[-1]

    assert (record["loss"], record["rewards/margins"], record["grad_norm"]) == ("nan", "-inf", "inf")
    assert record["rewards/margins_per_beta"] == "-inf"


def test_only_numbers_are_metrics(tmp_path):
    callback, given = begin(tmp_path)
    logs = {
        "tensor": torch.tensor(1.5),
        "numpy": np.float32(0.25),
        "count": 3,
        "flag": True,
        "text": "0.5",
        "list": [1],
        "step": 7,
    }
    callback.on_log(*given, logs=logs)
    record = records_in(tmp_path)[-1]

    assert (record["tensor"], record["numpy"], record["count"], record["step"]) == (1.5, 0.25, 3, 0)
    assert not {"flag", "text", "list"} & set(record)


def test_a_training_record_with_token_speed_is_no_summary(tmp_path):
    callback, given = begin(tmp_path)
    callback.on_log(*given, logs={"loss": 0.5, "train_runtime": 3.0, "train_tokens_per_second": 9.0})

    assert records_in(tmp_path)[-1]["event"] == "train"


def test_only_the_first_process_writes_but_all_agree_to_evaluate(tmp_path):
    args = DPOConfig(
        output_dir=str(tmp_path), eval_strategy="steps", eval_steps=5, use_cpu=True, bf16=False, max_steps=9
    )
    callback, given = begin(tmp_path, args, first=False, global_step=9)
    callback.on_log(*given, logs={"loss": 0.5})
    control = callback.on_epoch_end(*given)
    callback.on_train_end(*given)

    assert control.should_evaluate
    assert list(tmp_path.iterdir()) == []


def test_each_line_is_on_disk_when_the_hook_returns(tmp_path):
    callback, given = begin(tmp_path)
    callback.on_log(*given, logs={"loss": 0.5})

    assert [record["event"] for record in records_in(tmp_path)] == ["start", "train"]


def test_arguments_without_beta_or_loss_type_are_fine(tmp_path):
    callback, given = begin(tmp_path, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    callback.on_log(*given, logs={"rewards/margins": 1.0})
    start, record = records_in(tmp_path)

    assert (start["beta"], start["loss_type"]) == (None, [])
    assert "rewards/margins_per_beta" not in record


def test_importing_the_package_loads_no_training_library():
    code = (
        "import sys, trl_callbacks; assert 'PreferenceLogCallback' in dir(trl_callbacks);"
        "print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules]);"
        "trl_callbacks.PreferenceLogCallback;"
        "print([m for m in ('axolotl_dpo_ext', 'axolotl', 'trl.trainer.dpo_trainer') if m in sys.modules])"
    )
    # torch itself loads whatever is installed under its entry point for backends; that is not what is tested
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    assert out.stdout.splitlines() == ["[]", "[]"]


def test_an_unknown_name_is_an_attribute_error():
    import trl_callbacks

    with pytest.raises(AttributeError, match="NoSuchCallback"):
        _ = trl_callbacks.NoSuchCallback


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "train", "step": null}',
        '{"event": "train", "step": Infinity}',
        '{"event": "start", "resumed_at": null}',
        '{"event": "eval", "step": 1, "dataset": ["a"]}',
        '{"event": "train", "step": 1, "nested": [NaN]}',
        "[" * 100_000,
        "null",
    ],
)
def test_a_damaged_log_does_not_stop_a_resumed_run(tmp_path, line):
    sound = '{"event": "start", "resumed_at": 0}\n{"event": "train", "step": 1, "loss": 0.5}\n'
    (tmp_path / "preference_log.jsonl").write_text(sound + line + "\n", encoding="utf-8")
    begin(tmp_path, global_step=2)
    records = [json.loads(kept) for kept in (tmp_path / "preference_log.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records][:2] == ["start", "train"]
    assert records[-1]["resumed_at"] == 2


def test_a_log_that_cannot_be_written_is_named_and_costs_nothing(tmp_path, caplog):
    (tmp_path / "preference_log.jsonl").mkdir()
    begin(tmp_path, global_step=2)
    assert "can't be written" in caplog.text
