"""What the reference strategies cost on a GPU: precomputing against TRL, memory and time of a training step.

    python benchmarks/gpu_memory.py [--device cuda] [--size 0.5b|1.5b|tiny] [--data FILE]

The model has the shape of a Qwen2 of that size and random weights, in bfloat16 (tiny, for a machine without a GPU: two
layers in float32). Measured are the precomputation, ours and TRL's, in one process on the same pairs; full fine-tuning
steps with the reference on the device (`gpu`), in host memory (`cpu_offload`) and stored (`precomputed`), each with the
most memory that torch had allocated; and what of a reference in host memory is on the device while it computes.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import inputs  # first: it keeps Hugging Face's libraries off the network

import torch  # isort: skip
from support.measure import report, say
from support.precompute import compare, print_table, trl_trainer

STRATEGIES = ("gpu", "cpu_offload", "precomputed")
# Relative differences that the dtype explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SHORT = 16  # tokens of an input whose activations take next to no memory


@dataclass(frozen=True)
class Size:
    """A model's shape and what is measured with it.

    Attributes:
        shape: What differs from ``Qwen2Config``.
        dtype: Of the weights.
        max_length: Longest sequence in tokens.
        pairs: How many pairs are precomputed.
        batch_size: Pairs of a micro-batch in training.
        accumulation: Micro-batches of a step.
        steps: How many steps are timed, after ``warm_up``.
        warm_up: How many are not.
    """

    shape: dict[str, Any]
    dtype: torch.dtype
    max_length: int
    pairs: int
    batch_size: int
    accumulation: int
    steps: int
    warm_up: int


def _shape(width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


SIZES = {
    "tiny": Size(_shape(64, 128, 2, 4, 2, 4096), torch.float32, 512, 12, 2, 2, 2, 1),
    "0.5b": Size(_shape(896, 4864, 24, 14, 2, 151_936), torch.bfloat16, 1024, 240, 4, 4, 10, 2),
    "1.5b": Size(_shape(1536, 8960, 28, 12, 2, 151_936), torch.bfloat16, 1024, 240, 4, 4, 10, 2),
}


class Machine:
    """The device, and its memory as torch counts it.

    Args:
        name: ``cuda`` or ``cpu``; of the CPU's memory torch counts nothing, so every figure is then ``None``.
    """

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self._counts = self.device.type == "cuda"

    def describe(self) -> str:
        """Returns the device's name."""
        return torch.cuda.get_device_name() if self._counts else "CPU, one thread"

    def settle(self) -> None:
        """Waits for the device, gives back what is not used, and forgets the peak."""
        gc.collect()
        if self._counts:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Waits until the device has done everything."""
        if self._counts:
            torch.cuda.synchronize()

    def allocated(self) -> int | None:
        """Returns the bytes allocated now."""
        return torch.cuda.memory_allocated() if self._counts else None

    def peak(self) -> int | None:
        """Returns the most bytes allocated since ``settle``."""
        return torch.cuda.max_memory_allocated() if self._counts else None


def make_model(size: Size, device: torch.device | str) -> Any:
    """Makes a Qwen2 with random weights; the same ones each time."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(Qwen2Config(**size.shape), dtype=size.dtype)


def measure_precompute(size: Size, machine: Machine, pairs: Sequence[inputs.Pair], tokenizer: Any) -> dict[str, Any]:
    """Measures ours against TRL's precomputation, both in the dtype of the weights."""
    say("precompute")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trl_trainer(make_model(size, machine.device), tokenizer, pairs, Path(scratch), size.max_length)
        dataset = trainer.train_dataset.select(inputs.spread(range(len(trainer.train_dataset)), size.pairs))
        return compare(trainer, dataset.flatten_indices(), None, 3, TOLERANCE[size.dtype])


def measure_training(
    size: Size, machine: Machine, strategy: str, pairs: Sequence[inputs.Pair], tokenizer: Any
) -> dict[str, Any]:
    """Measures some steps of full fine-tuning with one reference strategy."""
    from transformers import PrinterCallback

    say(f"training with reference: {strategy}")
    machine.settle()
    before = machine.allocated()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _reference_trainer(size, machine, strategy, pairs, tokenizer, Path(scratch))
        clock = _clock(machine, size.warm_up)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found = {
            "step_seconds": statistics.median(clock.seconds),
            "peak_memory_gb": _gb(machine.peak(), before),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][:3],
        }
    del trainer
    machine.settle()
    return found


