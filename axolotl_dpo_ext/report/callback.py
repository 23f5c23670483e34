"""Writes the run report at the end of training, with Axolotl and with TRL alone."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_dpo_ext.report import RunReport

LOG = logging.getLogger(__name__)


class ReportCallback(TrainerCallback):
    """Saves what is known when training starts, and writes the page when it ends.

    Register it after ``trl_callbacks.PreferenceLogCallback``, whose log it draws. Only the first process
    of a run writes.

    Args:
        report: The report, with the decisions taken and the sections known before training.

    Attributes:
        report: The same.
        written: Whether this process wrote the page of a run that came to its end.
    """

    def __init__(self, report: RunReport) -> None:
        self.report = report
        self.written = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves the report without training curves, so that a run that is killed leaves one."""
        if state.is_world_process_zero:
            self.report.save()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the training curves and writes the page.

        A page that can't be written must not cost the model, which is saved after this.
        """
        if not state.is_world_process_zero:
            return
        try:
            self.report.finish()
            self.written = True
        except Exception:
            folder = self.report.output_dir
            LOG.exception("the run report could not be written; try `axolotl dpo-report %s` later", folder)
