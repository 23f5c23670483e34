"""What a start costs when every reference log-probability is stored, against the first computation and against TRL.

    python benchmarks/reference_startup.py [--data FILE] [--model DIR] [--pairs 24]

A LoRA run is made once with nothing stored, then with another beta, learning rate, seed, LoRA rank and output folder
in turn; no step is trained. Counted are forwards of the model and the time in `_precompute_ref_logps`, for
`ReferenceDPOTrainer(reference="precomputed")` and for TRL's `precompute_ref_log_probs=True` on a dataset whose cache
files stay.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import inputs  # first: it keeps Hugging Face's libraries off the network

import torch  # isort: skip
from support import arguments
from support.measure import report, say, seconds_of

CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "beta": {"beta": 0.5},
    "learning_rate": {"learning_rate": 5e-5},
    "seed": {"seed": 7},
    "lora_rank": {"rank": 16},
    "output_dir": {"output_dir": "another"},
}
MOST_OF_FIRST = 0.02


def write_pairs(pairs: list[inputs.Pair], path: Path) -> Path:
    """Writes pairs where `datasets` loads them from, so that TRL finds its cache again."""
    from datasets import Dataset

    Dataset.from_list(pairs).to_parquet(path)
    return path


def construct(trainer_class: type, folder: Path, data: Path, scratch: Path, change: dict[str, Any], **more: Any) -> Any:
    """Constructs a trainer as a script does that was started anew, with one setting changed."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, set_seed
    from trl import DPOConfig

    change = {"output_dir": "first", "seed": 1, "rank": 8, **change}
    lora = LoraConfig(r=change.pop("rank"), target_modules="all-linear", task_type="CAUSAL_LM")
    args = DPOConfig(
        **{**change, "output_dir": str(scratch / trainer_class.__name__ / change["output_dir"])},
        max_length=1024,
        bf16=False,
        use_cpu=True,
        report_to=[],
        precompute_ref_log_probs=True,
    )
    set_seed(args.seed)
    cache = scratch / f"cache-{trainer_class.__name__}"
    dataset = load_dataset("parquet", data_files=str(data), split="train", cache_dir=str(cache))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return trainer_class(
        str(folder), args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora, **more
    )


class Watch:
    """Counts the forwards of language models, and the seconds in ``_precompute_ref_logps``."""

    def __init__(self) -> None:
        self.forwards = 0
        self.seconds = 0.0

    @contextlib.contextmanager
    def on(self, trainer_class: type) -> Iterator[type]:
        """Gives a subclass that is watched, as long as the context is open."""
        watch = self

        class Watched(trainer_class):  # type: ignore[misc]
            def _precompute_ref_logps(self, *args: Any, **named: Any) -> Any:
                began = time.perf_counter()
                try:
                    return super()._precompute_ref_logps(*args, **named)
                finally:
                    watch.seconds += time.perf_counter() - began

        Watched.__name__ = trainer_class.__name__
        # Every forward looks its tokens up, once: in the only embedding of most architectures.
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: setattr(watch, "forwards", watch.forwards + isinstance(module, torch.nn.Embedding))
        )
        try:
            yield Watched
        finally:
            hook.remove()


def starts(trainer_class: type, folder: Path, data: Path, scratch: Path, **more: Any) -> dict[str, dict[str, float]]:
    """Constructs the trainer with nothing stored, then once for each change."""
    found = {}
    for name, change in {"first": {}, **CHANGES}.items():
        watch = Watch()
        with watch.on(trainer_class) as watched:
            seconds, trainer = seconds_of(
                lambda watched=watched, change=change: construct(watched, folder, data, scratch, change, **more)
            )
        del trainer
        found[name] = {"forwards": watch.forwards, "seconds": watch.seconds, "construction_seconds": seconds}
        say(f"{trainer_class.__name__}, {name}: {watch.forwards} forwards, {watch.seconds:.3f} s")
    return found


def summary(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Returns what the changes cost: the slowest against the first computation, and which of them recomputed."""
    changed = {name: one for name, one in found.items() if name in CHANGES and name != "nothing"}
    return {
        "first_seconds": found["first"]["seconds"],
        "largest_share_of_first": max(one["seconds"] for one in changed.values()) / found["first"]["seconds"],
        "seconds_of_all_changes": sum(one["seconds"] for one in changed.values()),
        "recomputed": [name for name, one in changed.items() if one["forwards"]],
        "starts": found,
    }


def print_table(ours: dict[str, Any], trl: dict[str, Any]) -> None:
    """Prints one line for each start."""
    print(f"{'changed':<14} {'forwards ours':>13} {'TRL':>5} {'seconds ours':>13} {'TRL':>7}")
    for name, one in ours["starts"].items():
        other = trl["starts"][name]
        print(
            f"{name:<14} {one['forwards']:>13} {other['forwards']:>5} {one['seconds']:>13.3f} {other['seconds']:>7.2f}"
        )


def main() -> None:
    """Measures what the command line asks for."""
    about_data = "; default: multi-turn conversations"
    asked = arguments.parser(__doc__, about_data, pairs=24, pairs_of="the dataset").parse_args()
    torch.set_num_threads(asked.threads)
    from trl import DPOTrainer

    from axolotl_dpo_ext.reference import ReferenceDPOTrainer

    pairs = inputs.read_pairs(asked.data) if asked.data else inputs.multi_turn_pairs()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = inputs.model_folder(asked.model, scratch)
        data = write_pairs(inputs.spread(pairs, asked.pairs), scratch / "pairs.parquet")
        reference = {"strategy": "precomputed", "store": str(scratch / "store")}
        ours = summary(starts(ReferenceDPOTrainer, folder, data, scratch, reference=reference))
        trl = summary(starts(DPOTrainer, folder, data, scratch))
    print_table(ours, trl)
    ratio = trl["seconds_of_all_changes"] / ours["seconds_of_all_changes"]
    report({"benchmark": "reference_startup", "ratio": ratio, "pairs": asked.pairs, "ours": ours, "trl": trl})
    if ours["recomputed"]:
        raise SystemExit(f"computed again after a change of {', '.join(ours['recomputed'])}")


if __name__ == "__main__":
    main()
