"""Scores on disk: one process audits and the others read, and a second audit of the same rows costs nothing.

What decides, thresholds and whether flagged pairs are dropped, is no part of a score, so changing it reads the same
file. All that a score does depend on is in the file's name: rows, tokenizer, maximal length, the checks that are run,
embedder, test data. The files may be removed at any time.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import pickle
import secrets
import zipfile
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from axolotl_dpo_ext.quality.columns import find_columns
from axolotl_dpo_ext.quality.policies import policy_of
from axolotl_dpo_ext.quality.scoring import Findings
from axolotl_dpo_ext.quality.semantic import Model2VecEmbedder, SentenceTransformersEmbedder

if TYPE_CHECKING:
    from datasets import Dataset

    from axolotl_dpo_ext.quality.base import Check, Embedder
    from axolotl_dpo_ext.quality.reading import PairReader
    from axolotl_dpo_ext.quality.scoring import PromptKeys
    from axolotl_dpo_ext.quality.tokens import TextTokenizer
    from axolotl_dpo_ext.settings import QualitySettings

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 10_000


def score_once(folder: Path, key: str, compute: Callable[[], Findings]) -> Findings:
    """Returns findings from a file, or computes and writes them; of several processes one computes, the others wait.

    Args:
        folder: Where the file is; made if absent.
        key: What the findings depend on, from ``scores_key``.
        compute: Computes them.

    Raises:
        OSError: The folder cannot be made.
    """
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.npz"
    with FileLock(f"{path}.lock"):
        if path.exists():
            try:
                found = _load(path)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                logger.warning("%s is damaged (%s): the pairs are scored again", path, error)
            else:
                logger.info("read the scores of %d pairs from %s", len(found.keys), path)
                return found
        found = compute()
        try:
            _save(path, found)
        except OSError as error:  # a full disk must not cost a finished audit
            logger.warning("the scores could not be written to %s (%s): the next start scores again", path, error)
        return found


def scores_key(
    reader: PairReader,
    settings: QualitySettings,
    checks: Sequence[Check],
    embedder: Embedder,
    test: PromptKeys | None,
) -> str:
    """Returns a digest of all that scores depend on. Whatever is not known to be equal counts as different."""
    run = [check for check in checks if policy_of(check, settings) != "keep"]
    known = {
        "version": version("axolotl-dpo-ext"),
        "rows": rows_digest(reader.dataset),
        "faults": sorted(reader.faults.items()),
        "tokenizer": _tokenizer_identity(reader.tokenizer),
        "framed": [
            reader.tokenizer.unit,
            reader.tokenizer.opening,
            reader.tokenizer.eos,
            reader.tokenizer.bos,
            reader.tokenizer.single_bos,
        ],
        "max_length": reader.max_length,
        "checks": [[check.name, _code(check)] for check in run],
        "embedder": _embedder_identity(embedder),
        "similar_prompts": settings.group_similar_prompts,
        "test": None if test is None else test.digest,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(known, sort_keys=True, default=str).encode())


def rows_digest(dataset: Dataset) -> str:
    """Returns a digest of the columns that an audit reads, row by row."""
    import pyarrow as pa

    digest = xxhash.xxh3_128()
    rows = dataset.select_columns(find_columns(dataset).names).with_format("arrow")
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        table = rows[start : start + _ROWS_AT_A_TIME].combine_chunks()
        # The stream format writes just the slice's rows, whatever larger buffers they lie in.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.replace_schema_metadata(None))
        digest.update(memoryview(sink.getvalue()))
    return digest.hexdigest()


def _tokenizer_identity(text_tokenizer: TextTokenizer) -> list[str]:
    tokenizer = text_tokenizer.tokenizer
    if tokenizer is None:
        # Words are words; of another callable nothing is known.
        return [text_tokenizer.unit if text_tokenizer.unit == "words" else secrets.token_hex()]
    fast = getattr(tokenizer, "backend_tokenizer", None)
    # A slow tokenizer is code: of what it does with other files of the same name nothing is known.
    content = fast.to_str() if fast is not None else secrets.token_hex()
    return [
        xxhash.xxh3_128_hexdigest(content.encode("utf-8", "surrogatepass")),
        str(getattr(tokenizer, "chat_template", None)),
    ]


def _code(thing: object) -> list[str]:
    """Returns what a check or an embedder is: the files that its classes are written in, and what it was made with."""
    kinds = [kind for kind in type(thing).__mro__ if kind is not object]
    try:
        made_with = pickle.dumps({name: value for name, value in vars(thing).items()})
    except Exception:  # pickling raises what it likes; unknown counts as different
        made_with = secrets.token_bytes()
    return [*map(_source_of, kinds), xxhash.xxh3_64_hexdigest(made_with)]


def _source_of(kind: type) -> str:
    try:
        source = Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):
        source = b""
    return f"{kind.__module__}.{kind.__qualname__} {xxhash.xxh3_64_hexdigest(source)}"


def _embedder_identity(embedder: Embedder) -> list[Any]:
    """Returns what tells one embedder from another; a model that is named as on the Hub is taken to stay the same."""
    if isinstance(embedder, (Model2VecEmbedder, SentenceTransformersEmbedder)):
        return [embedder.name, _source_of(type(embedder)), _files(embedder.name)]
    return [embedder.name, _code(embedder)]


def _files(name: str) -> list[list[Any]]:
    """Returns size and time of a model's files, where an embedder is named by a path."""
    folder = Path(name.partition(":")[2] or name).expanduser()
    if not folder.is_dir():
        return []
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted([str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files)


def _save(path: Path, found: Findings) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    arrays = {f"{kind}/{name}": a for kind in ("scores", "matched") for name, a in getattr(found, kind).items()}
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(
                file,
                **arrays,
                **{name: getattr(found, name) for name in ("log_ratio", "log_likelihood", "keys")},
                promptless=found.promptless,
                faults=np.frombuffer(json.dumps(sorted(found.faults.items())).encode(), dtype=np.uint8),
                # Order is not lost in a dictionary of arrays, but an empty one would be.
                names=np.frombuffer(json.dumps([list(found.scores), list(found.matched)]).encode(), dtype=np.uint8),
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> Findings:
    with np.load(path, allow_pickle=False) as file:
        scores, matched = json.loads(file["names"].tobytes())
        return Findings(
            scores={name: file[f"scores/{name}"] for name in scores},
            matched={name: file[f"matched/{name}"] for name in matched},
            faults=dict(json.loads(file["faults"].tobytes())),
            log_ratio=file["log_ratio"],
            log_likelihood=file["log_likelihood"],
            keys=file["keys"],
            promptless=int(file["promptless"]),
        )
