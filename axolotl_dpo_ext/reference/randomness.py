"""Keeps what a strategy does out of the random numbers that training draws."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the random states of Python, NumPy and PyTorch (all devices) at the end.

    So a run whose reference was stored and one that computed it see the same rows in the same order (trl#7083).
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
