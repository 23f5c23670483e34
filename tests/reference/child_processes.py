"""Processes of their own for tests: scripts that answer in JSON, forks that are killed, and rights that are given up."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def start(code: str, root: Path, *arguments: object) -> subprocess.Popen[str]:
    """Starts a script in the root of the repository, with a folder to work in as its first argument."""
    words = [sys.executable, "-c", code, str(root), *map(str, arguments)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def result(process: subprocess.Popen[str], timeout: float) -> Any:
    """What a script printed."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children too
        raise
    assert process.returncode == 0, errors
    return json.loads(output)


# For use in the scripts: forked children are quick to start, and the kill is the same.


def forked(task: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        finally:
            os._exit(status)
    return child


def killed(task: Callable[[int], object], enough: Callable[[bytes], bool], moment: float) -> tuple[bytes, bool]:
    """Kills a forked child once it has told enough, or up to a moment later.

    Returns what it told in all, and whether the kill was faster than its end. The task gets the descriptor to tell it to.
    """
    receive, send = os.pipe()
    child = forked(lambda: task(send))
    os.close(send)
    told = b""
    while not enough(told) and (more := os.read(receive, 1 << 16)):
        told += more
    time.sleep(random.choice((0, moment)) * random.random())
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while more := os.read(receive, 1 << 16):
        told += more
    os.close(receive)
    return told, os.WIFSIGNALED(status)


def give_up_rights(folder: Path) -> None:
    """Rights bind root only without its capabilities; the script stops if they don't bind it then either."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0
    try:
        (folder / "probe").touch()
    except PermissionError:
        return
    sys.exit("the folder can be written")
