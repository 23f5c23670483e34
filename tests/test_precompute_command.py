"""``dpo-precompute``: what it says about the run that the values are for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from axolotl_dpo_ext.cli import cli
from axolotl_dpo_ext.reference.store import STORE_VARIABLE

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("axolotl"), reason="stack C has no Axolotl")

RECORD = {"train": {"pairs": 8, "computed": 3, "seconds": 0.5}}


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Axolotl read the configuration, and load and compute nothing."""
    import axolotl.cli.config
    import axolotl.common.datasets
    import axolotl.train
    from axolotl.utils.dict import DictDefault

    trainer = SimpleNamespace(reference_record=RECORD)
    monkeypatch.setattr(axolotl.cli.config, "load_cfg", lambda keys: DictDefault(keys))
    monkeypatch.setattr(axolotl.common.datasets, "load_preference_datasets", lambda **_: object())
    monkeypatch.setattr(axolotl.train, "setup_model_and_trainer", lambda *_: (trainer, None, None, None, None))


def precompute(folder: Path, dpo_ext: Any, *words: str) -> str:
    keys = {"rl": "dpo", "bf16": False, **({} if dpo_ext is None else {"dpo_ext": dpo_ext})}
    (folder / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    done = CliRunner().invoke(cli, ["precompute", str(folder / "run.yaml"), *words])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(
    ("dpo_ext", "why"),
    [
        (None, "no `dpo_ext.reference`"),
        (True, "no `dpo_ext.reference`"),
        ({"quality": True}, "no `dpo_ext.reference`"),
        ({"reference": False}, "no `dpo_ext.reference`"),
        ({"reference": "gpu"}, "reference: gpu"),
        ({"reference": {"strategy": "cpu_offload"}}, "reference: cpu_offload"),
        ({"reference": "precomputed"}, ""),
        ({"reference": {"store": "x"}}, ""),
        ({"reference": "auto"}, ""),
        ({"reference": "lab_strategy"}, ""),
    ],
)
def test_values_that_the_run_would_not_read_are_computed_with_a_warning(
    dpo_ext: Any, why: str, tmp_path: Path, nothing_is_computed: None, monkeypatch: pytest.MonkeyPatch
):
    from axolotl_dpo_ext import plugin

    said: list[str] = []
    monkeypatch.setattr(plugin, "LOG", SimpleNamespace(warning=lambda text, *given: said.append(text % given)))
    assert "3 answers computed" in precompute(tmp_path, dpo_ext)
    assert [why in text and "set `reference: precomputed`" in text for text in said] == ([True] if why else [])


def test_the_summary_names_the_folder_of_the_stores(
    tmp_path: Path, nothing_is_computed: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "shared"))
    monkeypatch.chdir(tmp_path)
    assert precompute(tmp_path, {"reference": "precomputed"}).endswith(f"stored below {tmp_path / 'shared'}\n")
    own = {"reference": {"strategy": "precomputed", "store": "own"}}
    assert json.loads(precompute(tmp_path, own, "--json")) == {"root": str(tmp_path / "own"), "datasets": RECORD}
