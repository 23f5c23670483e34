"""Golden runs: with the pack installed and no ``dpo_ext:`` key, Axolotl trains bit for bit as without it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.integration import runs

# The packages, their metadata, and the link files that an editable install leaves.
OURS = ("axolotl_dpo_ext", "axolotl-dpo-ext", "trl_callbacks")


@pytest.fixture(scope="module")
def python_without_the_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with links to every installed package but this one, so that both sides run the same code."""
    venv = tmp_path_factory.mktemp("without") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    target = Path(subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip())
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not any(name in entry.name for name in OURS):
            (target / entry.name).symlink_to(entry)
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('axolotl_dpo_ext') is not None)"
    subprocess.run([python, "-c", probe], check=True, cwd=venv)
    return python


def train(python: Path | str, keys: dict[str, Any], folder: Path) -> tuple[list[tuple[int, float, float]], str]:
    """Trains with one interpreter; returns every step's loss and gradient norm, and a digest of the weights."""
    import yaml

    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    done = runs.run([python, "-m", "axolotl.cli.train", "run.yaml"], folder)
    assert done.returncode == 0, runs.tail(done)
    weights = (folder / "output" / "model.safetensors").read_bytes()
    return runs.steps(folder / "output"), hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_run_without_the_key_is_bit_identical(
    kind: str, inputs: Path, python_without_the_pack: Path, tmp_path: Path, discovers: bool
):
    keys = runs.base_keys(inputs / "model", inputs / "chat.jsonl")
    if kind == "sft":
        rows = [{"messages": [*pair["messages"], pair["chosen"]]} for pair in runs.made_pairs()]
        data = runs.write_rows(tmp_path / "sft.jsonl", rows)
        del keys["rl"], keys["rl_beta"]
        keys["datasets"] = [{"path": str(data), "ds_type": "json", "type": "chat_template"}]
    # Axolotl 0.19 loads what is listed; newer ones load the plugin in every run, which is just what must not matter.
    listed = {} if discovers else {"plugins": ["axolotl_dpo_ext.DPOExtPlugin"]}
    with_pack, digest_with = train(sys.executable, keys | listed, tmp_path / "with")
    without, digest_without = train(python_without_the_pack, keys, tmp_path / "without")
    assert len(with_pack) == keys["max_steps"]
    assert with_pack == without
    assert digest_with == digest_without
    # The comparison can fail: the steps do change the loss.
    assert len({loss for _step, loss, _norm in with_pack}) > 1
