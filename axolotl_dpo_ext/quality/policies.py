"""What happens to flagged pairs, and whether the settings and the checks fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from axolotl_dpo_ext.quality.base import Check
from axolotl_dpo_ext.settings import Policy
from axolotl_dpo_ext.vocabulary import Problem, RunStopped, unknown_name

if TYPE_CHECKING:
    from axolotl_dpo_ext.settings import QualitySettings

_POLICIES = get_args(Policy)


class CheckFailedError(RunStopped, RuntimeError):
    """A check raised, or did not return one score for each pair."""


def policy_of(check: Check, settings: QualitySettings) -> Policy:
    """Returns what happens to pairs that a check flags: the user's policy, else the check's own."""
    return settings.policy.get(check.name, check.default_policy)


def threshold_of(check: Check, settings: QualitySettings) -> float:
    """Returns the score above which a check flags a pair.

    Raises:
        CheckFailedError: The check raised, or named no finite number.
    """
    try:
        threshold = float(check.threshold(settings))
        if not math.isfinite(threshold):
            raise ValueError(f"{threshold} is no threshold")
    except Exception as error:
        raise CheckFailedError(failure(check, "its threshold", error)) from error
    return threshold


def failure(check: Check, where: str, error: Exception) -> str:
    """Returns the message of a check that failed."""
    return (
        f"quality check {check.name!r} of {type(check).__module__} failed on {where}: {type(error).__name__}: {error}\n"
        f"    fix: mend or uninstall it, or leave it out with `policy: {{{check.name}: keep}}`"
    )


def check_policies(settings: QualitySettings, checks: Sequence[Check]) -> list[Problem]:
    """Returns a problem for every policy of an unknown check, and for checks that cannot be used."""
    names = [check.name for check in checks]
    problems = [
        unknown_name(f"dpo_ext.quality.policy.{name}", name, names, "check")
        for name in settings.policy
        if name not in names
    ]
    problems += named_twice(names, "check")
    return problems + [_bad_policy(check) for check in checks if check.default_policy not in _POLICIES]


def check_serving(settings: QualitySettings, checks: Sequence[Check], serving: Sequence[Check]) -> list[Problem]:
    """Returns a problem for every policy that asks for a check which cannot see this kind of data."""
    idle = {check.name for check in checks} - {check.name for check in serving}
    return [
        Problem(
            setting=f"dpo_ext.quality.policy.{name}",
            found=f"{name}: {policy}, with unpaired data",
            reason="the check compares a chosen with a rejected answer, and these rows have one answer each",
            fix=f"remove it; for unpaired data there are {', '.join(check.name for check in serving)}",
        )
        for name, policy in settings.policy.items()
        if name in idle and policy != "keep"
    ]


def named_twice(names: Sequence[str], kind: str) -> list[Problem]:
    """Returns a problem for every name that two things have."""
    return [
        Problem(
            setting="dpo_ext.quality",
            found=f"two {kind}s named {name!r}",
            reason=f"settings name a {kind}, so each name must be used once",
            fix="uninstall or rename one of them",
        )
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]


def _bad_policy(check: Check) -> Problem:
    return Problem(
        setting=f"dpo_ext.quality.policy.{check.name}",
        found=f"default policy {check.default_policy!r} of {type(check).__qualname__}",
        reason=f"a policy is one of {', '.join(_POLICIES)}",
        fix="correct the check's `default_policy`",
    )