def _reference_trainer(
    size: Size, machine: Machine, strategy: str, pairs: Sequence[inputs.Pair], tokenizer: Any, scratch: Path
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig

    from axolotl_dpo_ext.reference import ReferenceDPOTrainer

    steps = size.warm_up + size.steps
    args = DPOConfig(
        output_dir=str(scratch / "run"),
        max_length=size.max_length,
        per_device_train_batch_size=size.batch_size,
        gradient_accumulation_steps=size.accumulation,
        max_steps=steps,
        learning_rate=1e-6,
        bf16=size.dtype == torch.bfloat16,
        use_cpu=machine.device.type == "cpu",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    rows = inputs.spread(pairs, steps * size.batch_size * size.accumulation)
    store = {"store": str(scratch / "store")} if strategy == "precomputed" else {}
    return ReferenceDPOTrainer(
        make_model(size, machine.device),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reference={"strategy": strategy, **store},
    )


def _clock(machine: Machine, warm_up: int) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times steps from end to end: fetching batches, and with them the reference, is part of it."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            machine.wait()
            now = time.perf_counter()
            if state.global_step > warm_up:
                self.seconds.append(now - self._last)
            elif state.global_step == warm_up:
                machine.settle()
                now = time.perf_counter()
            self._last = now

    return Clock()


def measure_host_reference(size: Size, machine: Machine) -> dict[str, Any]:
    """Measures what of a reference in host memory is on the device, at most, while it computes a short input."""
    from axolotl_dpo_ext.reference.streamed import StreamedReference

    say("a reference in host memory")
    model = make_model(size, "cpu")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    machine.settle()
    before = machine.allocated()
    reference = StreamedReference(model, machine.device)
    machine.settle()
    ids = torch.arange(2 * SHORT, device=machine.device).reshape(2, SHORT)
    ones = torch.ones_like(ids)
    reference.token_log_probs([{"input_ids": ids, "attention_mask": ones, "completion_mask": ones}])
    # Two layers, the head, and the norm and frequencies outside layers; logits of the short input come on top.
    head = 2 * 2 * SHORT * size.shape["vocab_size"] * 4
    found = {
        "weights_gb": weights / 1e9,
        "two_layers_and_head_gb": reference.device_bytes / 1e9,
        "device_peak_gb": _gb(machine.peak(), before),
        "allowed_gb": (reference.device_bytes * 1.02 + head + 2**24) / 1e9,
    }
    del reference, model
    machine.settle()
    return found


def _gb(size: int | None, before: int | None) -> float | None:
    return None if size is None or before is None else (size - before) / 1e9


def run_gpu_tests() -> str:
    """Runs the tests that need a GPU, and returns what pytest says in the end."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/reference", "-k", "gpu or cuda"]
    done = subprocess.run(command, cwd=inputs.ROOT, capture_output=True, text=True, check=False, env=os.environ)
    say(done.stdout[-2000:])
    return f"exit code {done.returncode}: {(done.stdout.strip().splitlines() or ['no output'])[-1]}"


def print_training(found: dict[str, dict[str, Any]]) -> None:
    """Prints one line for each strategy."""
    print(f"{'training':<14} {'s/step':>12} {'peak GB':>9}")
    for name, one in found.items():
        peak = one["peak_memory_gb"]
        print(f"{name:<14} {one['step_seconds']:>12.3f} {'-' if peak is None else f'{peak:.2f}':>9}")


def print_host_reference(found: dict[str, Any]) -> None:
    """Prints what of the reference in host memory was on the device."""
    peak = found["device_peak_gb"]
    print(
        f"cpu_offload: {'not counted' if peak is None else f'{peak:.3f} GB'} on the device at most; "
        f"two layers and head are {found['two_layers_and_head_gb']:.3f} GB of {found['weights_gb']:.3f} GB"
    )


def parse() -> argparse.Namespace:
    """Reads the command line."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: 0.5b on a GPU, else tiny")
    parser.add_argument("--data", type=Path, help="a file of preference pairs; default: multi-turn conversations")
    parser.add_argument("--skip-tests", action="store_true", help="leave out the tests that need a GPU")
    asked = parser.parse_args()
    asked.size = asked.size or ("0.5b" if asked.device == "cuda" else "tiny")
    return asked


def main() -> None:
    """Measures what the command line asks for."""
    from transformers import AutoTokenizer

    asked = parse()
    size, machine = SIZES[asked.size], Machine(asked.device)
    if asked.device == "cpu":
        torch.set_num_threads(1)
    pairs = inputs.read_pairs(asked.data) if asked.data else inputs.multi_turn_pairs()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = AutoTokenizer.from_pretrained(inputs.model_folder(None, Path(scratch)))
    result: dict[str, Any] = {"benchmark": "gpu_memory", "device": machine.describe(), "size": asked.size}
    precompute = measure_precompute(size, machine, inputs.spread(pairs, 2 * size.pairs), tokenizer)
    training = {name: measure_training(size, machine, name, pairs, tokenizer) for name in STRATEGIES}
    host = measure_host_reference(size, machine)
    tests = run_gpu_tests() if machine.device.type == "cuda" and not asked.skip_tests else "not run"
    print_table({asked.size: precompute})
    print_training(training)
    print_host_reference(host)
    print(f"tests that need a GPU: {tests}")
    result["ratio"] = precompute["ratio_default"]
    report({**result, "precompute": precompute, "training": training, "host_reference": host, "gpu_tests": tests})
    if host["device_peak_gb"] is not None and host["device_peak_gb"] > host["allowed_gb"]:
        raise SystemExit("cpu_offload: more of the reference was on the device than two layers and the head")


if __name__ == "__main__":
    main()
