"""What Axolotl loads and transforms, as the audit needs it: in the order of its sources, and not split by row."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class Loaded:
    """What a configuration's datasets come to after their ``type:`` transforms.

    Attributes:
        train: All rows of ``datasets:``, one source behind the other, not shuffled.
        sources: The source of each row, or ``None`` where Axolotl merges in a way that forgets it.
        test: The rows of ``test_datasets:``, or ``None``.
        shuffles: Whether Axolotl would have shuffled the rows.
    """

    train: Dataset
    sources: list[str] | None
    test: Dataset | None
    shuffles: bool


def load_sources(cfg: DictDefault) -> Loaded:
    """Lets Axolotl load its datasets, without its split by row: that puts one prompt on both sides."""
    from datasets import concatenate_datasets

    shuffles = bool(cfg.shuffle_merged_datasets) and not cfg.curriculum_sampling
    if cfg.push_dataset_to_hub:  # others may load that copy without this pack: it is shuffled as Axolotl would
        train, test = _load(cfg)
        return Loaded(train, None, test, shuffles=False)
    # Axolotl's own exact deduplication and its shuffling of each source are of all sources together.
    if cfg.dataset_exact_deduplication or cfg.shuffle_before_merging_datasets:
        train, test = _load(cfg, shuffle_merged_datasets=False)
        return Loaded(train, None, test, shuffles)
    parts, tests = [], []
    # Axolotl reads the n-th test set with the field names of the n-th dataset, so they stay side by side.
    for source, test_source in itertools.zip_longest(cfg.datasets, cfg.test_datasets or []):
        test_sources = [test_source] if test_source else None
        given = [source or cfg.datasets[-1]]
        train, test = _load(cfg, datasets=given, test_datasets=test_sources, shuffle_merged_datasets=False)
        parts += [train] if source else []
        tests += [test] if test_source else []
    labels = [label for label, part in zip(_names(cfg.datasets), parts, strict=True) for _ in range(len(part))]
    return Loaded(
        train=parts[0] if len(parts) == 1 else concatenate_datasets(parts),
        sources=labels if len(parts) > 1 else None,
        test=concatenate_datasets(tests) if tests else None,
        shuffles=shuffles,
    )


def _load(cfg: DictDefault, **changed: Any) -> tuple[Dataset, Dataset | None]:
    from axolotl.common.datasets import load_preference_datasets

    from axolotl_dpo_ext.axolotl_access import broken_rows_kept

    with broken_rows_kept(), _changed(cfg, val_set_size=0, dataset_prepared_path=str(_folder(cfg)), **changed):
        loaded = load_preference_datasets(cfg=cfg)
    return loaded.train_dataset, loaded.eval_dataset


def _folder(cfg: DictDefault) -> Path:
    """Returns where Axolotl keeps the rows that it prepares for the audit.

    Not among its own: the name of a prepared copy says nothing of shuffling, so a run without this pack would read
    our unshuffled rows and we its shuffled ones, whose numbers are not those of the source. Nor does the name say
    anything of a file's content: pairs that were mended after an audit would not be seen.
    """
    from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH

    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in _local_files(cfg)]
    known = json.dumps([str(cfg.rl), cfg.excess_length_strategy, files], default=str)
    name = hashlib.sha256(known.encode()).hexdigest()[:16]
    return Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH) / "dpo_ext_data" / name


def _local_files(cfg: DictDefault) -> list[Path]:
    named = []
    for source in [*cfg.datasets, *(cfg.test_datasets or [])]:
        files = source.get("data_files") or []
        named += [source["path"], *([files] if isinstance(files, str) else files)]
    found: set[Path] = set()
    for path in map(Path, named):
        found.update([path] if path.is_file() else (file for file in path.rglob("*") if file.is_file()))
    return sorted(found)


@contextlib.contextmanager
def _changed(cfg: DictDefault, **keys: Any) -> Iterator[None]:
    saved = {key: cfg[key] for key in keys}
    for key, value in keys.items():
        cfg[key] = value
    try:
        yield
    finally:
        for key, value in saved.items():
            cfg[key] = value


def _names(datasets: Any) -> list[str]:
    """Returns a name for each source: its path, with what tells it from others of the same path."""
    paths = [str(source["path"]) for source in datasets]
    twice = {path for path, count in Counter(paths).items() if count > 1}
    return [f"{path} (datasets[{number}])" if path in twice else path for number, path in enumerate(paths)]
