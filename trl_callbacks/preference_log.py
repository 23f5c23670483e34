"""Writes what a preference run measures to a JSON Lines file that survives a killed run.

The file, ``preference_log.jsonl``, has one JSON object a line, told apart by ``event``:

* ``start``: ``beta``, ``loss_type`` (list), ``has_reference`` (whether rewards are log-ratios to a reference
  model, as in DPO and KTO, or log-probabilities, as in ORPO and CPO), ``max_steps``, ``num_train_epochs``,
  ``resumed_at`` (step), ``time``. One for each time the run was started or resumed; the first line of the
  file always is one.
* ``train`` and ``eval``: ``step``, ``epoch``, ``time`` and every numeric metric under the name TRL gives it,
  without the ``eval_`` prefix. Where both are known, ``rewards/margins_per_beta`` is added: TRL's rewards
  contain beta, so that only the quotient (in nats) compares across betas. With several evaluation sets,
  ``dataset`` names the set.
* ``summary``: the totals that transformers logs after the last step (``train_runtime``, ``train_loss`` ...).
* ``end``: ``step``, ``reason`` (``finished`` or ``stopped_early``) and, where the best checkpoint was loaded
  back at the end, its ``best_step``. A run that was killed has none.

``time`` is in seconds since the epoch. A non-finite number is written as the string ``"nan"``, ``"inf"`` or
``"-inf"``, because JSON has no number for it and ``null`` would not say which it was.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LOG = logging.getLogger(__name__)

FILE_NAME = "preference_log.jsonl"

_OWN_FIELDS = frozenset({"event", "step", "epoch", "time", "dataset"})


class PreferenceLogCallback(TrainerCallback):
    """Records every logged metric of a preference run in ``preference_log.jsonl``.

    Only the first process writes. A fresh run starts a fresh file; a resumed run first removes the records
    that lie after the checkpoint it resumes from, so that no step is there twice. Only what happens inside
    ``train()`` is recorded: an evaluation before or after it leaves the file as it is.

    Args:
        output_dir: Folder of the file. The run's own ``output_dir`` if ``None``.
        final_eval: Whether to evaluate once more after the last step where the run evaluates at all and that
            step has not been evaluated, so that the last figures are those of the model that is kept. Off by
            itself under ``load_best_model_at_end``, where the kept model was evaluated when it was found to
            be the best.
    """

    def __init__(self, output_dir: str | None = None, final_eval: bool = True) -> None:
        self.output_dir = output_dir
        self.final_eval = final_eval
        self._path: Path | None = None  # None outside train(), and on every process but the first
        self._beta: float | None = None
        self._evaluated_at: int | None = None
        self._evals_kept: set[tuple[int, str]] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the file, or takes it up again where the checkpoint was written."""
        self._evaluated_at = None
        self._evals_kept = set()
        self._beta = _beta(args)
        if not state.is_world_process_zero:
            return
        self._path = Path(self.output_dir or args.output_dir or ".") / FILE_NAME
        try:
            self._start(self._path, args, state)
        except OSError as error:
            LOG.error("%s can't be written (%s): this run is not recorded", self._path, error)
            self._path = None

    def _start(self, path: Path, args: TrainingArguments, state: TrainerState) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _records_until(path, state.global_step) if state.global_step > 0 else []
        self._evals_kept = {(r["step"], str(r.get("dataset") or "")) for r in kept if r["event"] == "eval"}
        start = {
            "event": "start",
            "beta": self._beta,
            "loss_type": _loss_types(args),
            "has_reference": hasattr(args, "precompute_ref_log_probs"),
            "max_steps": state.max_steps,
            "num_train_epochs": args.num_train_epochs,
            "resumed_at": state.global_step,
            "time": time.time(),
        }
        _replace(path, [*kept, start])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for the final evaluation.

        This is the last point at which the trainer still evaluates, and it is reached however the run ends:
        at ``max_steps``, or because another callback stopped it.
        """
        last = control.should_training_stop or state.global_step >= state.max_steps
        evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        wanted = self.final_eval and evaluates and not args.load_best_model_at_end
        if last and wanted and self._evaluated_at != state.global_step:
            control.should_evaluate = True
        return control

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remembers, on every process alike, that this step has been evaluated."""
        self._evaluated_at = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends one record of what the trainer logs."""
        if self._path is None or not logs:
            return
        event = _event(logs)
        dataset = _dataset(logs) if event == "eval" else None
        # eval_on_start measures a resumed run once more at the step that its checkpoint already has.
        if event == "eval" and (state.global_step, dataset or "") in self._evals_kept:
            return
        metrics = _metrics(logs, _prefixes(event, dataset))
        if self._beta and "rewards/margins" in metrics:
            metrics["rewards/margins_per_beta"] = metrics["rewards/margins"] / self._beta
        self._append(event, state, ({"dataset": dataset} if dataset else {}) | metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the file with the reason why the run ended."""
        if self._path is None:
            return
        reason = "finished" if state.global_step >= state.max_steps else "stopped_early"
        closing: dict[str, Any] = {"reason": reason}
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            closing["best_step"] = state.best_global_step
        self._append("end", state, closing)
        self._path = None

    def _append(self, event: str, state: TrainerState, values: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        head = {"event": event, "step": state.global_step, "epoch": state.epoch, "time": time.time()}
        try:
            # Opened anew for each line: nothing is left in a buffer when the run is killed.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(head | dict(values)))
        except OSError as error:
            # A full disk must not cost the training run its progress for the sake of its log.
            LOG.error("%s can't be written (%s): what this run logs from here on is not recorded", self._path, error)
            self._path = None


def _beta(args: TrainingArguments) -> float | None:
    beta = getattr(args, "beta", None)  # the trainers take theirs from here too; some kinds have none
    return float(beta) if isinstance(beta, (int, float)) else None


def _loss_types(args: TrainingArguments) -> list[str]:
    loss_type = getattr(args, "loss_type", None) or []
    return [loss_type] if isinstance(loss_type, str) else [str(one) for one in loss_type]


def _event(logs: Mapping[str, Any]) -> str:
    # Not train_runtime: with include_num_input_tokens_seen every training record has that one.
    if "train_loss" in logs:
        return "summary"
    return "eval" if any(key.startswith("eval_") for key in logs) else "train"


def _dataset(logs: Mapping[str, Any]) -> str | None:
    """Returns the name of the evaluation set, or ``None`` where there is only one.

    transformers names the set in its own keys (``eval_NAME_runtime``); TRL leaves it out of those that it
    adds (``eval_rewards/margins``), so that the name has to be read off the former.
    """
    for key in logs:
        if key.startswith("eval_") and key.endswith("_runtime") and key != "eval_runtime":
            return key.removeprefix("eval_").removesuffix("_runtime")
    return None


def _prefixes(event: str, dataset: str | None) -> tuple[str, ...]:
    if event != "eval":
        return ()
    return (f"eval_{dataset}_", "eval_") if dataset else ("eval_",)


def _metrics(logs: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, float]:
    metrics = {}
    for key, value in logs.items():
        number = _number(value)
        prefix = next((one for one in prefixes if key.startswith(one)), "")
        name = key.removeprefix(prefix)
        if number is not None and name not in _OWN_FIELDS:
            metrics[name] = number
    return metrics


def _number(value: Any) -> float | None:
    """Returns a number, or the one number in a NumPy scalar or tensor; ``None`` for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _number(value.item())
    return None


def _records_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Returns the records of an earlier part of the run up to and including ``step``.

    Totals and the end of that part are left out, since the run goes on; so is the line that a killed run left
    half written.
    """
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if _belongs(record, step):
                kept.append(json.loads(_line(record)))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            continue  # damaged: a log is not worth a resumed run
    return kept


def _belongs(record: Mapping[str, Any], step: int) -> bool:
    if record.get("event") == "start":
        return int(record.get("resumed_at", 0)) < step
    return record.get("event") in ("train", "eval") and int(record.get("step", step + 1)) <= step


def _line(record: Mapping[str, Any]) -> str:
    written = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(written, allow_nan=False) + "\n"


def _replace(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes the whole file in one step, so that a kill leaves either the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(map(_line, records)), encoding="utf-8")
    os.replace(temporary, path)
