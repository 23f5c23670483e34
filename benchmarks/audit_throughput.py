"""How fast preference pairs are audited, against only tokenizing their texts once.

    python benchmarks/audit_throughput.py [--data FILE] [--model DIR] [--pairs 3800]
        [--static-model DIR] [--sentence-model DIR] [--scaling [--sizes 10000 100000 1000000]]

One process on the same processor cores, the same texts, the same tokenizer. Ours is the whole default audit with its
held-out split; the floor is one call of the fast tokenizer for every 1,000 prompts, answers chosen and rejected, which
no audit in tokens can do without. Pairs of one turn are columns of text, others conversations, which ours puts through
the chat template. Beside it, where they are installed and have a model: semhash, a plain loop over
sentence-transformers, and our audit with a static model. With ``--scaling`` also how time and memory grow with the
pairs, each size read from Arrow on the disk in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from support import inputs  # first: it keeps Hugging Face's libraries off the network

from support import arguments, audit_peers, audit_scaling  # isort: skip
from support.audit_texts import Texts, as_rows, outcome, run_audit, varied
from support.measure import Taken, in_turns, report, say

BAR = 2.5
PAIRS_AT_ONCE = 1000
FEWEST_REPEATS = 3


def tokenize(tokenizer: Any, texts: Texts) -> int:
    """Tokenizes every text once; returns the number of tokens."""
    tokens = 0
    for start in range(0, len(texts["chosen"]), PAIRS_AT_ONCE):
        for column in texts.values():
            ids = tokenizer(column[start : start + PAIRS_AT_ONCE], add_special_tokens=False)["input_ids"]
            tokens += sum(map(len, ids))
    return tokens


def measure(pairs: list[inputs.Pair], tokenizer: Any, repeats: int) -> dict[str, Any]:
    """Measures both sides on the same pairs, in turns."""
    from datasets import Dataset

    rows, texts = as_rows(pairs)
    dataset = Dataset.from_list(rows)
    # What is imported and compiled once in a process is nobody's time.
    run_audit(dataset.select(range(min(len(dataset), 50))), tokenizer)
    tokenize(tokenizer, {name: column[:50] for name, column in texts.items()})
    taken = in_turns(
        {"floor": lambda: tokenize(tokenizer, texts), "ours": lambda: run_audit(dataset, tokenizer)}, repeats
    )
    floor, ours = taken["floor"], taken["ours"]
    return {
        "pairs": len(pairs),
        "tokens": floor.value,
        **outcome(ours.value),
        "floor": _side(floor, len(pairs)),
        "ours": _side(ours, len(pairs)),
        "ratio": ours.seconds / floor.seconds,
        "cpu_ratio": ours.cpu_seconds / floor.cpu_seconds,
    }


def _side(taken: Taken, pairs: int) -> dict[str, float]:
    return {"seconds": taken.seconds, "cpu_seconds": taken.cpu_seconds, "pairs_per_s": pairs / taken.seconds}


def workloads(data: Path | None, count: int) -> dict[str, list[inputs.Pair]]:
    """Returns the pairs that the command line asks for, as many of each kind."""
    if data is not None:
        return {"data": varied(inputs.read_pairs(data), count)}
    return {
        "single_turn": varied(inputs.single_turn_pairs(), count),
        "multi_turn": varied(inputs.multi_turn_pairs(), count),
    }


def print_table(found: dict[str, dict[str, Any]]) -> None:
    """Prints one line for each workload."""
    print(f"{'audit':<14} {'pairs':>7} {'floor pairs/s':>14} {'ours':>8} {'ours : floor, time':>19} {'CPU time':>9}")
    for name, one in found.items():
        print(
            f"{name:<14} {one['pairs']:>7,} {one['floor']['pairs_per_s']:>14,.0f} {one['ours']['pairs_per_s']:>8,.0f} "
            f"{one['ratio']:>18.2f}x {one['cpu_ratio']:>8.2f}x"
        )


def parse() -> argparse.Namespace:
    """Returns what the command line asks for."""
    parser = arguments.parser(__doc__, " instead of the two workloads", pairs=3800, pairs_of="each workload")
    parser.set_defaults(threads=2)
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median counts (default: %(default)s)")
    parser.add_argument("--static-model", type=Path, help="a folder of model2vec, for semhash and our audit with it")
    parser.add_argument("--sentence-model", type=Path, help="a folder of sentence-transformers")
    parser.add_argument("--scaling", action="store_true", help="also measure the growth of time and memory")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=audit_scaling.SIZES, help="pairs of --scaling (default: %(default)s)"
    )
    parser.add_argument("--one-pass", type=Path, metavar="ARROW", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.repeats < FEWEST_REPEATS:
        parser.error(f"--repeats {asked.repeats}: a median needs at least {FEWEST_REPEATS} runs")
    return asked


def set_up(count: int) -> None:
    """Keeps this process and its children to some processor cores, which tokenizers may all use; shows no bars."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    os.environ.update({"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(count)})
    os.environ.update({"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})


def main() -> None:
    """Measures what the command line asks for."""
    asked = parse()
    set_up(asked.threads)
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder = inputs.model_folder(asked.model, Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if asked.one_pass:
            report(audit_scaling.one_pass(asked.one_pass, tokenizer))
            return
        found: dict[str, dict[str, Any]] = {}
        work = workloads(asked.data, asked.pairs)
        for name, pairs in work.items():
            say(f"{name}: {len(pairs):,} pairs")
            found[name] = measure(pairs, tokenizer, asked.repeats)
        first = next(iter(work))
        peers = audit_peers.measure(work[first], tokenizer, asked.static_model, asked.sentence_model)
        result: dict[str, Any] = {
            "benchmark": "audit_throughput",
            "ratio": max(one["ratio"] for one in found.values()),
            "bar": BAR,
            "threads": asked.threads,
            "workloads": found,
            "peers": peers,
        }
        print_table(found)
        audit_peers.print_table(peers)
        if asked.scaling:
            result["scaling"] = audit_scaling.measure(work[first], asked.sizes, folder, asked.threads, Path(scratch))
            audit_scaling.print_table(result["scaling"])
    report(result)


if __name__ == "__main__":
    main()
