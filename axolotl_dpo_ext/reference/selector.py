"""Finds the strategy that ``reference:`` names, and the one that ``auto`` stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_dpo_ext.reference.estimates import CANDIDATES, Estimate, estimate, usable_bytes
from axolotl_dpo_ext.reference.losses import SERVED
from axolotl_dpo_ext.reference.situation import Situation
from axolotl_dpo_ext.reference.strategies import ReferenceStrategy
from axolotl_dpo_ext.vocabulary import ConfigurationError, Decision, Problem, unknown_name

AUTO = "auto"

# Axolotl keys beside which TRL takes no log-probabilities from its batches; `compatibility.py` refuses what asks for
# both, and `auto` is not to choose what is refused.
_TAKES_NONE = ("precompute_ref_log_probs", "dpo_use_liger_kernel", "streaming", "processor_type", "is_multimodal")


def choose_strategy(
    name: str, config: Mapping[str, Any], strategies: Mapping[str, ReferenceStrategy]
) -> tuple[ReferenceStrategy, Decision]:
    """Finds the strategy for a run.

    Args:
        name: A strategy's name or ``auto``.
        config: The run's Axolotl keys, as in its YAML.
        strategies: The registered strategies by name.

    Returns:
        The strategy, and the decision with its reason for the log and the report: for ``auto`` in two lines, the
        second with the figures of each candidate.

    Raises:
        ConfigurationError: The name is unknown, or the strategy cannot serve.
    """
    if name != AUTO and name not in strategies:
        raise ConfigurationError([unknown_name("dpo_ext.reference", name, [AUTO, *strategies], "strategy")])
    decision = _automatic(config, strategies) if name == AUTO else Decision("reference", name, "set in the YAML")
    strategy = strategies[decision.choice]
    problems = strategy.problems(config)
    if not isinstance(problems, list) or not all(isinstance(problem, Problem) for problem in problems):
        raise TypeError(f"the strategy {strategy.name!r} returned {problems!r}, not a list of problems")
    if problems:
        raise ConfigurationError(problems)
    return strategy, Decision("reference", strategy.name, f"{strategy.summary}; {decision.reason}")


def _automatic(config: Mapping[str, Any], strategies: Mapping[str, ReferenceStrategy]) -> Decision:
    situation = Situation.of(config)
    figures = estimate(situation)
    obstacles = _obstacles(config, situation, strategies)
    if config.get("rl_adapter_ref_model"):
        choice, why = "gpu", "rl_adapter_ref_model asks for a second copy"
    else:
        choice, why = _by_rule(situation, figures, obstacles)
    return Decision("reference", choice, f"auto: {why}\n{_figures_text(situation, figures, obstacles)}")


def _by_rule(situation: Situation, figures: Mapping[str, Estimate], obstacles: Mapping[str, str]) -> tuple[str, str]:
    """Returns the first candidate of the rule that applies, and why."""
    if situation.fresh_adapter and "adapter" not in obstacles:
        return "adapter", f"adapter: {situation.adapter} is fresh, so switching it off is exact and costs no memory"
    reuse = _reuse(situation)
    if reuse and "precomputed" not in obstacles:
        return "precomputed", reuse
    if situation.adapter_copy and "adapter" not in obstacles:
        return "adapter", "a frozen copy of the continued adapter is the whole reference, and costs no second model"
    return _by_memory(situation, figures, obstacles)


def _by_memory(situation: Situation, figures: Mapping[str, Estimate], obstacles: Mapping[str, str]) -> tuple[str, str]:
    """Returns the candidate for values that are used once: by what fits, and by whether streaming hides."""
    if "gpu" in obstacles:
        why_not = f"a second copy cannot serve ({obstacles['gpu']})"
    elif not figures:
        return "gpu", "each log-probability is used once, and without figures nothing speaks against a second copy"
    else:
        compared = f"{_need(figures['gpu'])} of {_size(usable_bytes(situation))}"
        if figures["gpu"].fits:
            return "gpu", f"each log-probability is used once, and a second copy fits: {compared}"
        why_not = f"a second copy does not fit: {compared}"
    streamed = figures.get("cpu_offload")
    if streamed and "cpu_offload" not in obstacles and streamed.fits and _hides(situation, streamed):
        return "cpu_offload", f"{why_not}, and streaming it hides behind a step of {situation.step_tokens:,} tokens"
    if "precomputed" in obstacles:
        return "gpu", f"{why_not}, but no other strategy can serve either ({obstacles['precomputed']})"
    why_not += f", and {_why_not_streamed(situation, streamed, obstacles)}"
    if not situation.sharding.whole_at_start:
        why_not += "; run `axolotl dpo-precompute` first, as the weights are sharded from the start"
    return "precomputed", why_not


def _reuse(situation: Situation) -> str:
    """Returns why values would be used more than once, ``""`` where they would not or cannot be computed here."""
    if situation.stored_rows:
        return (
            f"the store holds log-probabilities of {situation.stored_rows:,} answers under these weights, and those of "
            f"this run among them need no computing"
        )
    if situation.epochs > 1 and situation.sharding.whole_at_start:
        return f"each log-probability is used in {situation.epochs:g} epochs, and computed once"
    return ""


def _hides(situation: Situation, streamed: Estimate) -> bool:
    return streamed.hiding_tokens is not None and streamed.hiding_tokens <= situation.step_tokens


def _why_not_streamed(situation: Situation, streamed: Estimate | None, obstacles: Mapping[str, str]) -> str:
    if streamed is None:
        return "without figures nobody knows whether streaming it would hide"
    if "cpu_offload" in obstacles:
        return f"cpu_offload cannot serve ({obstacles['cpu_offload']})"
    if not streamed.fits:
        return f"neither does a streamed one: {_need(streamed)} on the device and the weights in host memory"
    return f"streaming it would not hide: a step has {situation.step_tokens:,} of {streamed.hiding_tokens:,} tokens"


def _obstacles(
    config: Mapping[str, Any], situation: Situation, strategies: Mapping[str, ReferenceStrategy]
) -> dict[str, str]:
    """Says of each candidate that cannot serve why not."""
    found: dict[str, str] = {}
    for name in CANDIDATES:
        strategy = strategies.get(name)
        if strategy is None:
            found[name] = "not registered"
            continue
        problems = strategy.problems(config)
        obstacle = problems[0].found if problems else _obstacle(config, situation, strategy)
        if obstacle:
            found[name] = obstacle.removeprefix(f"{name}, ")
    return found


def _obstacle(config: Mapping[str, Any], situation: Situation, strategy: ReferenceStrategy) -> str:
    continued = bool(situation.adapter and not situation.fresh_adapter)
    if strategy.name == "adapter" and continued and not situation.adapter_copy:
        return "the adapter is not fresh"
    if strategy.name == "gpu" and (situation.adapter_copy or (continued and config.get("lora_model_dir"))):
        return "a copy of the base model lacks the continued adapter"
    if not strategy.hands_over:
        return ""
    if strategy.name == "cpu_offload" and not situation.sharding.whole_at_start:
        return "the weights are sharded from the start"
    return _takes_none(config, situation)


def _takes_none(config: Mapping[str, Any], situation: Situation) -> str:
    """Returns why TRL would not take log-probabilities from its batches, ``""`` if it would."""
    unknown = [loss for loss in situation.losses if loss not in SERVED]
    if unknown:
        return f"the loss {', '.join(unknown)} needs more than sums"
    nested = config.get("trl")
    if isinstance(nested, Mapping) and nested.get("sync_ref_model"):
        return "with trl.sync_ref_model: true"
    given = next((key for key in _TAKES_NONE if config.get(key)), None)
    return f"with {given}: {str(config[given]).lower()}" if given else ""


def _figures_text(situation: Situation, figures: Mapping[str, Estimate], obstacles: Mapping[str, str]) -> str:
    if not figures:
        model = situation.base_model or "base_model"
        return f"no figures: the weights of {model} are not on this machine, or not readable, so nothing tells its size"
    listed = [_candidate_text(name, figures[name], obstacles.get(name)) for name in CANDIDATES]
    device = situation.device.name or "the processor"
    if situation.sharding.devices > 1:
        device = f"each of {situation.sharding.devices} × {device}"
    return (
        f"{'; '.join(listed)} (up to {situation.step_tokens:,} tokens a step and device, "
        f"{_size(usable_bytes(situation))} usable on {device}, nominal rates)"
    )


def _candidate_text(name: str, figure: Estimate, obstacle: str | None) -> str:
    if obstacle:
        return f"{name} - ({obstacle})"
    remarks = [] if figure.fits else ["does not fit"]
    if figure.hiding_tokens:
        remarks.append(f"hides from {figure.hiding_tokens:,} tokens")
    remark = f" ({', '.join(remarks)})" if remarks else ""
    return f"{name} {_need(figure)}, {figure.seconds_per_step:.2g} s/step{remark}"


def _need(figure: Estimate) -> str:
    return _size(figure.bytes_per_device)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
