"""From what stands behind ``embedder:`` to an embedder: a registered name, a library's model, or a model's folder."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from axolotl_dpo_ext.extras import install_line, is_installed
from axolotl_dpo_ext.quality.base import Embedder
from axolotl_dpo_ext.quality.semantic import Model2VecEmbedder, SentenceTransformersEmbedder
from axolotl_dpo_ext.quality.text import excerpt
from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem, unknown_name

_SETTING = "dpo_ext.quality.embedder"
_FILES_SHOWN = 6


@dataclass(frozen=True)
class _Library:
    """A library whose models can be named.

    Attributes:
        module: What is imported.
        extra: The extra of this pack that installs it.
        files: A folder with none of these holds no model of it.
        load: Makes the embedder of a name and a model; imports the library.
    """

    module: str
    extra: str
    files: tuple[str, ...]
    load: Callable[[str, str], Embedder]


_LIBRARIES = {
    "model2vec": _Library(
        "model2vec", "semantic", ("model.safetensors", "0_StaticEmbedding/model.safetensors"), Model2VecEmbedder
    ),
    "sentence-transformers": _Library(
        "sentence_transformers",
        "sentence-transformers",
        ("modules.json", "config.json"),
        SentenceTransformersEmbedder,
    ),
}


def find_embedder(name: str, registered: Sequence[Embedder]) -> Embedder:
    """Returns the embedder of a name, with its model loaded.

    Args:
        name: A registered name; ``model2vec:`` or ``sentence-transformers:`` and a folder or a name on the Hub; or
            the folder of a model, whose library its files tell.
        registered: The embedders that plugins have registered; their names go first.

    Raises:
        ConfigurationError: The name means nothing, the library is not installed, or the model cannot be loaded.
        ImportError: The library is installed and cannot be imported.
    """
    for embedder in registered:
        if embedder.name == name:
            return embedder
    if problems := embedder_problems(name, registered):
        raise ConfigurationError(problems)
    prefix, model = _parse(name)
    try:
        return _LIBRARIES[prefix].load(name, model)
    except ImportError:  # of the library's installation, not of the model
        raise
    except Exception as error:  # a broken or absent model fails in as many ways as there are files
        raise ConfigurationError([_not_loaded(name, model, error)]) from error


def embedder_problems(name: str, registered: Sequence[Embedder]) -> list[Problem]:
    """Says what is wrong with the name of an embedder. Imports no library, loads no model, asks no network.

    Args:
        name: As for ``find_embedder``.
        registered: As for ``find_embedder``.
    """
    names = [embedder.name for embedder in registered]
    if name in names:
        return []
    prefix, model = _parse(name)
    if prefix not in _LIBRARIES:
        return [_unknown(name, names)]
    library = _LIBRARIES[prefix]
    problem = _bad_model(name, prefix, model)
    if problem is None and not is_installed(library.module):
        problem = Problem(
            setting=_SETTING,
            found=repr(name),
            reason=f"it needs the package {library.module}, which is not installed",
            fix=f"run {install_line(library.extra)}, or use `embedder: lexical`, which needs nothing more",
        )
    return [] if problem is None else [problem]


def _parse(name: str) -> tuple[str, str]:
    """Returns the library's name and the model; the library is ``""`` where the name tells none."""
    prefix, colon, model = name.partition(":")
    if colon and prefix in _LIBRARIES:
        return prefix, str(Path(model).expanduser()) if model.startswith("~") else model
    folder = Path(name).expanduser()
    return (_library_of(folder), str(folder)) if folder.is_dir() else ("", name)


def _library_of(folder: Path) -> str:
    """Returns the name of the library that wrote a folder, ``""`` where none did.

    model2vec writes sentence-transformers' ``modules.json`` too; the name of its tensor is what only it writes.
    """
    layout = ("config.json", "model.safetensors", "tokenizer.json")
    if all((folder / file).is_file() for file in layout) and "embeddings" in _tensors(folder / "model.safetensors"):
        return "model2vec"
    return "sentence-transformers" if (folder / "modules.json").is_file() else ""


def _tensors(file: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError):  # a broken file is no model of anybody's
        return set()


def _unknown(name: str, names: Sequence[str]) -> Problem:
    """Returns the problem of a name that neither an embedder nor a library nor a folder with a model has."""
    prefix, colon, model = name.partition(":")
    if colon and (near := difflib.get_close_matches(prefix.lower().replace("_", "-"), _LIBRARIES, n=1, cutoff=0.5)):
        fix = f"did you mean {f'{near[0]}:{model}'!r}?"
        return Problem(_SETTING, repr(name), f"there is no library {prefix!r} for embedders", fix)
    path = Path(name).expanduser()
    if path.is_dir():
        return _no_model(name, path, "an embedding model")
    if path.exists() or _is_path(name):
        return _no_folder(name, path)
    if "/" in name:
        fix = f"write which library loads it: {' or '.join(repr(f'{library}:{name}') for library in _LIBRARIES)}"
        return Problem(_SETTING, repr(name), "it is neither a registered embedder nor a folder", fix)
    problem = unknown_name(_SETTING, name, names, "embedder")
    forms = ", ".join(f"{library}:MODEL" for library in _LIBRARIES)
    return Problem(_SETTING, problem.found, problem.reason, f"{problem.fix} Or name a model: {forms}, or its folder")


def _bad_model(name: str, prefix: str, model: str) -> Problem | None:
    """Returns what is wrong with the model behind a library's name, as far as the disk tells."""
    if not model.strip():
        fix = f"write a folder, or a name on the Hub, behind `{prefix}:`"
        return Problem(_SETTING, repr(name), "it names no model", fix)
    path = Path(model)
    if path.is_dir():
        found = any((path / file).is_file() for file in _LIBRARIES[prefix].files)
        return None if found else _no_model(name, path, f"a model of {prefix}")
    return _no_folder(name, path) if path.exists() or _is_path(model) else None


def _is_path(model: str) -> bool:
    """Tells whether something that is not there was meant as a path: names on the Hub have at most one slash."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith("/")


def _no_folder(name: str, path: Path) -> Problem:
    reason = "it is a file; a model is a folder" if path.exists() else f"there is no folder {str(path)!r}"
    return Problem(_SETTING, repr(name), reason, f"write the model's folder; relative paths start at {Path.cwd()}")


def _no_model(name: str, folder: Path, wanted: str) -> Problem:
    files = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(files[:_FILES_SHOWN]) + (", …" if len(files) > _FILES_SHOWN else "") or "nothing"
    return Problem(
        setting=_SETTING,
        found=f"{name!r}, a folder with {shown}",
        reason=f"the folder does not hold {wanted}: model2vec writes config.json, model.safetensors and "
        "tokenizer.json, sentence-transformers writes modules.json and what that names",
        fix="write the folder into which `save_pretrained` wrote the model",
    )


def _not_loaded(name: str, model: str, error: Exception) -> Problem:
    """Returns the problem of a model that the library could not load."""
    said = f"{type(error).__name__}: {excerpt(str(error), 300)}"
    if Path(model).is_dir():
        return Problem(_SETTING, repr(name), f"the model in that folder does not load: {said}", "save the model again")
    return Problem(
        setting=_SETTING,
        found=repr(name),
        reason=f"there is no folder {model!r}, and the Hub did not give it either: {said}",
        fix=f"check the name; on a machine without network, first run `hf download {model}` where there is one and "
        "copy the cache, or write the model's folder",
    )
