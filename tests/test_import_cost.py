"""Installing the pack must not slow down or change a run that does not ask for it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "trl", "transformers", "datasets", "sklearn", "axolotl", "pandas", "pyarrow")


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "module",
    ["axolotl_dpo_ext", "axolotl_dpo_ext.cli", "axolotl_dpo_ext.settings", "axolotl_dpo_ext.startup_guard",
     "axolotl_dpo_ext.plugins", "axolotl_dpo_ext.configure", "axolotl_dpo_ext.quality", "axolotl_dpo_ext.report",
     "axolotl_dpo_ext.reference", "axolotl_dpo_ext.hardware", "trl_callbacks"],
)  # fmt: skip
@pytest.mark.stack
def test_importing_loads_no_heavy_library(module: str):
    code = f"import sys, json; import {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run(code)[-1])
    assert [name for name in loaded if name.split(".")[0] in HEAVY] == []


@pytest.mark.stack
@pytest.mark.skipif(not importlib.util.find_spec("axolotl"), reason="stack C has no Axolotl")
def test_the_plugin_adds_no_library_to_axolotls_own_and_at_most_50_ms():
    # What an Axolotl run has loaded when it comes to its plugins, then what loading ours adds.
    code = """
import sys, time, json
import axolotl.cli.config
from axolotl.integrations.base import PluginManager
before = set(sys.modules)
start = time.process_time()
from axolotl_dpo_ext import DPOExtPlugin
plugin = DPOExtPlugin()
plugin.register({"rl": "dpo"})
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""
    runs = [json.loads(run(code)[-1]) for _ in range(3)]
    for _seconds, added in runs:
        assert [name for name in added if name.split(".")[0] in ("torch", "trl", "transformers", "datasets")] == []
    # The fastest run: what the machine does beside us only ever adds time.
    assert min(seconds for seconds, _added in runs) <= 0.05
