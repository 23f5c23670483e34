"""The Axolotl plugin: one short method per Axolotl hook, each a translation to a room.

Axolotl calls some hooks more than once in a run (the model hooks for policy and reference), in every
process of a distributed run, and, where it discovers installed plugins, in runs that do not ask for this
pack: without a ``dpo_ext:`` key every method returns at once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.logging import get_logger

from axolotl_dpo_ext.vocabulary import ConfigurationError, RunStopped, misspelt_key

if TYPE_CHECKING:
    from types import TracebackType

    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.utils.dict import DictDefault
    from transformers import Trainer, TrainerCallback

    from axolotl_dpo_ext.axolotl_datasets import Loaded
    from axolotl_dpo_ext.configure import Configuration
    from axolotl_dpo_ext.quality import AuditResult
    from axolotl_dpo_ext.report import RunReport
    from axolotl_dpo_ext.report.callback import ReportCallback
    from axolotl_dpo_ext.settings import QualitySettings
    from axolotl_dpo_ext.vocabulary import Section

LOG = get_logger(__name__)


class DPOExtPlugin(BasePlugin):  # type: ignore[misc] # axolotl ships no types
    """Translates Axolotl's hooks to the rooms of this pack."""

    def __init__(self) -> None:
        super().__init__()
        self._active: Configuration | None = None
        self._given: dict[str, Any] = {}  # the configuration before anybody added to it
        self._data_section: Section | None = None
        self._writer: ReportCallback | None = None
        self._in_charge = contextlib.ExitStack()

    def get_input_args(self) -> str | None:
        """Names the pydantic class that adds ``dpo_ext`` to Axolotl's schema."""
        return "axolotl_dpo_ext.axolotl_args.DPOExtArgs" if self._is_first() else None

    def register(self, cfg: DictDefault) -> None:
        """Validates everything together, sets the keys that follow from it and says what is active.

        Raises:
            ConfigurationError: With every fatal problem of the configuration.
        """
        self._active = self._data_section = self._writer = None
        self._in_charge.close()
        if not self._is_first() or not _asks(cfg):
            return
        # Imported here: a run without the key does not pay for the rooms.
        from axolotl_dpo_ext.configure import configure
        from axolotl_dpo_ext.plugins import extensions
        from axolotl_dpo_ext.stack import installed_versions

        self._given = dict(cfg.to_dict())
        _show_run_stopped_without_traceback()
        configuration = configure(self._given, installed_versions(), extensions())
        if configuration.errors:
            raise ConfigurationError(configuration.errors)
        for problem in configuration.advice:
            LOG.warning("axolotl-dpo-ext: %s", problem)
        for key, value in configuration.axolotl_keys.items():
            cfg[key] = value
        self._active = configuration
        # Axolotl shows a logger's messages only from the level that it sets, and sets it for its own.
        logging.getLogger("axolotl_dpo_ext").setLevel(logging.INFO)
        self._put_strategy_in_charge(cfg, configuration)
        LOG.info("axolotl-dpo-ext %s active: %s", version("axolotl-dpo-ext"), configuration.banner())
        for decision in configuration.decisions:
            LOG.info("axolotl-dpo-ext: %s = %s (%s)", decision.about, decision.choice, decision.reason)

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> TrainDatasetMeta | None:
        """Audits the pairs that Axolotl loads and splits off held-out prompts."""
        if self._active is None or self._active.settings.quality is None:
            return None
        from axolotl.common.datasets import TrainDatasetMeta

        from axolotl_dpo_ext.quality import RECORDS_FILE

        loaded, audited = self.audit(cfg)
        if _is_main_process():
            LOG.info("axolotl-dpo-ext: quality of the preference pairs\n%s", audited.summary_table())
            audited.write_records(Path(cfg.output_dir) / RECORDS_FILE)
        self._data_section = audited.section()
        train = audited.train.shuffle(seed=cfg.seed) if loaded.shuffles else audited.train
        heldout = audited.heldout if self._active.holdout else loaded.test
        # As axolotl.common.datasets computes it, of the rows that are left.
        steps = math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
        return TrainDatasetMeta(train, heldout, steps)

    def audit(self, cfg: DictDefault) -> tuple[Loaded, AuditResult]:
        """Returns the pairs that Axolotl loads and what the audit finds in them, with the settings registered.

        Raises:
            ConfigurationError: A local file has rows that cannot be loaded; they are named.
            QualityStop: Too little would be left.
        """
        from axolotl_dpo_ext.axolotl_datasets import load_sources
        from axolotl_dpo_ext.upstream_errors import explained, in_files

        if self._active is None or self._active.settings.quality is None:
            raise RuntimeError("the plugin was not registered with a configuration that has `dpo_ext.quality`")
        with explained(cfg, in_files):
            loaded = load_sources(cfg)
        return loaded, _audit(loaded, cfg, self._active.settings.quality, self._active.holdout)

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any] | None:
        """Sets whether there is an evaluation before the first step, the "before" of the run report.

        Axolotl makes one wherever a run evaluates; the user's own ``eval_on_start`` stands.
        """
        if self._active is None or not self._active.settings.report.enabled:
            return None
        if self._given.get("eval_on_start") is not None or cfg.eval_strategy == "no":
            return None
        has_pairs = bool(cfg.val_set_size or cfg.test_datasets)
        scheduled = bool(cfg.eval_steps or cfg.evals_per_epoch or cfg.eval_strategy)
        return {"eval_on_start": self._active.settings.report.baseline and has_pairs and scheduled}

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        """Adds the callbacks that record the run and write its report."""
        if self._active is None or not self._active.settings.report.enabled:
            return []
        from axolotl_dpo_ext.report.callback import ReportCallback
        from trl_callbacks import PreferenceLogCallback

        report = self._report(cfg, self._active)
        report.sections += _reference_sections(trainer)
        if self._active.settings.quality is not None:
            report.add(_likelihood_section(trainer, self._active.settings.quality))
        self._writer = ReportCallback(report)
        return [PreferenceLogCallback(), self._writer]

    def post_train_unload(self, cfg: DictDefault) -> None:
        """Ends the run's output with what happened and where the report is.

        Axolotl 0.21 calls this after a failed run too, which has no report, or an earlier run's.
        """
        self._in_charge.close()
        if self._writer is None or not self._writer.written:
            return
        from axolotl_dpo_ext.report import headline

        LOG.info("axolotl-dpo-ext: what the run did\n%s", headline(self._writer.report))

    def _put_strategy_in_charge(self, cfg: DictDefault, configuration: Configuration) -> None:
        reference, strategy = configuration.settings.reference, configuration.strategy
        if reference is None or strategy is None:
            return
        from axolotl_dpo_ext.axolotl_access import reference_strategy_in_charge
        from axolotl_dpo_ext.reference import Checkpoint

        decided = reference.model_copy(update={"strategy": strategy.name})
        changed = cfg.reinit_weights or cfg.qat  # then the files are not what is trained
        source = None if changed else Checkpoint(cfg.base_model, cfg.revision_of_model or None)
        self._in_charge.enter_context(reference_strategy_in_charge(decided, not strategy.hands_over, source))

    def _is_first(self) -> bool:
        """Whether this is the first of possibly several registrations of this plugin under different names."""
        registered = (p for p in PluginManager.get_instance().plugins.values() if isinstance(p, DPOExtPlugin))
        return next(registered, self) is self

    def _report(self, cfg: DictDefault, configuration: Configuration) -> RunReport:
        from axolotl_dpo_ext.report import RunReport

        return RunReport(
            output_dir=Path(cfg.output_dir),
            title=str(cfg.output_dir),
            config={key: value for key, value in cfg.to_dict().items() if value is not None},
            decisions=configuration.decisions,
            sections=[self._data_section] if self._data_section else [],
        )


