"""Says what to change where Axolotl, Transformers or datasets refuse a run with a bare exception."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem, RunStopped

_JSON_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst")
_ROWS_NAMED = 3


def refusals(error: Exception) -> list[Problem]:
    """Returns what Axolotl's own validation refused, a problem for each key.

    Args:
        error: What it raised.
    """
    if isinstance(error, ConfigurationError):
        return list(error.problems)
    if isinstance(error, ValidationError):
        return [_refusal(".".join(map(str, found["loc"])), found["msg"]) for found in error.errors()]
    return [_refusal("", f"{type(error).__name__}: {error}")]


@contextlib.contextmanager
def explained(
    keys: Mapping[str, Any], otherwise: Callable[[Mapping[str, Any], Exception], list[Problem]]
) -> Iterator[None]:
    """Ends a run with what to change, where others only raise: for a missing model, no rows, and what the step knows.

    Args:
        keys: The run's Axolotl keys.
        otherwise: Returns the problems behind any other exception; without any it passes as it is.

    Raises:
        ConfigurationError: With the problems.
    """
    try:
        yield
    except RunStopped:
        raise
    except StopIteration:  # datasets and TRL look at the first row
        raise ConfigurationError([_no_rows(keys)]) from None
    except Exception as error:
        problems = [_missing_model(keys, error)] if _is_missing(error) else otherwise(keys, error)
        if not problems:
            raise
        raise ConfigurationError(problems) from None


def in_validation(_keys: Mapping[str, Any], error: Exception) -> list[Problem]:
    """Returns the problems behind what reading the configuration raised."""
    return refusals(error) if isinstance(error, (ValueError, OSError)) else []


def in_files(keys: Mapping[str, Any], error: Exception) -> list[Problem]:
    """Returns the rows of local JSON files behind what loading the datasets raised, a problem for each file."""
    return [
        problem
        for setting in ("datasets", "test_datasets")
        for path in _json_files(keys.get(setting))
        for problem in _bad_rows(setting, path, error)
    ]


def in_datasets(keys: Mapping[str, Any], error: Exception) -> list[Problem]:
    """Returns the problem behind what loading the datasets raised."""
    from datasets.exceptions import DatasetsError

    if problems := in_files(keys, error):
        return problems
    # A `type:` that reads a column which is not there raises KeyError, or TypeError where the column holds nothing.
    if not isinstance(error, (ValueError, OSError, DatasetsError, KeyError, TypeError)):
        return []
    return [
        Problem(
            setting="datasets",
            found=f"{_dataset_names(keys)} can't be loaded",
            reason=f"{type(error).__name__}: {_one_line(error)}",
            fix="correct `path`, `type` and the field names there; `axolotl preprocess` shows where it fails",
        )
    ]


def in_trainer(keys: Mapping[str, Any], error: Exception) -> list[Problem]:
    """Returns the problem behind what making the model and the trainer raised, if it is a known one."""
    if not isinstance(error, ValueError) or "bf16" not in str(error):
        return []
    return [
        Problem(
            setting="bf16",
            found=f"bf16: {str(keys.get('bf16')).lower()}, on a machine without bfloat16",
            reason=_one_line(error),
            fix="run it on the machine that will train; without `bf16` values are stored for another dtype",
        )
    ]


def _is_missing(error: Exception) -> bool:
    """Whether Transformers says that a model or tokenizer is not there; what a system call raises has a number."""
    return type(error) is OSError and error.errno is None


def _missing_model(keys: Mapping[str, Any], error: Exception) -> Problem:
    name = str(keys.get("base_model"))
    local = name.startswith((os.sep, "~", ".")) and not os.path.isdir(name)
    return Problem(
        setting="base_model",
        found=f"base_model: {name}, which can't be loaded",
        reason="there is no such folder" if local else _one_line(error),
        fix="name a folder that holds the model and its tokenizer, or a model on the hub that is downloaded or can be",
    )


def _no_rows(keys: Mapping[str, Any]) -> Problem:
    return Problem(
        setting="datasets",
        found=f"no row is left of {_dataset_names(keys)}",
        reason=f"the files are empty, or each pair is longer than sequence_len ({keys.get('sequence_len', 'not set')})",
        fix="name files with pairs, or raise sequence_len",
    )


def _json_files(given: Any) -> list[Path]:
    """Returns the local JSON files that a list of datasets names."""
    files = []
    for one in given if isinstance(given, list) else []:
        named = [one.get("path"), one.get("data_files")] if isinstance(one, Mapping) else []
        listed = [item for each in named for item in (each if isinstance(each, list) else [each])]
        files += [Path(item) for item in listed if isinstance(item, str) and item.lower().endswith(_JSON_FILES)]
    return [path for path in dict.fromkeys(files) if path.is_file()]


def _bad_rows(setting: str, path: Path, error: Exception) -> list[Problem]:
    from axolotl_dpo_ext.quality.files import read_files, unreadable_rows

    try:
        faults = list(read_files([path]).faults.values())
        command = f"axolotl dpo-audit {shlex.quote(str(path))} --output DIR"
        fix = f"mend it, or name DIR/train.jsonl instead, where `{command}` writes the good rows"
    except ConfigurationError:  # columns of another name, for one, which Axolotl may well know
        faults, fix = unreadable_rows(path), "mend it"
    if not faults:
        return []
    more = f"; and {len(faults) - _ROWS_NAMED} more" if len(faults) > _ROWS_NAMED else ""
    return [
        Problem(
            setting=setting,
            found="; ".join(faults[:_ROWS_NAMED]) + more,
            reason=f"Axolotl loads {path} as a whole or not at all ({type(error).__name__})",
            fix=fix,
        )
    ]


def _dataset_names(keys: Mapping[str, Any]) -> str:
    given = keys.get("datasets")
    listed = given if isinstance(given, list) else []
    return ", ".join(str(one.get("path")) for one in listed if isinstance(one, Mapping)) or "the datasets"


def _refusal(setting: str, message: str) -> Problem:
    return Problem(
        setting=setting or "configuration",
        found="refused by Axolotl's own validation",
        reason=message.removeprefix("Value error, "),
        fix="change that key; `axolotl config-schema` lists what Axolotl takes",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
