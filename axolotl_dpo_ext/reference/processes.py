"""The processes of a distributed run, as far as this room needs to know of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from axolotl_dpo_ext.vocabulary import RunStopped


class Processes:
    """The processes that ``accelerate`` started, or the one there is.

    Attributes:
        rank: This process's number.
        count: How many there are.
    """

    def __init__(self) -> None:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # Without being told, it takes processes on CPUs for one alone, and whoever asks later as well.
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        self.rank: int = state.process_index
        self.count: int = state.num_processes

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, in the order of their ranks, once every process has called it."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets the first process go before the others, which find what it left."""
        if self.rank:
            self.gather(None)
        try:
            yield
        finally:
            if not self.rank:
                self.gather(None)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Lets no process wait for one that failed: an error in one is raised in all.

        Raises:
            RunStopped: In a process that did not fail itself, with the message of one that did.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = {rank: message for rank, message in enumerate(messages) if message is not None}
        for rank, message in failed.items():
            raise RunStopped(f"process {rank} of {self.count} failed: {message}")
