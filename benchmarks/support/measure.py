"""Timing of two sides in turns, and the line that says the result."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def say(text: str) -> None:
    """Prints progress, which goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def report(result: Mapping[str, Any]) -> None:
    """Prints a result as the last line of stdout: one JSON object."""
    print(json.dumps(rounded(result)), flush=True)


def rounded(value: Any) -> Any:
    """Returns a value with its floats cut to five digits that count."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def seconds_of(function: Callable[[], Any]) -> tuple[float, Any]:
    """Runs a function; returns how long it took, and what it returned."""
    began = time.perf_counter()
    value = function()
    return time.perf_counter() - began, value


@dataclass(frozen=True)
class Taken:
    """What one of several functions took.

    Attributes:
        seconds: Median of the time on the clock.
        cpu_seconds: Median of the processor's time, which a busy machine changes less.
        value: What it returned last.
    """

    seconds: float
    cpu_seconds: float
    value: Any


def in_turns(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Taken]:
    """Times functions in turns, so that a machine that gets slower or busier does so for all of them.

    Args:
        functions: What to run, by name.
        repeats: How often each is run.
    """
    taken: dict[str, list[Taken]] = {name: [] for name in functions}
    for repeat in range(repeats):
        for name, function in functions.items():
            began = time.process_time()
            seconds, value = seconds_of(function)
            taken[name].append(Taken(seconds, time.process_time() - began, value))
            say(f"  {name}: {seconds:.2f} s ({repeat + 1} of {repeats})")
    return {name: _median(runs) for name, runs in taken.items()}


def _median(runs: list[Taken]) -> Taken:
    seconds, cpu_seconds = ([getattr(run, name) for run in runs] for name in ("seconds", "cpu_seconds"))
    return Taken(statistics.median(seconds), statistics.median(cpu_seconds), runs[-1].value)
