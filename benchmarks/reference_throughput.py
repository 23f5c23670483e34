"""How fast reference log-probabilities are computed, against TRL's own precomputation of the same values.

    python benchmarks/reference_throughput.py [--data FILE [--long-prompts]] [--model DIR] [--pairs 28]

One process, one model, one tokenized dataset, fp32. Ours is everything that a run without a store does: content keys,
weights' identity, probe, batches, forwards, shards on the disk, and reading them back. TRL's is
`DPOTrainer._precompute_ref_logps` with no cache file, at its default batch size and at the fastest of 1 to 16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import inputs  # first: it keeps Hugging Face's libraries off the network

import torch  # isort: skip
from support import arguments
from support.measure import report, say
from support.precompute import compare, mean_tokens, print_table, trl_trainer

TOLERANCE = 1e-4
# The long-prompt workload: prompts of at least so many tokens, and answers cut to this part of their prompt.
LONG_PROMPT, ANSWER_PART = 128, 4


@dataclass(frozen=True)
class Workload:
    """Pairs to measure with.

    Attributes:
        name: Its key in the result.
        pairs: Preference pairs.
        count: How many of them are measured, evenly spread; ``None`` for all.
        cut_answers: Whether answers are cut to a part of their prompt, and pairs with a short prompt left out.
    """

    name: str
    pairs: Sequence[inputs.Pair]
    count: int | None
    cut_answers: bool = False


def workloads(data: Path | None, count: int, long_prompts: bool) -> list[Workload]:
    """Returns the workloads that the command line asks for."""
    if data is not None:
        pairs = inputs.spread(inputs.read_pairs(data), 8 * count)  # not all of a large file is worth tokenizing
        return [Workload("long_prompts" if long_prompts else "data", pairs, count, long_prompts)]
    multi_turn = inputs.multi_turn_pairs()
    long = Workload("long_prompts", multi_turn, count, cut_answers=True)
    if long_prompts:
        return [long]
    # Whole prompts, so that a sample has as many pairs to a prompt as the data set.
    single_turn = inputs.whole_prompts(inputs.single_turn_pairs(), count)
    return [Workload("multi_turn", multi_turn, count), long, Workload("single_turn", single_turn, None)]


def measure(workload: Workload, folder: Path, repeats: int, scratch: Path) -> dict[str, Any]:
    """Measures both sides on one workload."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = trl_trainer(model, AutoTokenizer.from_pretrained(folder), workload.pairs, scratch)
    dataset = _sample(trainer.train_dataset, workload)
    say(f"{workload.name}: {len(dataset)} pairs, mean tokens {mean_tokens(dataset)}")
    return compare(trainer, dataset, folder, repeats, TOLERANCE)


def _sample(dataset: Any, workload: Workload) -> Any:
    if workload.cut_answers:
        dataset = dataset.filter(lambda row: len(row["prompt_ids"]) >= LONG_PROMPT).map(_with_cut_answers)
    if workload.count is not None:
        dataset = dataset.select(inputs.spread(range(len(dataset)), workload.count))
    return dataset.flatten_indices()


def _with_cut_answers(row: dict[str, Any]) -> dict[str, Any]:
    most = len(row["prompt_ids"]) // ANSWER_PART
    return {f"{side}_ids": row[f"{side}_ids"][:most] for side in inputs.SIDES}


def main() -> None:
    """Measures what the command line asks for."""
    parser = arguments.parser(__doc__, " instead of the three workloads", pairs=28, pairs_of="each workload")
    parser.add_argument("--repeats", type=int, default=3, help="runs whose median counts (default: %(default)s)")
    parser.add_argument("--long-prompts", action="store_true", help="only with answers cut to a quarter of the prompt")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = inputs.model_folder(asked.model, Path(scratch))
        for workload in workloads(asked.data, asked.pairs, asked.long_prompts):
            found[workload.name] = measure(workload, folder, asked.repeats, Path(scratch))
    print_table(found)
    ratio = min(one["ratio_default"] for one in found.values())
    report({"benchmark": "reference_throughput", "ratio": ratio, "threads": asked.threads, "workloads": found})


if __name__ == "__main__":
    main()
