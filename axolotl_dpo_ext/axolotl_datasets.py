"""What Axolotl loads and transforms, as the audit needs it: in the order of its sources, and not split by row."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
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
    # Axolotl's own exact deduplication, its shuffling of each source and its Hub copy are of all sources together.
    if cfg.dataset_exact_deduplication or cfg.shuffle_before_merging_datasets or cfg.push_dataset_to_hub:
        train, test = _load(cfg)
        return Loaded(train, None, test, shuffles)
    parts, test = [], None
    for number, source in enumerate(cfg.datasets):
        changed = {"datasets": [source], **({"test_datasets": None} if number else {})}
        train, loaded_test = _load(cfg, **changed)
        parts.append(train)
        test = test if number else loaded_test
    labels = [label for label, part in zip(_names(cfg.datasets), parts, strict=True) for _ in range(len(part))]
    merged = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    return Loaded(merged, labels if len(parts) > 1 else None, test, shuffles)


def _load(cfg: DictDefault, **changed: Any) -> tuple[Dataset, Dataset | None]:
    from axolotl.common.datasets import load_preference_datasets

    with _changed(cfg, val_set_size=0, shuffle_merged_datasets=False, **changed):
        loaded = load_preference_datasets(cfg=cfg)
    return loaded.train_dataset, loaded.eval_dataset


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
