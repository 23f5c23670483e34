"""The commands: ``axolotl dpo-X …`` and the same as ``python -m axolotl_dpo_ext X …``.

Exit codes: 0 fine, 1 a problem was found, 2 bad usage. With ``--json`` stdout holds one JSON object and
nothing else; everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import yaml

from axolotl_dpo_ext import __version__
from axolotl_dpo_ext.cli_audit import audit
from axolotl_dpo_ext.cli_common import JSON, command_errors, read_yaml, stdout_to_stderr
from axolotl_dpo_ext.vocabulary import Problem, RunStopped


@click.group()
@click.version_option(__version__, prog_name="axolotl-dpo-ext")
def cli() -> None:
    """Extension pack for preference tuning with Axolotl and TRL."""


cli.add_command(audit)


@cli.command()
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@JSON
@click.option("--quick", is_flag=True, help="Leave out Axolotl's own validation, which takes some seconds to import.")
def doctor(config: Path | None, as_json: bool, quick: bool) -> None:
    """Check versions, the plugin, and every key of CONFIG, without training.

    CONFIG is an Axolotl YAML. Without it only the environment is checked.
    """
    from axolotl_dpo_ext.doctor import diagnose
    from axolotl_dpo_ext.plugins import extensions
    from axolotl_dpo_ext.stack import installed_versions

    keys, duplicates = read_yaml(config) if config else (None, [])
    with stdout_to_stderr():
        versions = installed_versions()
        try:
            diagnosis = diagnose(keys, versions, extensions())
        except RunStopped as error:
            raise click.ClickException(str(error)) from None
        diagnosis.problems += duplicates
        if keys is not None and versions["axolotl"] and not quick:
            diagnosis.problems += _axolotl_problems(keys, diagnosis)
    click.echo(json.dumps(diagnosis.as_json(), indent=2, default=str) if as_json else _doctor_text(diagnosis))
    sys.exit(0 if diagnosis.ok else 1)


@cli.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@JSON
def precompute(config: Path, as_json: bool) -> None:
    """Compute and store the reference log-probabilities of CONFIG, and do not train.

    CONFIG is an Axolotl YAML; its deepspeed, fsdp and parallelism keys are left out, as every process holds the whole
    model. With several processes each computes its share:

    accelerate launch --num_processes 4 -m axolotl_dpo_ext precompute CONFIG
    """
    from axolotl_dpo_ext.extras import MissingExtraError, require

    keys, duplicates = read_yaml(config)
    if duplicates:
        raise click.ClickException("\n".join(str(problem) for problem in duplicates))
    with stdout_to_stderr():
        try:
            require("axolotl", "axolotl", "`precompute CONFIG` builds the trainer as Axolotl does, which")
            from axolotl_dpo_ext.plugin import precompute_with_axolotl

            record = precompute_with_axolotl(keys)
        except (RunStopped, MissingExtraError) as error:
            raise click.ClickException(str(error)) from None
    if os.environ.get("RANK", "0") == "0":
        root = str(_root_of(keys))
        click.echo(json.dumps({"root": root, "datasets": record}) if as_json else _precompute_text(root, record))


def _precompute_text(root: str, record: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        f"{name}: {found['pairs']:,} pairs, {found['computed']:,} answers computed in {found['seconds']:.1f} s"
        for name, found in record.items()
    ]
    return "\n".join([*lines, f"stored below {root}"])


def _root_of(keys: Mapping[str, Any]) -> Path:
    """Returns the folder of the stores of a configuration."""
    from axolotl_dpo_ext.reference.store import store_root

    asked = keys.get("dpo_ext")
    asked = asked.get("reference") if isinstance(asked, Mapping) else None
    return store_root(asked.get("store") if isinstance(asked, Mapping) else None).absolute()


@cli.command()
@click.argument("output_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report's JSON on stdout.")
def report(output_dir: Path, as_json: bool) -> None:
    """Write the run report of OUTPUT_DIR again, also for a run that was cut off."""
    from axolotl_dpo_ext.report import RunReport, headline

    try:
        run = RunReport.load(output_dir)
    except FileNotFoundError as error:
        raise click.UsageError(str(error)) from None
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    try:
        run.finish()
    except OSError as error:
        raise click.ClickException(f"the report could not be written: {error}") from None
    click.echo((output_dir / "dpo_report.json").read_text(encoding="utf-8") if as_json else headline(run))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Accepted for consistency: the output is JSON in any case.")
def schema(as_json: bool) -> None:
    """Print the JSON schema of the dpo_ext key, for editors."""
    from axolotl_dpo_ext.settings import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


def _given_root(_context: click.Context, _option: click.Parameter, root: str | None) -> Path | None:
    """Refuses a folder that is not there: "no stores" would hide that it is misspelt."""
    if root is None:
        return None
    if not os.path.isdir(root):
        raise click.BadParameter(f"there is no folder {root!r}; give the folder that holds the stores, or leave it out")
    return Path(root)


_ROOT = click.option(
    "--root",
    metavar="DIRECTORY",
    callback=_given_root,
    help="Folder of the stores. Default: AXOLOTL_DPO_EXT_REFERENCE_STORE, else dpo_reference beside the Hugging Face "
    "cache.",
)


@cli.group()
def ref_cache() -> None:
    """List, verify, prune and export stored reference log-probabilities."""


@ref_cache.command("ls")
@_ROOT
@JSON
def ref_cache_ls(root: Path | None, as_json: bool) -> None:
    """List the stores, the model and the number of sequences of each."""
    _show_stores(_root(root), (), as_json)


@ref_cache.command("verify")
@click.argument("stores", metavar="[STORE]...", nargs=-1)
@_ROOT
@JSON
def ref_cache_verify(stores: tuple[str, ...], root: Path | None, as_json: bool) -> None:
    """Read every byte of each STORE, or of all, and name the damaged files.

    STORE is the name of a store, or how only its name begins.
    """
    _show_stores(_root(root), stores, as_json)


@ref_cache.command("prune")
@click.option("--store", "stores", multiple=True, help="Remove this store, or apply the other options to it alone.")
@click.option("--unused-days", type=click.FloatRange(min=0), help="Remove stores that no run opened for so many days.")
@click.option(
    "--damaged", is_flag=True, help="Remove damaged files and those of other stores; their rows are computed again."
)
@click.option("--yes", is_flag=True, help="Remove; without it, only say what would be removed.")
@_ROOT
@JSON
def ref_cache_prune(
    stores: tuple[str, ...], unused_days: float | None, damaged: bool, yes: bool, root: Path | None, as_json: bool
) -> None:
    """Remove stores or files, and what killed processes left behind."""
    from axolotl_dpo_ext.reference.store_upkeep import plan_pruning, remove

    if not stores and unused_days is None and not damaged:
        raise click.UsageError("say what to remove: --store, --unused-days or --damaged")
    root = _root(root)
    with command_errors():
        removals = plan_pruning(root, _folders(root, stores), unused_days, damaged)
        if yes:
            remove(removals)
    size = sum(removal.size for removal in removals)
    if as_json:
        listed = [{"path": str(each.path), "bytes": each.size, "reason": each.reason} for each in removals]
        click.echo(json.dumps({"root": str(root), "removed": yes, "bytes": size, "removals": listed}, indent=2))
        return
    for each in removals:
        click.echo(f"{each.path}  {_bytes(each.size)}  {each.reason}")
    total = f"{len(removals)} to remove, {_bytes(size)}"
    click.echo(f"removed {len(removals)}, {_bytes(size)}" if yes else f"{total}; nothing was removed: add --yes")


@ref_cache.command("export")
@click.argument("store")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_ROOT
@JSON
def ref_cache_export(store: str, file: Path, root: Path | None, as_json: bool) -> None:
    """Write the rows of STORE to FILE, .parquet or .jsonl: key, logp, tokens."""
    from axolotl_dpo_ext.reference.store_upkeep import export_store

    root = _root(root)
    with command_errors():
        (path,) = _folders(root, (store,))
        rows, damaged = export_store(path, file)
    told = {"store": path.name, "file": str(file), "rows": rows, "left_out": [str(each.path) for each in damaged]}
    click.echo(json.dumps(told, indent=2) if as_json else f"{file}: {rows} rows of {path.name}")
    for each in damaged:
        click.echo(f"left out: {each.path}: {each.reason}", err=True)
    sys.exit(1 if damaged else 0)


def main() -> None:
    """Runs ``python -m axolotl_dpo_ext``."""
    cli(prog_name="python -m axolotl_dpo_ext")


def _root(root: Path | None) -> Path:
    from axolotl_dpo_ext.reference.store import store_root
    from axolotl_dpo_ext.reference.store_upkeep import is_store

    root = root or store_root()
    if is_store(root):
        raise click.UsageError(f"{root} is a store itself; its root is {root.absolute().parent}, its name {root.name}")
    return root


def _folders(root: Path, stores: tuple[str, ...]) -> list[Path]:
    from axolotl_dpo_ext.reference.store_upkeep import find_store

    return list(dict.fromkeys(find_store(root, store) for store in stores))


def _show_stores(root: Path, stores: tuple[str, ...], as_json: bool) -> None:
    """Prints what is in stores, or in all, and exits with 1 if any file of them is not used."""
    from axolotl_dpo_ext.reference.store_upkeep import list_stores, verify_store

    with command_errors():
        summaries = [verify_store(path) for path in _folders(root, stores)] if stores else list_stores(root)
    if as_json:
        click.echo(json.dumps({"root": str(root), "stores": [each.as_json() for each in summaries]}, indent=2))
    else:
        click.echo(_stores_text(root, summaries))
    sys.exit(1 if any(summary.damaged for summary in summaries) else 0)


def _stores_text(root: Path, summaries: Iterable[Any]) -> str:
    lines = [f"{root}", f"{'store':<12}  {'sequences':>10}  {'size':>9}  {'shards':>6}  {'last used':<16}  model"]
    for each in summaries:
        used = datetime.fromtimestamp(each.last_used).strftime("%Y-%m-%d %H:%M")
        figures = f"{each.rows:>10}  {_bytes(each.size):>9}  {each.shards:>6}"
        lines.append(f"{each.path.name[:12]}  {figures}  {used}  {each.model or '-'}")
        lines += [f"    not used: {file.path.name}: {file.reason}" for file in each.damaged]
    return "\n".join(lines if len(lines) > 2 else [f"{root}: no stores"])


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _axolotl_problems(keys: Mapping[str, Any], diagnosis: Any) -> list[Problem]:
    """Returns what Axolotl's own validation refuses in the keys, with those that the pack would set."""
    from axolotl_dpo_ext.axolotl_config import validate_with_axolotl

    added = diagnosis.configuration.axolotl_keys if diagnosis.configuration else {}
    # Our own problems are known already; without its key the plugin leaves the validation to Axolotl.
    theirs = {key: value for key, value in keys.items() if key != "dpo_ext"}
    return validate_with_axolotl({**theirs, **added})


def _doctor_text(diagnosis: Any) -> str:
    lines = ["Stack"]
    lines += [f"  {name:<13} {version or '-'}" for name, version in diagnosis.versions.items()]
    lines += [f"  {diagnosis.stack}", "", "Plugin", f"  {diagnosis.plugin}"]
    lines += [f"  third party: {name} ({origin})" for name, origin in diagnosis.third_parties.items()]
    if diagnosis.configuration:
        settings = yaml.safe_dump({"dpo_ext": diagnosis.configuration.settings.model_dump()}, sort_keys=False)
        lines += ["", "Effective settings", *(f"  {line}" for line in settings.splitlines())]
        lines += ["", "Decisions"]
        lines += [f"  {d.about} = {d.choice}: {d.reason}" for d in diagnosis.configuration.decisions] or ["  none"]
    lines += ["", "Problems"]
    lines += [f"  {'' if problem.fatal else '(advice) '}{_indented(problem)}" for problem in diagnosis.problems] or [
        "  none found"
    ]
    return "\n".join(lines)


def _indented(problem: Problem) -> str:
    return str(problem).replace("\n", "\n  ")
