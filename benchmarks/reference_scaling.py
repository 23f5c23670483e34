"""How the cost of everything but the model grows with the number of rows: keys, planning, batches, store.

    python benchmarks/reference_scaling.py [--largest 1000000]

The model is a stand-in that returns at once. Each size is computed in a process of its own into a new store, and read
again in another process from the complete store, on random token ids on the disk (prompts of about 40 tokens, answers
of about 30). Memory is the process's own (RssAnon): not the dataset's pages, which the kernel gives back when it needs
them. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from support import inputs  # noqa: F401 - it keeps Hugging Face's libraries off the network
from support.measure import report, say, seconds_of

SMALLEST = 1_000
PROMPT_TOKENS, ANSWER_TOKENS = 40, 30
VOCABULARY = 32_000
ROWS_AT_ONCE = 50_000
TOKEN_BUDGET = 8_192
SAMPLING_SECONDS = 0.01


def write_rows(path: Path, rows: int) -> Path:
    """Writes a dataset of random token ids, a part at a time."""
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    generator = np.random.default_rng(0)
    with ArrowWriter(path=str(path)) as writer:
        for start in range(0, rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, rows - start)
            means = {"prompt_ids": PROMPT_TOKENS, "chosen_ids": ANSWER_TOKENS, "rejected_ids": ANSWER_TOKENS}
            writer.write_table(pa.table({name: _lists(generator, count, mean) for name, mean in means.items()}))
        writer.finalize()
    return path


def _lists(generator: np.random.Generator, count: int, mean: int) -> Any:
    import pyarrow as pa

    ends = np.cumsum(generator.integers(mean // 2, mean * 3 // 2 + 1, count))
    ids = generator.integers(0, VOCABULARY, ends[-1])
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), pa.array(ids))


class InstantScorer:
    """Takes the model's place: every token has log-probability -1."""

    def token_log_probs(self, rows: Sequence[Any], share_prompts: bool) -> np.ndarray:
        """Returns as many values as the rows' answers have tokens."""
        return np.full(sum(answer.tokens for row in rows for answer in row.answers), -1.0)


class PeakMemory:
    """Watches the process's own memory while a ``with`` block runs.

    Attributes:
        growth: Largest size less the size at the beginning, in bytes.
    """

    def __enter__(self) -> PeakMemory:
        self._done = threading.Event()
        self._before = self._peak = own_memory()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth = max(self._peak, own_memory()) - self._before

    def _watch(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            self._peak = max(self._peak, own_memory())


def own_memory() -> int:
    """Returns the bytes of memory that is not a file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux")


def one_pass(data: Path, store: Path) -> dict[str, float]:
    """Computes the rows of a dataset that a store lacks; runs in a process of its own."""
    from datasets import Dataset

    from axolotl_dpo_ext.reference.precompute import Batching, reference_log_probs
    from axolotl_dpo_ext.reference.processes import Processes
    from axolotl_dpo_ext.reference.rows import LogProbDefinition
    from axolotl_dpo_ext.reference.store import ReferenceStore

    dataset = Dataset.from_file(str(data))
    processes = Processes()

    def run() -> Any:
        return reference_log_probs(
            dataset,
            LogProbDefinition(1024),
            ReferenceStore(store, {"benchmark": "reference_scaling"}),
            lambda answers: (InstantScorer(), Batching(share_prompts=True, budget=TOKEN_BUDGET)),
            processes,
        )

    with PeakMemory() as memory:
        seconds, found = seconds_of(run)
    assert np.isfinite(found.chosen).all()
    assert np.isfinite(found.rejected).all()
    return {"seconds": seconds, "computed": found.computed, "memory_growth": memory.growth}


def in_a_process(data: Path, store: Path) -> dict[str, float]:
    """Runs ``one_pass`` in a new process."""
    command = [sys.executable, __file__, "--one-pass", str(data), str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(rows: int) -> dict[str, Any]:
    """Measures one size: with nothing stored, then with everything."""
    with tempfile.TemporaryDirectory() as scratch:
        data = write_rows(Path(scratch) / "rows.arrow", rows)
        first, again = (in_a_process(data, Path(scratch) / "store") for _ in range(2))
    assert first["computed"] == 2 * rows, "every answer is new"
    assert again["computed"] == 0, "every answer is stored"
    found: dict[str, Any] = {"rows": rows}
    for name, one in (("first", first), ("complete", again)):
        found[name] = {
            "seconds": one["seconds"],
            "us_per_row": one["seconds"] / rows * 1e6,
            "memory_mb": one["memory_growth"] / 1e6,
        }
        say(f"{rows:,} rows, {name}: {found[name]}")
    return found


def growth(sizes: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Returns how a pass's cost grows from the smallest and the second largest size to the largest."""
    small, large = sizes[0], sizes[-1]
    middle = sizes[-2] if len(sizes) > 1 else small
    rows = max(large["rows"] - middle["rows"], 1)
    return {
        "us_per_row_largest_to_smallest": large[name]["us_per_row"] / small[name]["us_per_row"],
        "us_per_row_largest_to_next": large[name]["us_per_row"] / middle[name]["us_per_row"],
        "memory_bytes_per_further_row": (large[name]["memory_mb"] - middle[name]["memory_mb"]) * 1e6 / rows,
    }


def print_table(sizes: list[dict[str, Any]]) -> None:
    """Prints one line for each size."""
    print(f"{'rows':>10} {'first µs/row':>13} {'memory MB':>10} {'complete µs/row':>16} {'memory MB':>10}")
    for one in sizes:
        first, again = one["first"], one["complete"]
        print(
            f"{one['rows']:>10,} {first['us_per_row']:>13.1f} {first['memory_mb']:>10.0f} "
            f"{again['us_per_row']:>16.1f} {again['memory_mb']:>10.0f}"
        )


def main() -> None:
    """Measures the sizes from 1,000 to the largest, or one pass of one size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=1_000_000, help="most rows (default: %(default)s)")
    parser.add_argument("--one-pass", nargs=2, type=Path, metavar=("DATA", "STORE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one_pass:
        report(one_pass(*asked.one_pass))
        return
    sizes = [SMALLEST * 10**power for power in range(9) if SMALLEST * 10**power < asked.largest]
    found = [measure(rows) for rows in [*sizes, asked.largest]]
    print_table(found)
    passes = {name: growth(found, name) for name in ("first", "complete")}
    ratio = max(one["us_per_row_largest_to_smallest"] for one in passes.values())
    report({"benchmark": "reference_scaling", "ratio": ratio, **passes, "sizes": found})


if __name__ == "__main__":
    main()
