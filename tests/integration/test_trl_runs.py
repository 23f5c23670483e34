"""TRL without Axolotl: the example script does the quickstart's whole job."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.integration import runs


def test_the_trl_quickstart_trains_and_reports(tmp_path: Path):
    done = runs.run(
        [sys.executable, runs.ROOT / "example_configs" / "trl_quickstart.py"], tmp_path, OMP_NUM_THREADS="2"
    )
    assert done.returncode == 0, runs.tail(done)
    output = tmp_path / "build" / "quickstart" / "trl_output"
    assert (output / "model.safetensors").exists()
    assert "<svg" in (output / "dpo_report.html").read_text(encoding="utf-8")
    sections = {
        section["title"]: section["data"]
        for section in json.loads((output / "dpo_report.json").read_text())["sections"]
    }
    heldout = sections["Training"]["heldout"]
    assert abs(heldout["margin_per_beta"]["before"]) < 1e-3  # rounding: the reference was computed in other batches
    assert heldout["margin_per_beta"]["after"] > 1.0
    assert heldout["accuracy"]["after"] > 0.5
    assert sections["Data"]["dropped"] == sum(number % 20 in (7, 14) for number in range(384))
    assert (output / "dpo_quality_records.jsonl").exists()
    assert re.search(r"held-out accuracy: +\S+ at step 0 -> \S+ at step", done.stdout)
