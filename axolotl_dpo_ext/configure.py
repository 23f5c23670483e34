"""Reads a whole run configuration at once: settings, presets, strategies and every problem together.

Both the Axolotl plugin and ``dpo-doctor`` ask here, so that what the doctor says is what a run will do.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.version import Version

from axolotl_dpo_ext import compatibility, hardware, quality, reference
from axolotl_dpo_ext.plugins import Extensions
from axolotl_dpo_ext.reference import ReferenceStrategy
from axolotl_dpo_ext.settings import DPOExtSettings, QualitySettings, ReferenceSettings, read_settings
from axolotl_dpo_ext.vocabulary import ConfigurationError, Decision, Problem

LOG = logging.getLogger(__name__)

DEFAULT_HOLDOUT = 0.1


@dataclass
class Configuration:
    """What a run's configuration comes to.

    Attributes:
        settings: What stands under ``dpo_ext:``, with defaults.
        axolotl_keys: Axolotl keys to set for it (from a preset, a strategy or the held-out split).
        decisions: What was chosen, with reasons.
        problems: Fatal problems and advice.
        holdout: Size of the held-out split, a fraction below 1 or a number of pairs; 0 for none.
        strategy: The reference strategy, where one was asked for and can serve.
    """

    settings: DPOExtSettings
    axolotl_keys: dict[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    holdout: float = 0.0
    strategy: ReferenceStrategy | None = None

    @property
    def errors(self) -> list[Problem]:
        """The problems that must stop the run."""
        return [problem for problem in self.problems if problem.fatal]

    @property
    def advice(self) -> list[Problem]:
        """The problems that need not stop the run."""
        return [problem for problem in self.problems if not problem.fatal]

    def banner(self) -> str:
        """Returns the parts that are active, in one line."""
        settings = self.settings
        parts = [f"{decision.about}={decision.choice}" for decision in self.decisions]
        if settings.quality:
            parts.append(f"quality (held-out {self.holdout:g})" if self.holdout else "quality")
        if settings.report.enabled:
            parts.append("report")
        return ", ".join(parts) or "nothing (every part is turned off)"


def configure(
    config: Mapping[str, Any], versions: Mapping[str, Version | None], registered: Extensions
) -> Configuration:
    """Reads the ``dpo_ext:`` key of a run together with the Axolotl keys around it.

    Args:
        config: The run's Axolotl keys, as in its YAML with command-line overrides; not changed.
        versions: Installed versions by package name.
        registered: Strategies, checks, embedders and presets by name.

    Returns:
        Settings, keys to set, decisions and all problems. Nothing is raised: the caller decides.
    """
    settings, problems = read_settings(config.get("dpo_ext"))
    result = Configuration(settings=settings, problems=problems)
    if settings.hardware is not None:
        with _collecting(problems, "dpo_ext.hardware"):
            keys, decision = hardware.expand_preset(settings.hardware, config, registered.hardware_presets)
            result.axolotl_keys.update(keys)
            result.decisions.append(decision)
    merged = {**config, **result.axolotl_keys}
    if settings.reference is not None and config.get("rl") in compatibility.REFERENCE_RL:
        with _collecting(problems, "dpo_ext.reference"):
            strategy, decision = reference.choose_strategy(
                settings.reference.strategy, merged, registered.reference_strategies
            )
            result.axolotl_keys.update(strategy.axolotl_keys(merged))
            result.decisions.append(decision)
            result.strategy = strategy
            problems += _store_problems(settings.reference, strategy.name)
    handing_over = result.strategy.name if result.strategy and result.strategy.hands_over else None
    problems += compatibility.find_problems(compatibility.Run(merged, settings, versions, handing_over))
    if settings.quality is not None:
        _add_quality(result, settings.quality, merged, registered)
    return result


def _store_problems(settings: ReferenceSettings, strategy: str) -> list[Problem]:
    """Looks where the store is to be, if the run reads one: before a model is loaded."""
    looks_there = strategy == "precomputed" or (settings.strategy == "auto" and settings.store is not None)
    if not looks_there:
        return []
    from axolotl_dpo_ext.reference.store import root_problem

    problem = root_problem(settings.store)
    return [problem] if problem else []


def _add_quality(
    result: Configuration, settings: QualitySettings, config: Mapping[str, Any], registered: Extensions
) -> None:
    result.holdout = _holdout(settings, config)
    result.problems += quality.settings_problems(
        settings, list(registered.pair_checks.values()), list(registered.embedders.values()), result.holdout
    )
    if not result.holdout:
        return
    # Axolotl turns evaluation off without it; the plugin makes the split itself, by prompt.
    result.axolotl_keys["val_set_size"] = result.holdout
    if not evaluates(config):
        result.axolotl_keys["eval_strategy"] = "epoch"
        reason = (
            "there are held-out pairs, and neither eval_steps, evals_per_epoch nor eval_strategy says when to use them"
        )
        result.decisions.append(Decision("evaluation", "every epoch", reason))


def evaluates(config: Mapping[str, Any]) -> bool:
    """Whether Axolotl keys say when to evaluate, be it never."""
    return any(config.get(key) is not None for key in ("eval_steps", "evals_per_epoch", "eval_strategy"))


@contextlib.contextmanager
def _collecting(problems: list[Problem], setting: str) -> Iterator[None]:
    """Adds what is raised to a list of problems and goes on: also what a third party's code raises."""
    try:
        yield
    except ConfigurationError as error:
        problems.extend(error.problems)
    except (Exception, SystemExit) as error:  # a third party must not end the run in silence either
        LOG.debug("%s failed", setting, exc_info=True)
        problems.append(
            Problem(
                setting=setting,
                found=f"{type(error).__name__}: {error}",
                reason=f"the code behind it failed ({_where(error)})",
                fix="report it to its authors, and choose another in the meantime",
            )
        )


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "no traceback"


def _holdout(settings: QualitySettings, config: Mapping[str, Any]) -> float:
    if settings.holdout is not None:
        return settings.holdout
    if config.get("test_datasets"):
        return 0.0
    val_set_size = config.get("val_set_size")
    # Anything else than a number is a problem that `compatibility` tells.
    return float(val_set_size) if compatibility.is_size(val_set_size) else DEFAULT_HOLDOUT
