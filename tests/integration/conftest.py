from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tests.integration import runs

# Stack C has no Axolotl: what needs it says so by its file's name and is not collected there.
collect_ignore_glob = [] if importlib.util.find_spec("axolotl") else ["test_axolotl_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here runs real commands."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the quickstart's model and pairs once."""
    folder = tmp_path_factory.mktemp("inputs")
    done = runs.run([sys.executable, runs.ROOT / "example_configs" / "make_tiny_inputs.py", folder], folder)
    assert done.returncode == 0, runs.tail(done)
    runs.write_rows(folder / "chat.jsonl", runs.made_pairs())
    return folder


@pytest.fixture(scope="session")
def discovers() -> bool:
    """Whether the installed Axolotl finds plugins by their entry points."""
    return Version(version("axolotl")) >= Version("0.20")
