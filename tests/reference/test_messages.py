"""What the trainer says is seen in a script that has not set up logging, once, and as the user wants it elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axolotl_dpo_ext.reference.processes import Processes

pytestmark = pytest.mark.stack

ROOT = Path(__file__).parents[2]

SCRIPT = """
import logging, sys
from transformers import AutoTokenizer
from trl import DPOConfig
from tests.reference.conftest import make_pairs
from axolotl_dpo_ext.reference import ReferenceDPOTrainer

model_dir, output = sys.argv[1:]

def make(reference):
    args = DPOConfig(output, max_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return ReferenceDPOTrainer(
        model_dir, args=args, train_dataset=make_pairs(4), processing_class=tokenizer, reference=reference
    )
"""

# Making the first trainer computes and stores; the second chooses; the third is made where logging is set up by then.
TRAINERS = """
make("precomputed").train()
make("auto")
logging.basicConfig(level=logging.INFO)
make("cpu_offload")
"""
SAID = ("pairs/s, ", "the first batch recomputed with the model agrees", "reference = ", "usable on", "in host memory")


def stderr_of(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=450, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def test_a_plain_script_shows_each_line_once(model_dir: Path, store: Path, tmp_path: Path):
    said = stderr_of(SCRIPT + TRAINERS, model_dir, tmp_path / "output")
    assert {text: said.count(text) for text in SAID} == dict.fromkeys(SAID, 1), said
    assert "axolotl-dpo-ext INFO: reference = " in said


def test_what_a_script_set_up_stands(model_dir: Path, store: Path, tmp_path: Path):
    before = (
        "logging.basicConfig(level=logging.WARNING)\nlogging.getLogger('axolotl_dpo_ext').setLevel(logging.ERROR)\n"
    )
    said = stderr_of(SCRIPT + before + TRAINERS, model_dir, tmp_path / "output")
    assert {text: said.count(text) for text in SAID} == dict.fromkeys(SAID, 0), said


SPEAK = """
from axolotl_dpo_ext.messages import show_information
assert (ours.level, ours.handlers) == (before, [])
show_information()
show_information()
log = logging.getLogger("axolotl_dpo_ext.reference.some_module")
log.info("an information")
log.warning("a warning")
"""


@pytest.mark.parametrize(
    ("configured", "shown"),
    [
        ("", ["axolotl-dpo-ext INFO: an information", "axolotl-dpo-ext WARNING: a warning"]),
        ("ours.setLevel(logging.WARNING)", ["axolotl-dpo-ext WARNING: a warning"]),
        ("logging.basicConfig(level=logging.WARNING)", ["WARNING:axolotl_dpo_ext.reference.some_module:a warning"]),
        ("logging.basicConfig(format='%(message)s'); ours.setLevel(logging.INFO)", ["an information", "a warning"]),
        ("logging.basicConfig(level=logging.INFO); ours.setLevel(logging.ERROR)", []),
        ("ours.propagate = False; ours.setLevel(logging.ERROR)", []),
    ],
)
def test_levels_and_handlers_of_the_users_are_respected(configured: str, shown: list[str]):
    start = "import logging\nours = logging.getLogger('axolotl_dpo_ext')\n"
    assert stderr_of(f"{start}{configured}\nbefore = ours.level\n{SPEAK}").splitlines() == shown


@pytest.mark.parametrize(("rank", "shown"), [(0, 1), (1, 0)])
def test_only_the_first_process_speaks(
    rank: int, shown: int, model_dir: Path, arguments: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    from axolotl_dpo_ext.reference import trainer

    class Ranked(Processes):
        def __init__(self) -> None:
            self.rank, self.count = rank, 1

    calls: list[None] = []
    monkeypatch.setattr(trainer, "Processes", Ranked)
    monkeypatch.setattr(trainer, "show_information", lambda: calls.append(None))
    trainer.ReferenceDPOTrainer(str(model_dir), **arguments(), reference="gpu")
    assert len(calls) == shown
