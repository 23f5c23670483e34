"""How time and memory of an audit grow with the number of pairs, each size in a process of its own. Linux only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from support.audit_texts import COLUMNS, as_rows, copies, outcome, run_audit
from support.inputs import Pair
from support.measure import say, seconds_of

SIZES = (10_000, 100_000, 1_000_000)
MEMORY_BAR_GIB = 2.0
# Answers are cut, so that a million pairs fit a disk and an hour.
WORDS = 40
ROWS_AT_ONCE = 10_000
SCRIPT = Path(__file__).parents[1] / "audit_throughput.py"


def measure(pairs: Sequence[Pair], sizes: Sequence[int], folder: Path, threads: int, scratch: Path) -> dict[str, Any]:
    """Measures every size on copies of the pairs with changed words.

    Args:
        pairs: Pairs to begin with.
        sizes: Numbers of pairs.
        folder: The tokenizer's.
        threads: Processor cores.
        scratch: Where the pairs are written.
    """
    found = [_measure_size(pairs, size, folder, threads, scratch) for size in sorted(sizes)]
    return {
        "sizes": found,
        "memory_bar_gib": MEMORY_BAR_GIB,
        "seconds_per_1000_largest_to_smallest": found[-1]["seconds_per_1000"] / found[0]["seconds_per_1000"],
    }


def _measure_size(pairs: Sequence[Pair], size: int, folder: Path, threads: int, scratch: Path) -> dict[str, Any]:
    data = scratch / f"{size}.arrow"
    write_rows(data, pairs, size)
    command = [sys.executable, SCRIPT, "--one-pass", data, "--model", folder, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    arrow_gib = data.stat().st_size / 2**30
    data.unlink()
    if done.returncode:
        raise SystemExit(done.stderr)
    one = {**json.loads(done.stdout.splitlines()[-1]), "arrow_gib": arrow_gib}
    assert one["pairs"] == size
    say(f"{size:,} pairs: {one}")
    return one


def write_rows(path: Path, pairs: Sequence[Pair], count: int) -> None:
    """Writes pairs as three columns of text, a part at a time."""
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    left = islice(copies(pairs, WORDS), count)
    with ArrowWriter(path=str(path)) as writer:
        while part := list(islice(left, ROWS_AT_ONCE)):
            _, texts = as_rows(part)
            writer.write_table(pa.table({name: pa.array(texts[name]) for name in COLUMNS}))
        writer.finalize()


def one_pass(data: Path, tokenizer: Any) -> dict[str, Any]:
    """Audits a file of Arrow; runs in a process of its own, whose memory is then the audit's."""
    from datasets import Dataset
    from reference_scaling import PeakMemory

    dataset = Dataset.from_file(str(data))
    before = _peak_gib()
    with PeakMemory() as memory:
        seconds, audited = seconds_of(lambda: run_audit(dataset, tokenizer))
    return {
        "pairs": len(dataset),
        **outcome(audited),
        "seconds": seconds,
        "seconds_per_1000": seconds / len(dataset) * 1000,
        "peak_gib": _peak_gib(),
        "peak_gib_before_audit": before,
        "own_growth_gib": memory.growth / 2**30,  # without the pages of the mapped file, which the kernel can take back
    }


def _peak_gib() -> float:
    """Returns the process's largest resident memory so far, with the pages of the mapped Arrow file.

    Not `getrusage`, which begins with what the parent had.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise SystemExit("/proc/self/status has no VmHWM: --scaling needs Linux")


def print_table(scaling: dict[str, Any]) -> None:
    """Prints one line for each size."""
    print(
        f"{'pairs':>10} {'seconds':>8} {'s per 1,000':>12} {'peak GiB':>9} {'of it before':>13} {'own growth':>11} "
        f"{'Arrow GiB':>10}"
    )
    for one in scaling["sizes"]:
        print(
            f"{one['pairs']:>10,} {one['seconds']:>8.1f} {one['seconds_per_1000']:>12.3f} {one['peak_gib']:>9.2f} "
            f"{one['peak_gib_before_audit']:>13.2f} {one['own_growth_gib']:>11.2f} {one['arrow_gib']:>10.2f}"
        )
