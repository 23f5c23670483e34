"""What a release contains, and that an installer and Axolotl find it."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("axolotl_dpo_ext", "trl_callbacks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS = PROJECT["entry-points"]

# Runs in the environment that has only the wheel; prints what importlib.metadata sees there.
FIND = """
import importlib.metadata as metadata, json
dist = metadata.distribution("axolotl-dpo-ext")
files = {str(file) for file in dist.files if file.locate().is_file()}
found = {}
for group in {entry.group for entry in dist.entry_points}:
    for entry in metadata.entry_points(group=group):
        path = entry.module.replace(".", "/")
        exists = bool(files & {f"{path}.py", f"{path}/__init__.py"})
        found.setdefault(group, {})[entry.name] = [entry.value, exists]
others = len(list(metadata.distributions())) - 1
print(json.dumps({"version": dist.version, "found": found, "others": others}))
"""

LOAD = """
import importlib.metadata as metadata, json, sys
import click
loaded = {}
for entry in metadata.distribution("axolotl-dpo-ext").entry_points:
    is_command = isinstance(entry.load(), click.Command)
    loaded[entry.name] = [is_command, sys.modules[entry.module].__file__]
print(json.dumps(loaded))
"""


def package_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_twine_accepts_both(dist):
    command = [sys.executable, "-m", "twine", "check", "--strict", str(dist.wheel), str(dist.sdist)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_wheel_has_every_file_of_the_packages_and_nothing_else(dist):
    with zipfile.ZipFile(dist.wheel) as archive:
        names = set(archive.namelist())
    dist_info = {name for name in names if ".dist-info/" in name}
    assert names - dist_info == package_files()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in dist_info)


def test_sdist_can_be_built_tested_and_read(dist):
    with tarfile.open(dist.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    test_file = Path(__file__).relative_to(ROOT).as_posix()
    wanted = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", test_file}
    assert wanted | package_files() <= names
    assert not {name for name in names if name.startswith((".venv", "build/", "dist/"))}


def test_metadata(dist):
    metadata = dist.metadata
    assert metadata["Name"] == "axolotl-dpo-ext"
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = {"axolotl", "deepspeed", "semantic", "sentence-transformers", "sweep", "ray", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras


@pytest.fixture(scope="module")
def empty_environment(dist, tmp_path_factory) -> Path:
    """The interpreter of an environment in which nothing but the wheel is installed."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    result = subprocess.run([*command, str(dist.wheel)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return python


def ask(python: Path, script: str) -> dict:
    """Run `script` away from the working tree, so that only what is installed can answer."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run([python, "-c", script], cwd=python.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_an_empty_environment_finds_the_entry_points(empty_environment):
    seen = ask(empty_environment, FIND)
    assert seen["others"] == 0
    assert seen["version"] == PROJECT["version"]
    wanted = {
        group: {name: [target, True] for name, target in entries.items()} for group, entries in ENTRY_POINTS.items()
    }
    assert seen["found"] == wanted


@pytest.mark.slow
def test_the_entry_points_load_from_the_wheel(empty_environment):
    (site_packages,) = empty_environment.parents[1].glob("lib/python*/site-packages")
    # The dependencies come from the environment that runs the tests, but behind the wheel, and without its
    # editable install: a .pth file inside a folder that a .pth file names is not read.
    borrowed = site_packages / "dependencies.pth"
    borrowed.write_text(f"{sysconfig.get_path('purelib')}\n")
    try:
        loaded = ask(empty_environment, LOAD)
    finally:
        borrowed.unlink()
    assert loaded.keys() == {name for entries in ENTRY_POINTS.values() for name in entries}
    for name, (is_command, file) in loaded.items():
        assert Path(file).is_relative_to(site_packages), file
        assert is_command == (name in ENTRY_POINTS["axolotl.cli_commands"]), name
