"""``dpo-audit``: the quality audit of an Axolotl configuration or of data files, without training."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from axolotl_dpo_ext.audit_files import names_in, write_audit, write_records
from axolotl_dpo_ext.cli_common import JSON, read_yaml, stdout_to_stderr
from axolotl_dpo_ext.extras import MissingExtraError, require
from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem, RunStopped

if TYPE_CHECKING:
    from axolotl_dpo_ext.quality import AuditResult, QualityStop

_RECORD_SUFFIXES = (".jsonl", ".parquet")
_FILE = click.Path(exists=True, path_type=Path)


@dataclass(frozen=True)
class _Request:
    """What the command was asked for; names as of its options."""

    sources: tuple[Path, ...]
    tokenizer: str | None
    max_length: int | None
    tests: tuple[Path, ...]
    changes: Mapping[str, Any]
    output: Path | None
    records: Path | None

    @property
    def config(self) -> Path | None:
        """The Axolotl YAML, if it is one."""
        return next((path for path in self.sources if path.suffix.lower() in (".yaml", ".yml")), None)


@click.command()
@click.argument("sources", nargs=-1, required=True, type=_FILE)
@click.option("--tokenizer", metavar="NAME_OR_FOLDER", help="Tokenizer of the model to train. Without it words count.")
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens of prompt and answer that the run will keep.")
@click.option("--test", "tests", multiple=True, type=_FILE, help="Test data; prompts that are in it too are flagged.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of `quality`, in YAML.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Write rows, records and report here.")
@click.option("--records", type=click.Path(dir_okay=False, path_type=Path), help="Write the records to this file.")
@JSON
def audit(
    sources: tuple[Path, ...],
    tokenizer: str | None,
    max_length: int | None,
    tests: tuple[Path, ...],
    settings: tuple[str, ...],
    output: Path | None,
    records: Path | None,
    as_json: bool,
) -> None:
    """Audit the preference pairs of SOURCES, and do not train.

    SOURCES is one Axolotl YAML, whose data are loaded as for training, or one or more data files, which need no
    Axolotl. Exit code 1 if pairs are dropped.
    """
    from axolotl_dpo_ext.quality import QualityStop

    request = _Request(sources, tokenizer, max_length, tests, _read_changes(settings), output, records)
    _refuse_overwriting(request)
    with stdout_to_stderr(), _errors():
        audited = _audit(request)
        written = {} if isinstance(audited, QualityStop) else _write(audited, request)
    if isinstance(audited, QualityStop):
        _show_stop(audited, as_json)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps({"stopped": False, **audited.section().data, "written": list(written)}, indent=2))
    else:
        click.echo("\n".join([audited.summary_table(), "", *_written_lines(written)]).rstrip())
    sys.exit(1 if len(audited.dropped_rows) else 0)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Shows what cannot be audited as bad usage, and what went wrong as a problem; neither with a traceback."""
    try:
        yield
    except (ConfigurationError, MissingExtraError) as error:
        raise click.UsageError(str(error)) from None
    except (OSError, RunStopped) as error:
        raise click.ClickException(str(error)) from None


def _audit(request: _Request) -> AuditResult | QualityStop:
    from axolotl_dpo_ext.quality import QualityStop

    try:
        return _audit_files(request) if request.config is None else _audit_config(request.config, request)
    except QualityStop as stop:
        return stop


def _audit_config(config: Path, request: _Request) -> AuditResult:
    """Audits what a training run with an Axolotl YAML would."""
    if len(request.sources) > 1:
        raise click.UsageError(f"{config} is an Axolotl YAML: give it alone, or data files without it")
    _refuse_run_options(request)
    keys, duplicates = read_yaml(config)
    if duplicates:
        raise ConfigurationError(duplicates)
    require("axolotl", "axolotl", "an Axolotl YAML loads its data as Axolotl does, which")
    from axolotl_dpo_ext.axolotl_audit import audit_with_axolotl

    return audit_with_axolotl(keys, request.changes)


def _refuse_run_options(request: _Request) -> None:
    """Refuses what the YAML says: two answers to one question would go unnoticed."""
    given = {
        "--tokenizer": (request.tokenizer, "base_model"),
        "--max-length": (request.max_length, "sequence_len"),
        "--test": (request.tests, "test_datasets"),
    }
    for option, (value, key) in given.items():
        if value:
            raise click.UsageError(f"{option} is for data files; an Axolotl YAML says it itself, with `{key}`")