def _reference_sections(trainer: Trainer) -> list[Section]:
    record = getattr(trainer, "reference_record", {})
    if not record:
        return []
    from axolotl_dpo_ext.reference.record import reference_section

    return [reference_section(record)]


def _likelihood_section(trainer: Trainer, settings: QualitySettings) -> Section | None:
    """Says how the data looks to the reference, where its log-probabilities were computed before training."""
    from axolotl_dpo_ext.quality import likelihood_section

    return likelihood_section(trainer.train_dataset, getattr(trainer.args, "max_length", None), settings)


def _asks(cfg: DictDefault) -> bool:
    if (misspelt := misspelt_key(cfg)) is not None:
        _show_run_stopped_without_traceback()
        raise ConfigurationError([misspelt])
    return cfg.get("dpo_ext") is not None and cfg["dpo_ext"] is not False


def _audit(loaded: Loaded, cfg: DictDefault, settings: QualitySettings, holdout: float) -> AuditResult:
    """Audits what Axolotl loaded; the first process computes the scores, the others read them."""
    from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
    from axolotl.loaders import load_tokenizer

    from axolotl_dpo_ext.plugins import extensions
    from axolotl_dpo_ext.quality import audit

    return audit(
        loaded.train,
        load_tokenizer(cfg),
        settings,
        checks=list(extensions().pair_checks.values()),
        embedders=list(extensions().embedders.values()),
        max_length=cfg.sequence_len,
        # For dpo and ipo Axolotl overrides a method to take a second BOS away, which TRL no longer calls.
        single_bos=cfg.rl in ("orpo", "simpo"),
        holdout=holdout,
        test=loaded.test,
        sources=loaded.sources,
        cache=Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH) / "dpo_ext_audit",
    )


