"""Reads preference files as one dataset."""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO, TYPE_CHECKING, TypeVar

import pyarrow as pa
import xxhash

from axolotl_dpo_ext.quality.files.columns import Columns, agree
from axolotl_dpo_ext.quality.files.open import open_source
from axolotl_dpo_ext.quality.files.sources import SchemaGrewError, Source
from axolotl_dpo_ext.quality.files.streams import UnusableFileError
from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem

if TYPE_CHECKING:
    from datasets import Dataset

_Item = TypeVar("_Item", Path, Source)
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class PreferenceFiles:
    """All rows of some preference files.

    Attributes:
        dataset: The rows of all files in order. Rows that cannot be read are there too, with nulls in the
            columns of the pair, so that no row is lost and row indices are those of the files.
        faults: What is wrong with such rows, by row; each names its file and line or row.
        sources: File name of each row, one per row, with as many folders as it takes to tell files apart.
    """

    dataset: Dataset
    faults: dict[int, str]
    sources: list[str]


def read_files(paths: Sequence[Path]) -> PreferenceFiles:
    """Reads preference files of any mix of formats; the memory it takes does not grow with their size.

    JSON lines, a JSON array or object of columns, CSV, TSV (each also as .gz or .zst), Parquet, Arrow files and
    streams, and folders of ``save_to_disk``. The columns are those of TRL and LLaMA-Factory: ``chosen`` and
    ``rejected``, or ``completion`` and ``label``, with a ``prompt``, ``conversations``, ``messages`` or none.
    Sides are text, a message or a list of messages. All other columns are kept. One whose values no single type
    holds becomes JSON; its values stay what they are. Messages and objects get the keys that others in their
    column have, as nulls. Lines are counted from 1, rows of other formats from 0.

    A row is at fault if it cannot be read, lacks a column of the pair that most rows have, or has another kind
    of value there than most rows of its file. Empty and missing values are no faults here but the audit's.
    A compressed or JSON file that ends too early gives the rows before that, and a fault where it ends.

    Where the files' pairs differ in form (text here and conversations there), all become flat text: ``prompt``,
    ``chosen`` and ``rejected``. Lengths and comparisons are then without chat template, and answers are what
    follows the prompt.

    Args:
        paths: The files and folders.

    Returns:
        The rows. The dataset lies in an unnamed temporary file, which goes when nothing refers to it any more.

    Raises:
        ConfigurationError: Whole files are unusable; there is one problem for each. Or they are unlike each
            other in what they hold: pairs here and labelled single answers there.
    """
    sources = _each(_distinct(paths), open_source)
    while True:
        columns = agree(sources)
        try:
            return _write(sources, columns)
        except SchemaGrewError:  # by each file once at most: from then on all its rows are known
            continue
        except OSError as error:  # those of the files themselves are UnusableFileError
            raise ConfigurationError([_no_space(error)]) from error


def _write(sources: Sequence[Source], columns: Columns) -> PreferenceFiles:
    from datasets import Dataset, DatasetInfo
    from datasets.table import InMemoryTable
    from datasets.utils import tqdm

    names = dict(zip(sources, _names([source.path for source in sources]), strict=True))
    faults: dict[int, str] = {}
    origins: list[str] = []
    with TemporaryFile(prefix="preference-files-") as file, tqdm(desc="Reading", unit=" rows", delay=2.0) as bar:
        with pa.ipc.new_stream(file, columns.schema) as stream:

            def copy(source: Source) -> None:
                for part in source.parts(columns.types_for(source)):
                    table, found = columns.bring(source, part)
                    where = f"{names[source]}, {source.unit}"
                    start = len(origins)
                    faults.update({start + i: f"{where} {part.numbers[i]}: {fault}" for i, fault in found.items()})
                    origins.extend([names[source]] * len(table))
                    stream.write_table(table)
                    bar.update(len(table))

            _each(sources, copy)
        table, fingerprint = _mapped(file)
    dataset = Dataset(InMemoryTable(table), info=DatasetInfo(features=columns.features), fingerprint=fingerprint)
    return PreferenceFiles(dataset, faults, origins)


def _mapped(file: IO[bytes]) -> tuple[pa.Table, str]:
    """Returns the table in a file, mapped instead of read, and a fingerprint of it.

    datasets would make the fingerprint by copying the whole table.
    """
    file.flush()
    file.seek(0)
    fingerprint = hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()  # type: ignore[arg-type]
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all(), fingerprint


def _each(items: Sequence[_Item], do: Callable[[_Item], _Result]) -> list[_Result]:
    """Returns what a function makes of each file; what is wrong with any of them is told together.

    Raises:
        ConfigurationError: Some files are unusable.
    """
    results, problems = [], []
    for item in items:
        try:
            results.append(do(item))
        except UnusableFileError as error:
            path = item.path if isinstance(item, Source) else item
            problems.append(Problem(setting=str(path), found=error.found, reason=error.reason, fix=error.fix))
    if problems:
        raise ConfigurationError(problems)
    return results


def _distinct(paths: Sequence[Path]) -> list[Path]:
    """Returns the paths; raises ConfigurationError where there are none, or where a file is named twice."""
    paths = [Path(path) for path in paths]
    if not paths:
        fix = "name at least one file"
        raise ConfigurationError([Problem("files", "no file", "there is nothing to read", fix)])
    twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        reason, fix = "every pair of it would be a duplicate", "name it once"
        raise ConfigurationError([Problem(str(path), "a file named twice", reason, fix) for path in twice])
    return paths


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns each path's name, with as many of its folders as it takes to tell the paths apart."""
    parts = [path.resolve().parts for path in paths]
    lengths = [1] * len(paths)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        alike = Counter(names)
        if max(alike.values()) == 1:
            return names
        lengths = [length + (alike[name] > 1) for length, name in zip(lengths, names, strict=True)]


def _no_space(error: OSError) -> Problem:
    return Problem(
        setting="TMPDIR",
        found=f"temporary files go to {gettempdir()}",
        reason=f"the rows cannot be written there: {error}",
        fix="set the environment variable TMPDIR to a folder with more space than all files need uncompressed",
    )