def _audit_files(request: _Request) -> AuditResult:
    """Audits data files."""
    from axolotl_dpo_ext import quality
    from axolotl_dpo_ext.plugins import extensions
    from axolotl_dpo_ext.quality.files import read_files
    from axolotl_dpo_ext.settings import parse_settings

    settings = parse_settings({"quality": dict(request.changes)}).quality
    tokenizer = _load_tokenizer(request.tokenizer)
    files = read_files(request.sources)
    return quality.audit(
        files.dataset,
        tokenizer,
        settings,
        checks=list(extensions().pair_checks.values()),
        embedders=list(extensions().embedders.values()),
        max_length=request.max_length,
        test=read_files(request.tests).dataset if request.tests else None,
        sources=files.sources if len(request.sources) > 1 else None,
        faults=files.faults,
    )


def _load_tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a broken or absent tokenizer fails in as many ways as there are files
        reason = " ".join(str(error).split())
        problem = Problem(
            setting="--tokenizer",
            found=repr(name),
            reason=f"no tokenizer can be loaded from there: {type(error).__name__}: {reason}",
            fix="name a folder that holds one, or a model on the hub that is downloaded or can be",
        )
        raise ConfigurationError([problem]) from None


def _read_changes(settings: Sequence[str]) -> dict[str, Any]:
    """Returns what ``--set`` sets, by key."""
    changes: dict[str, Any] = {}
    for given in settings:
        key, equals, value = given.partition("=")
        key = key.strip()
        if not key or not equals:
            raise click.UsageError(f"--set {given}: expected KEY=VALUE, such as `--set max_length_ratio=3`")
        if key in changes:
            raise click.UsageError(f"--set {given}: {key} is set twice; leave one out")
        try:
            changes[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise click.UsageError(f"--set {given}: the value is not YAML: {error}") from None
    return changes


def _refuse_overwriting(request: _Request) -> None:
    """Refuses to write where data are read, or where a training run has left its report."""
    from axolotl_dpo_ext.report import JSON_NAME

    output, records = request.output, request.records
    if records is not None and records.suffix.lower() not in _RECORD_SUFFIXES:
        raise click.UsageError(f"--records {records}: records are written as {' or '.join(_RECORD_SUFFIXES)}")
    read = {path.resolve() for path in (*request.sources, *request.tests)}
    for path in [*(names_in(output) if output else []), *([records] if records else [])]:
        if path.resolve() in read:
            raise click.UsageError(f"{path} is read by this audit and would be replaced; write somewhere else")
    if output is not None and (output / "preference_log.jsonl").exists():
        raise click.UsageError(f"{output} holds a training run, whose report would be replaced; write somewhere else")
    there = [path.name for path in names_in(output) if path.exists()] if output else []
    if output and there and not (output / JSON_NAME).exists():  # an audit always leaves its report
        raise click.UsageError(
            f"{output} holds {', '.join(there)}, which no audit left there; move them or write somewhere else"
        )


def _write(audited: AuditResult, request: _Request) -> dict[str, int | None]:
    """Writes what was asked for; returns the rows of each file, ``None`` for the report."""
    written: dict[str, int | None] = {}
    if request.output is not None:
        title = "Audit of " + ", ".join(str(path) for path in request.sources)
        written |= write_audit(audited, request.output, title, with_records=request.records is None)
    if request.records is not None:
        written[str(request.records)] = write_records(audited, request.records)
    return written


def _written_lines(written: Mapping[str, int | None]) -> list[str]:
    return [f"wrote {path}{'' if rows is None else f' ({rows} rows)'}" for path, rows in written.items()]


def _show_stop(stop: QualityStop, as_json: bool) -> None:
    from axolotl_dpo_ext.quality import checks_data

    if as_json:
        told = {"stopped": True, "message": str(stop), "checks": checks_data(stop.reasons), "written": []}
        click.echo(json.dumps(told, indent=2))
        return
    click.echo(f"{stop}\n\nWith this command a setting is changed by `--set`, such as `--set max_drop_fraction=1`.")
    click.echo("Nothing was written.", err=True)
