"""The documentation says what the code does: every hook, setting and command, and every code block runs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from axolotl_dpo_ext import compatibility, hookspecs, stack
from axolotl_dpo_ext.cli import cli
from axolotl_dpo_ext.configure import configure
from axolotl_dpo_ext.plugins import extensions
from axolotl_dpo_ext.settings import settings_table
from axolotl_dpo_ext.stack import installed_versions

pytestmark = pytest.mark.stack

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(language: str) -> list[object]:
    return [
        pytest.param(code, id=f"{page.name}-{number}")
        for page in PAGES
        for number, code in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        )
    ]


def test_every_hook_is_documented_with_its_signature():
    hooks = {
        name: hook
        for name, hook in inspect.getmembers(hookspecs, inspect.isfunction)
        if hook.__module__ == hookspecs.__name__
    }
    assert len(hooks) == 4
    for name, hook in hooks.items():
        signature = f"`{name}{inspect.signature(hook)}`".replace("'", "")
        assert signature in text_of("docs/hooks.md")
        assert hook.__doc__


def test_every_setting_is_documented_as_the_code_has_it():
    assert settings_table() in text_of("docs/settings.md"), (
        'renew the table of docs/settings.md: python -c "from axolotl_dpo_ext.settings import settings_table; print(settings_table())"'
    )


def test_every_check_and_preset_is_documented():
    for name, check in extensions().pair_checks.items():
        assert f"| `{name}` | {check.default_policy} |" in text_of("docs/settings.md")
    for name in extensions().hardware_presets:
        assert f"`{name}`" in text_of("README.md")
    for name in extensions().reference_strategies:
        assert f"`{name}`" in text_of("README.md")


def test_every_command_and_option_is_documented():
    for name, command in cli.commands.items():
        assert f"## `dpo-{name}" in text_of("docs/commands.md")
        assert f"`axolotl dpo-{name}" in text_of("README.md")
        subcommands = list(getattr(command, "commands", {}).values())
        for subcommand in subcommands:
            assert re.search(rf"^- `{subcommand.name}\b", text_of("docs/commands.md"), re.M), subcommand.name
        for parameter in [parameter for each in (command, *subcommands) for parameter in each.params]:
            option = parameter.opts[0]
            assert option.upper() in text_of("docs/commands.md") or option in text_of("docs/commands.md")


def test_every_command_has_its_axolotl_entry_point():
    entry_points = text_of("pyproject.toml").partition('"axolotl.cli_commands"]')[2].partition("[")[0]
    named = re.findall(r'dpo-([\w-]+) = "axolotl_dpo_ext.cli:(\w+)"', entry_points)
    assert all(function == name.replace("-", "_") for name, function in named)
    assert {name for name, _ in named} == set(cli.commands)


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.M))
    named = {name for page in PAGES for name in re.findall(r"`?make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"))}
    assert {"quickstart", "test"} <= named <= targets | {"it"}


def test_the_tested_versions_are_the_same_everywhere():
    for name, versions in stack.TESTED.items():
        pinned = dict(
            line.split("==")
            for line in text_of(f"constraints/stack-{name.lower()}.txt").splitlines()
            if "==" in line and line[0] != "#"
        )
        row = next(line for line in text_of("README.md").splitlines() if line.startswith(f"| {name}"))
        for package, version in versions.items():
            assert pinned.get(package) == version, f"stack {name}: {package}"
            assert (version or "–") in row


def test_every_rule_of_the_matrix_is_told():
    settings_page = text_of("docs/settings.md")
    for key in ("dpo_use_liger_kernel", "trl.sync_ref_model", "streaming", "vision", "rl_beta", "pad_to_multiple_of", "FSDP2",
                "DeepSpeed", "`deepspeed`", "`lora_model_dir`", "full fine-tuning", "orpo, simpo", "dpo_padding_free", "best-model", "test_datasets"):  # fmt: skip
        assert key in settings_page, key
    assert len(compatibility.RULES) == 19, "a new rule: add it to docs/settings.md and to this test"


@pytest.mark.parametrize("code", blocks("yaml"))
def test_every_yaml_block_is_accepted(code: str):
    keys = yaml.safe_load(code)
    if "dpo_ext" not in keys:
        assert "rl" in keys
        return
    assert configure({"rl": "dpo", **keys}, installed_versions(), extensions()).errors == []


@pytest.mark.parametrize("code", blocks("python"))
def test_every_python_block_runs(code: str, tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "example_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_config_is_accepted(path: Path):
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert configure(keys, installed_versions(), extensions()).errors == []
