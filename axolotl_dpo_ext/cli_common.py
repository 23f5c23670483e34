"""What the commands share: a YAML read with care, stdout kept for what was asked for, errors without traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from axolotl_dpo_ext.vocabulary import Problem, RunStopped

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def read_yaml(path: Path) -> tuple[Mapping[str, Any], list[Problem]]:
    """Returns the keys of an Axolotl configuration, and a problem for every key that stands there twice."""
    twice: list[Problem] = []

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            twice.extend(_twice(name, node) for name in dict.fromkeys(names) if names.count(name) > 1)
            return super().construct_mapping(node, deep)

    try:
        keys = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is not YAML: {error}") from None
    if not isinstance(keys, dict):
        found = "is empty" if keys is None else f"holds {type(keys).__name__}, not the keys of an Axolotl configuration"
        raise click.UsageError(f"{path} {found}")
    return keys, twice


def _twice(name: str, node: yaml.MappingNode) -> Problem:
    return Problem(
        setting=name,
        found=f"the key {name} twice in the mapping that starts in line {node.start_mark.line + 1}",
        reason="YAML readers keep the last and lose the others without a word",
        fix="put what stands under them into one",
    )


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Sends what others write to stdout to stderr: Axolotl's logging holds on to the file descriptor."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def command_errors() -> Iterator[None]:
    """Shows what can't be as bad usage, and what went wrong as a problem; neither with a traceback."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except (OSError, RunStopped) as error:
        raise click.ClickException(str(error)) from None
