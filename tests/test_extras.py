from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from axolotl_dpo_ext.extras import MissingExtraError, install_line, require

ROOT = Path(__file__).parents[1]


def test_a_missing_extra_gives_the_line_that_installs_it():
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'axolotl-dpo-ext[semantic]'")) as caught:
        require("a_package_that_is_not_there", "semantic", "the embedder")
    assert "the embedder needs the package a_package_that_is_not_there" in str(caught.value)


def test_a_package_that_is_there_is_imported_and_its_own_errors_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert require("json", "semantic", "x").dumps([1]) == "[1]"
    (tmp_path / "half_installed.py").write_text("import its_missing_dependency\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_missing_dependency") as caught:
        require("half_installed", "semantic", "x")
    assert not isinstance(caught.value, MissingExtraError)


def test_every_extra_named_in_the_code_exists():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^([\w-]+) = \[", declared.partition("\n[")[0], re.M))
    assert extras == {"axolotl", "deepspeed", "semantic", "sentence-transformers", "sweep", "ray", "dev"}
    for file in (ROOT / "axolotl_dpo_ext").rglob("*.py"):
        for named in re.findall(
            r'install_line\("([\w-]+)"\)|require\("\w+", "([\w-]+)"', file.read_text(encoding="utf-8")
        ):
            assert set(filter(None, named)) <= extras, file
    assert install_line("ray") == "pip install 'axolotl-dpo-ext[ray]'"


@pytest.mark.stack
def test_the_plugin_without_axolotl_says_what_to_install():
    # `None` in sys.modules is how Python marks a module as not importable.
    code = "import sys; sys.modules['axolotl'] = None\nfrom axolotl_dpo_ext import DPOExtPlugin"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'axolotl-dpo-ext[axolotl]'" in done.stderr
