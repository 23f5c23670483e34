"""Stops an Axolotl 0.19 run that has a ``dpo_ext:`` key and does not list the plugin.

Axolotl 0.20 and newer discover the plugin. Axolotl 0.19 knows only the plugins listed in the YAML, ignores an
unknown top-level key without a word, and only logs a listed plugin that it cannot import: a missing or
misspelt line would train without anything the key asks for. Nothing of this pack is imported in such a run,
so the check hangs on the one import that every training process makes: PyTorch loads the entry points of
the group ``torch.backends`` (see ``torch._import_device_backends``).

In every other process the check costs a look at the command line. It uses the standard library only, and
PyYAML where the file mentions the key.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

COMMANDS = ("train", "preprocess")
# As the package offers it: named by this path, a plugin that cannot be imported still stops the run.
CLASS_PATH = "axolotl_dpo_ext.DPOExtPlugin"
_MAIN = ["-m", "axolotl.cli.main"]


def check() -> None:
    """Ends the process with a message if it is an Axolotl 0.19 run that would ignore ``dpo_ext:``.

    Raises:
        SystemExit: The run asks for ``dpo_ext:`` and its ``plugins:`` does not name this pack's plugin.
    """
    if not _needs_listing():
        return
    for config in _configs_of_axolotl_run(sys.orig_argv):
        keys = _keys_of(config)
        if keys.get("dpo_ext") is None or keys["dpo_ext"] is False:
            continue
        plugins = keys.get("plugins")
        if not isinstance(plugins, list) or CLASS_PATH not in plugins:
            sys.exit(_message(config, plugins))


def _configs_of_axolotl_run(argv: list[str]) -> list[Path]:
    """Returns the file that an `axolotl train …` or `python -m axolotl.cli.train …` trains; of a folder, its YAML."""
    for position, word in enumerate(argv[:-1]):
        following = argv[position + 1 :]
        if word == "-m" and following[0] in [f"axolotl.cli.{command}" for command in COMMANDS]:
            return _named(following[1:])
        starts_axolotl = Path(word).name == "axolotl" or (position and argv[position - 1 : position + 1] == _MAIN)
        if starts_axolotl and following[0] in COMMANDS:
            return _named(following[1:])
    return []


def _named(words: list[str]) -> list[Path]:
    """Returns what `--config=X`, `--config X` or the first word that is no option and no option's value names."""
    for position, word in enumerate(words):
        if word.startswith("--config="):
            named = Path(word.removeprefix("--config="))
        elif not word.startswith("-") and (position == 0 or _takes_no_value(words[position - 1])):
            named = Path(word)
        else:
            continue
        return sorted(named.glob("*.y*ml")) if named.is_dir() else [named] if named.is_file() else []
    return []


def _takes_no_value(before: str) -> bool:
    return before == "--config" or "=" in before or not before.startswith("-")


def _keys_of(config: Path) -> dict[str, object]:
    """Returns the keys of a YAML file, none where Axolotl will report that it can't read it."""
    try:
        text = config.read_text(encoding="utf-8")
        keys = _parse(text) if "dpo_ext" in text else None
    except (OSError, ValueError, RecursionError):
        return {}
    return keys if isinstance(keys, dict) else {}


def _parse(text: str) -> object:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def _needs_listing() -> bool:
    try:
        major, minor = importlib.metadata.version("axolotl").split(".")[:2]
        return (int(major), int(minor)) < (0, 20)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


def _message(config: Path, listed: object) -> str:
    return (
        f"axolotl-dpo-ext: {config} has a `dpo_ext:` key, and the plugin would not be active\n"
        f"    found: plugins: {listed or '(not set)'}\n"
        f"    why it stops the run: Axolotl {importlib.metadata.version('axolotl')} runs only the plugins that the "
        f"YAML lists and ignores keys it does not know; it would train without what dpo_ext asks for\n"
        f"    fix: add to {config}:\n"
        f"        plugins:\n"
        f"          - {CLASS_PATH}"
    )
