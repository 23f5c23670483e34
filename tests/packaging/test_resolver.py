"""Installing the pack into a stack changes the version of nothing that is there, and adds little.

The proof is the installer's own resolver: without an index it succeeds exactly when what is installed already
satisfies everything. It runs in the environment of the tests, so on stack A, B and C where CI runs it there.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.stack

ROOT = Path(__file__).resolve().parents[2]
SELF = "axolotl-dpo-ext"
# What the README says may be added where it is missing: pluggy, and scipy.
ADDITIONS = {"pluggy", "scipy"}
ADDED_HEADING = "# What axolotl-dpo-ext adds to this stack."
STACKS = sorted((ROOT / "constraints").glob("stack-*.txt"))


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pins(text: str) -> dict[str, str]:
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def dry_run(requirement: str) -> subprocess.CompletedProcess[str]:
    """Ask pip, or uv in an environment without pip, what it would install here."""
    # What is missing here and may be added has to be looked up; otherwise the installed set alone must do.
    offline = all(map(installed, ADDITIONS))
    environment = dict(os.environ)
    if offline:  # a configured folder of wheels is an index, too
        environment = {k: v for k, v in environment.items() if not k.startswith(("PIP_", "UV_"))}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"}
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-"]
    else:
        command = [os.environ.get("UV", "uv"), "pip", "install", "--dry-run", "--python", sys.executable]
    command += ["--no-index"] * offline + [requirement]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def would_install(requirement: str) -> dict[str, str]:
    """Name and version of every package the resolver would put here."""
    result = dry_run(requirement)
    assert result.returncode == 0, result.stdout + result.stderr
    if result.stdout.startswith("{"):  # pip
        metadata = [item["metadata"] for item in json.loads(result.stdout)["install"]]
        return {canonicalize_name(m["name"]): m["version"] for m in metadata}
    return {  # uv: " + name==version" is new, " ~ name==version" is reinstalled
        canonicalize_name(name): version
        for name, version in re.findall(r"^ [+~] (\S+?)==(\S+)", result.stderr, flags=re.MULTILINE)
    }


@pytest.mark.parametrize("extra", ["", "[axolotl]"])
def test_no_installed_package_changes(dist, extra):
    if extra and not installed("axolotl"):
        pytest.skip("Axolotl is not part of this stack")
    changes = would_install(f"{SELF}{extra} @ {dist.wheel.as_uri()}")
    assert changes.pop(SELF, None) in {None, dist.metadata["Version"]}
    assert changes.keys() <= ADDITIONS
    assert {name: version for name, version in changes.items() if installed(name)} == {}


def test_the_resolver_would_notice(dist, tmp_path):
    """The test above can fail: with one requirement that the stack does not meet, the resolver refuses."""
    stricter = tmp_path / dist.wheel.name
    with zipfile.ZipFile(dist.wheel) as source, zipfile.ZipFile(stricter, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("/METADATA"):
                data, changed = re.subn(rb"Requires-Dist: trl>=.*", b"Requires-Dist: trl>=999", data)
                assert changed == 1
            target.writestr(name, data)
    result = dry_run(f"{SELF} @ {stricter.as_uri()}")
    assert result.returncode != 0
    assert "trl>=999" in result.stdout + result.stderr


def test_this_environment_is_still_the_pinned_stack():
    """Setting it up installed the stack first and the pack second: the pack moved nothing."""
    stack = next((p for p in map(pins, map(Path.read_text, STACKS)) if p["trl"] == installed("trl")), None)
    if stack is None or stack.get("axolotl") != installed("axolotl"):
        pytest.skip("not one of the tested stacks")
    here = {name: version.partition("+")[0] for name in stack if (version := installed(name))}
    assert {name: version for name, version in here.items() if version != stack[name]} == {}


@pytest.mark.parametrize("stack", STACKS, ids=lambda path: path.stem)
def test_every_stack_satisfies_the_base_requirements(dist, stack):
    pinned = pins(stack.read_text())
    requirements = [Requirement(line) for line in dist.metadata.get_all("Requires-Dist")]
    base = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {"trl", "transformers", "datasets", "pluggy"} <= {r.name for r in base}
    unmet = {
        str(r): pinned.get(canonicalize_name(r.name))
        for r in base
        if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"), prereleases=True)
    }
    assert unmet == {}


@pytest.mark.parametrize("stack", STACKS, ids=lambda path: path.stem)
def test_constraints_hold_plain_pins_and_name_what_the_pack_adds(stack):
    before, _, added = stack.read_text().partition(ADDED_HEADING)
    lines = [line for line in (before + added).splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9._]*", line)] == []
    assert pins(added).keys() <= ADDITIONS


def test_the_readme_lists_what_is_added():
    readme = (ROOT / "README.md").read_text()
    assert {name for name in ADDITIONS if name not in readme} == set()
