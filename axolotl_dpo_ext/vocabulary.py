"""The few words that rooms use to talk to each other: problems, decisions, report sections.

Rooms never import one another. What one room says (a problem found, a decision taken, a page for the
run report) is built from these plain dataclasses; the plugin and the command line pass them on.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
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
class Histogram:
    """How many rows have a value in each bin, in a report section.

    Attributes:
        title: Shown above the histogram.
        edges: Edges of the ``k`` bins, length ``k + 1``, ascending, in the unit of ``x_label``.
        counts: Rows in each bin, length ``k``, by the name of the set they are of: one set, or two of which the
            second is what is left of the first, such as ``all pairs`` and ``kept``.
        x_label: Name and unit of the values.
        y_label: What is counted.
        marker: A value to mark with a vertical line, such as a threshold, or ``None``.
        marker_label: What the line stands for.
        log_x: Whether the horizontal axis is logarithmic, for values whose few largest are many times the rest.

    Raises:
        ValueError: If there are not one or two sets, edges and counts do not fit one another, or a number is one
            that cannot be drawn.
    """

    title: str
    edges: Sequence[float]
    counts: Mapping[str, Sequence[int]]
    x_label: str = "score"
    y_label: str = "pairs"
    marker: float | None = None
    marker_label: str = "threshold"
    log_x: bool = False

    def __post_init__(self) -> None:
        if fault := self._sets_fault() or self._axis_fault():
            raise ValueError(f"histogram {self.title!r} cannot be drawn: {fault}")

    def _sets_fault(self) -> str:
        if len(self.counts) not in (1, 2):
            return f"it has {len(self.counts)} sets of counts; give one, or two that lie over one another"
        for name, counts in self.counts.items():
            if len(counts) != len(self.edges) - 1 or not len(counts):
                return f"{len(counts)} counts of {name!r} for {len(self.edges)} edges; k bins have k + 1 edges"
            if not all(0 <= count < math.inf for count in counts):
                return f"a count of {name!r} is negative or not finite; count the rows in each bin"
        return ""

    def _axis_fault(self) -> str:
        shown = [*self.edges, *(() if self.marker is None else (self.marker,))]
        if not all(abs(float(value)) < 1e300 for value in shown):  # below the largest float: widths are finite too
            return "an edge or the marker is not finite; leave values that are not out of the bins"
        if not all(low < high for low, high in pairwise(self.edges)):
            return "its edges do not ascend; sort them and leave out repeated ones"
        if self.log_x and min(shown) <= 0:
            return f"a logarithmic axis has no place for {min(shown):g}; use positive values or log_x=False"
        return ""


@dataclass(frozen=True)
class Example:
    """One row, shown so that a reader can judge it.

    Attributes:
        title: Which row, and why it is shown, such as ``row 17 of a.jsonl, 7.3 > 2``.
        prompt: An excerpt of the prompt, or ``""``.
        answers: ``(name, excerpt)`` pairs such as ``("chosen", "Yes.")``, shown side by side.
    """

    title: str
    prompt: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class ExampleGroup:
    """Examples of one thing, folded away under a title such as ``length_ratio: 3 of 120 flagged pairs``."""

    title: str
    examples: Sequence[Example]


@dataclass(frozen=True)
class Section:
    """What one room has to say in the run report, in the order in which it is shown.

    Attributes:
        title: Heading, such as ``Data``.
        summary: One or two sentences for somebody who reads nothing else.
        facts: ``(name, value)`` pairs.
        tables: Tables.
        charts: Charts.
        histograms: Histograms.
        examples: Groups of example rows.
        notes: Diagnoses and advice, one sentence each.
        data: The section's figures for the JSON beside the page; must be JSON-serialisable.
    """

    title: str
    summary: str = ""
    facts: Sequence[tuple[str, Any]] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    histograms: Sequence[Histogram] = ()
    examples: Sequence[ExampleGroup] = ()
    notes: Sequence[str] = ()
    data: dict[str, Any] = field(default_factory=dict)
