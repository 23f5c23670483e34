"""The guard of Axolotl 0.19 runs, as a function and at the real ``import torch``."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from axolotl_dpo_ext import startup_guard

LISTED = "plugins: [axolotl_dpo_ext.DPOExtPlugin]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def run_guard(monkeypatch: pytest.MonkeyPatch, *argv: object, axolotl: str = "0.19.0") -> str | None:
    """Returns the message that ends the process, or ``None`` if it goes on."""
    monkeypatch.setattr(sys, "orig_argv", [str(word) for word in argv])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: axolotl)
    try:
        startup_guard.check()
    except SystemExit as end:
        return str(end.code)
    return None


@pytest.mark.parametrize("command", [["python", "-m", "axolotl.cli.train"], ["/env/bin/axolotl", "train"]])
def test_stops_a_run_that_would_ignore_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]):
    config = write(tmp_path, "rl: dpo\ndpo_ext: {quality: true}\n")
    message = run_guard(monkeypatch, *command, config, "--debug=False")
    assert message is not None
    assert "- axolotl_dpo_ext.DPOExtPlugin" in message
    assert str(config) in message


def test_stops_a_misspelt_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    config = write(tmp_path, "plugins: [axolotl_dpo_extt.DPOExtPlugin]\ndpo_ext: true\n")
    message = run_guard(monkeypatch, "python", "-m", "axolotl.cli.preprocess", config)
    assert message is not None
    assert "axolotl_dpo_extt.DPOExtPlugin" in message


@pytest.mark.parametrize(
    "text",
    [
        LISTED + "dpo_ext: {quality: true}\n",
        "rl: dpo\n",
        "rl: dpo\ndpo_ext: false\n",
        "# dpo_ext: {quality: true}\nrl: dpo\n",
        "dpo_ext: {quality: true\n",  # not YAML: Axolotl's to report
        "- dpo_ext\n",
        "dpo_ext: \x00\n",
        f"dpo_ext: {'[' * 5000}\n",
    ],
)
def test_leaves_other_configurations_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str):
    assert run_guard(monkeypatch, "python", "-m", "axolotl.cli.train", write(tmp_path, text)) is None


@pytest.mark.parametrize(
    "named",
    ["conf", "conf/run.conf", "--config=conf/run.conf", "--config conf/run.conf", "--sweep other.yaml conf/run.conf"],
)
def test_finds_the_configuration_as_axolotl_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    write(tmp_path / "conf", "dpo_ext: {quality: true}\n").rename(
        "conf/run.conf" if "run.conf" in named else "conf/run.yml"
    )
    (tmp_path / "other.yaml").write_text("learning_rate: [1, 2]\n", encoding="utf-8")
    assert run_guard(monkeypatch, "axolotl", "train", *named.split()) is not None
    assert run_guard(monkeypatch, "python", "-m", "axolotl.cli.main", "preprocess", *named.split()) is not None


def test_looks_at_the_configuration_and_at_no_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plain = tmp_path / "plain.yaml"
    plain.write_text("rl: dpo\n", encoding="utf-8")
    asks = write(tmp_path, "dpo_ext: {quality: true}\n")
    assert run_guard(monkeypatch, "axolotl", "train", plain, "--output-dir", tmp_path) is None
    assert run_guard(monkeypatch, "axolotl", "train", plain, "--sweep", asks) is None
    assert run_guard(monkeypatch, "axolotl", "train", plain, f"--sweep={asks}") is None


@pytest.mark.parametrize("plugins", ["5", "true", "axolotl_dpo_ext.DPOExtPlugin", "{a: 1}"])
def test_plugins_that_are_no_list_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plugins: str):
    config = write(tmp_path, f"plugins: {plugins}\ndpo_ext: {{quality: true}}\n")
    message = run_guard(monkeypatch, "axolotl", "train", config)
    assert message is not None
    assert "plugins: [" not in message


def test_the_module_path_is_not_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Named by its module, a plugin that can't be imported would only be logged; see axolotl_dpo_ext.inactive."""
    config = write(tmp_path, "plugins: [axolotl_dpo_ext.plugin.DPOExtPlugin]\ndpo_ext: true\n")
    assert run_guard(monkeypatch, "axolotl", "train", config) is not None


def test_odd_surroundings_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    config = write(tmp_path, "dpo_ext: {quality: true}\n")
    assert run_guard(monkeypatch, "axolotl", "train", config, axolotl="main") is None
    config.write_bytes(b"\xff\xfe dpo_ext: true")
    assert run_guard(monkeypatch, "axolotl", "train", config) is None


def test_leaves_newer_axolotl_and_other_programs_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    config = write(tmp_path, "dpo_ext: {quality: true}\n")
    assert run_guard(monkeypatch, "axolotl", "train", config, axolotl="0.21.0") is None
    assert run_guard(monkeypatch, "python", "train.py", config) is None
    assert run_guard(monkeypatch, "axolotl", "inference", config) is None
    assert run_guard(monkeypatch, "axolotl", "train", tmp_path / "missing.yaml") is None
    assert run_guard(monkeypatch) is None


def test_is_called_by_the_real_import_of_torch(tmp_path: Path):
    entry = importlib.metadata.entry_points(group="torch.backends", name="axolotl_dpo_ext")
    assert [point.value for point in entry] == ["axolotl_dpo_ext.startup_guard:check"]
    try:
        axolotl = importlib.metadata.version("axolotl")
    except importlib.metadata.PackageNotFoundError:
        axolotl = ""
    config = write(tmp_path, "dpo_ext: {quality: true}\n")
    # The words after -c are what the guard sees of `axolotl train run.yaml`; nothing of Axolotl is started.
    code = subprocess.run(
        [sys.executable, "-c", "import torch", "axolotl", "train", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    if axolotl.startswith("0.19."):
        assert code.returncode == 1
        assert "would not be active" in code.stderr
    else:
        assert code.returncode == 0, code.stderr
