"""Gives modules another forward for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def replaced_forwards(replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Gives modules another forward for a while; hooks and whatever else surrounds it stay.

    Args:
        replacements: Modules with what is called in place of their forward. A module may have a forward of its own
            already, such as accelerate's on a model that it spreads over devices: it has it again afterwards.
    """
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in replacements:
            before.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                del module.forward
            else:
                module.forward = own