@functools.cache
def _show_run_stopped_without_traceback() -> None:
    """Leaves out the traceback of an uncaught ``RunStopped``: it would bury what the message lists."""
    show_others = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, RunStopped):
            sys.stderr.write(f"\naxolotl-dpo-ext: {error}\n\n")
        else:
            show_others(kind, error, trace)

    sys.excepthook = show


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def precompute_with_axolotl(keys: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Computes and stores what a training run with this configuration would need of its reference.

    Builds the trainer just as ``axolotl train`` does, with the model whole in each process, and does not train.

    Args:
        keys: An Axolotl configuration as read from YAML.

    Returns:
        For each dataset its pairs, the answers that had to be computed, and the seconds that took.
    """
    import torch
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import setup_model_and_trainer
    from axolotl.utils.dict import DictDefault

    from axolotl_dpo_ext.upstream_errors import explained, in_datasets, in_trainer, in_validation

    given = _for_precomputing(keys)
    with explained(given, in_validation):
        cfg = load_cfg(DictDefault(given))
    if given.get("bf16", "auto") == "auto" and not cfg.bf16:
        LOG.warning(
            "`bf16: auto`, and this machine computes without bfloat16: values are stored for %s. A machine that "
            "trains in bfloat16 does not use them; compute them on one that has it, with `bf16: true`",
            "float16" if cfg.fp16 else "float32",
        )
    if why := why_unused(keys):
        LOG.warning("a run with this YAML will not use these values (%s): set `reference: precomputed`", why)
    if not torch.cuda.is_available():
        cfg.device_map = {"": "cpu"}  # Axolotl gives each of several processes an accelerator, also where there is none
    with explained(given, in_datasets):
        loaded = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
        datasets = loaded or load_preference_datasets(cfg=cfg)
    with explained(given, in_trainer):
        trainer = setup_model_and_trainer(cfg, datasets)[0]
    return dict(trainer.reference_record)


def why_unused(keys: Mapping[str, Any]) -> str:
    """Returns why a training run with these keys would not read the store, ``""`` if it would or may."""
    from axolotl_dpo_ext.settings import STORELESS

    parts = keys.get("dpo_ext")
    asked = parts.get("reference") if isinstance(parts, Mapping) else None
    strategy = asked.get("strategy", "auto") if isinstance(asked, Mapping) else asked
    if not strategy:
        return "no `dpo_ext.reference`"
    return f"reference: {strategy}" if strategy in STORELESS else ""


def _for_precomputing(keys: Mapping[str, Any]) -> dict[str, Any]:
    from axolotl_dpo_ext.axolotl_config import for_one_process

    given = keys.get("dpo_ext")
    asked = given.get("reference") if isinstance(given, Mapping) else None
    reference = {**(asked if isinstance(asked, Mapping) else {}), "strategy": "precomputed"}
    kept = for_one_process(keys, reference=reference)
    kept.pop("precompute_ref_log_probs", None)
    return kept
