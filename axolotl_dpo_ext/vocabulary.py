"""The few words that rooms use to talk to each other: problems, decisions, report sections.

Rooms never import one another. What one room says (a problem found, a decision taken, a page for the
run report) is built from these plain dataclasses; the plugin and the command line pass them on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Something in a configuration that cannot work, or that will not do what it seems to say.

    Attributes:
        setting: Dotted name of the key it is about, such as ``dpo_ext.quality.holdout``.
        found: What was set or found, such as ``holdout: 1.5``.
        reason: Why that cannot work. One sentence, no full stop needed.
        fix: What to change. One sentence, imperative.
        fatal: Whether the run must stop. ``False`` is advice.
    """

    setting: str
    found: str
    reason: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        """Returns the problem as it is shown in an error: what was set, why not, what to change."""
        return f"{self.setting}: {self.found}\n    why: {self.reason}\n    fix: {self.fix}"


def unknown_name(setting: str, name: str, known: Iterable[str], kind: str) -> Problem:
    """Returns the problem of a name that nothing has, with the nearest name that something has.

    Args:
        setting: The key under which the name stands.
        name: The name.
        known: The names there are.
        kind: What it should name, such as ``check``.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return Problem(
        setting=setting,
        found=repr(name),
        reason=f"there is no {kind} of that name",
        fix=f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(names) or '(none registered)'}",
    )


def misspelt_key(config: Mapping[str, Any]) -> Problem | None:
    """Returns the problem of a top-level key that was surely meant to be ``dpo_ext``, ``None`` where there is none."""
    near = difflib.get_close_matches("dpo_ext", [key for key in config if isinstance(key, str)], n=1, cutoff=0.8)
    if not near or "dpo_ext" in config:
        return None
    return Problem(
        setting=near[0],
        found=f"a top-level key {near[0]!r}",
        reason="neither Axolotl nor this pack has such a key, so nothing under it would have an effect",
        fix="write `dpo_ext:`, or remove the key",
    )


class RunStopped(Exception):  # noqa: N818 - what happened, not what went wrong in the program
    """Ends a run on purpose. The message says all there is to say, so it is shown without a traceback."""


class ConfigurationError(RunStopped, ValueError):
    """Every fatal problem of a configuration, in one error.

    Attributes:
        problems: The problems, in the order in which they were found.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        listed = "\n".join(f"{i}. {problem}" for i, problem in enumerate(self.problems, 1))
        super().__init__(f"{len(self.problems)} {noun} in the configuration\n{listed}")


@dataclass(frozen=True)
class Decision:
    """A choice the pack made for the user, with its reason and the figures behind it.

    Attributes:
        about: What was decided, such as ``reference``.
        choice: What was chosen, such as ``adapter``.
        reason: Why, with the figures used.
    """

    about: str
    choice: str
    reason: str


@dataclass(frozen=True)
class Table:
    """A table of a report section. Cells are shown with ``str``; numbers are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True)
class Series:
    """One line of a chart: points ``(x, y)`` in the units of the chart's axes."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A line chart of a report section.

    Attributes:
        title: Shown above the chart.
        series: One or more lines; each keeps its colour in every chart of the report.
        x_label: Name and unit of the horizontal axis.
        y_label: Name and unit of the vertical axis.
        baseline: A horizontal reference line, such as 0.5 for accuracy, or ``None``.
    """

    title: str
    series: Sequence[Series]
    x_label: str = "step"
    y_label: str = ""
    baseline: float | None = None


@dataclass(frozen=True)
class Section:
    """What one room has to say in the run report, in the order in which it is shown.

    Attributes:
        title: Heading, such as ``Data``.
        summary: One or two sentences for somebody who reads nothing else.
        facts: ``(name, value)`` pairs.
        tables: Tables.
        charts: Charts.
        notes: Diagnoses and advice, one sentence each.
        data: The section's figures for the JSON beside the page; must be JSON-serialisable.
    """

    title: str
    summary: str = ""
    facts: Sequence[tuple[str, Any]] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()
    data: dict[str, Any] = field(default_factory=dict)
