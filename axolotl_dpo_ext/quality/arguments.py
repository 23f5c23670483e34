"""What is handed to ``audit()``, looked at before anything is read: each error says what was given and what to pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from axolotl_dpo_ext.quality.base import Check, Embedder
from axolotl_dpo_ext.settings import DPOExtSettings, QualitySettings, parse_settings

if TYPE_CHECKING:
    from datasets import Dataset


def quality_settings(given: Any) -> QualitySettings:
    """Returns settings given as such, as a mapping of what stands under ``quality:``, or as ``None``.

    Raises:
        TypeError: They are something else.
        ConfigurationError: A key or a value is none.
    """
    if isinstance(given, QualitySettings):
        return given
    if isinstance(given, DPOExtSettings) and given.quality is not None:
        return given.quality
    if given is None or isinstance(given, Mapping):
        return parse_settings({"quality": dict(given or {})}).quality or QualitySettings()
    raise TypeError(f"settings is a {type(given).__name__}; pass QualitySettings(…) or a dict of its fields")


def check_tokenizer(tokenizer: Any) -> None:
    """Raises TypeError where the second argument is what should be the third."""
    if isinstance(tokenizer, (QualitySettings, DPOExtSettings, Mapping)) and not hasattr(tokenizer, "is_fast"):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}; the tokenizer comes second: `audit(dataset, tokenizer, "
            "settings)`, or without one `audit(dataset, settings=…)`"
        )


def check_numbers(max_length: Any, holdout: Any, batch_size: Any) -> None:
    """Raises TypeError or ValueError for numbers that cannot be meant."""
    if holdout is not None and (isinstance(holdout, bool) or not isinstance(holdout, (int, float))):
        raise TypeError(f"holdout is {holdout!r}; pass a fraction such as 0.1, a number of pairs, or 0 for none")
    whole = max_length is None or (isinstance(max_length, int) and not isinstance(max_length, bool))
    if not whole or (max_length is not None and max_length < 1):
        raise ValueError(f"max_length is {max_length!r}; pass the run's limit in tokens, such as 1024, or None")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1 row")


def check_extensions(checks: Sequence[Any], embedders: Sequence[Any]) -> None:
    """Raises TypeError for what is no check or no embedder."""
    for each in checks:
        if not isinstance(each, Check):
            fix = "pass instances of PairCheck and SetCheck; `policy` in the settings names those to leave out"
            raise TypeError(f"checks holds {each!r}, which is no check; {fix}")
    for each in embedders:
        if not isinstance(each, Embedder):
            fix = "an embedder has a `name` and a method `encode(texts)` that returns one row per text"
            raise TypeError(f"embedders holds {each!r}, which is no embedder; {fix}")


def known_faults(faults: Mapping[int, str] | None, dataset: Dataset) -> Mapping[int, str]:
    """Returns what is known to be wrong with rows.

    Raises:
        ValueError: A key is no row of the data.
    """
    strange = [row for row in faults or {} if not isinstance(row, int) or not 0 <= row < len(dataset)]
    if strange:
        raise ValueError(f"faults has the key {strange[0]!r}; keys are rows of the data, 0 to {len(dataset) - 1}")
    return faults or {}


def source_labels(dataset: Dataset, sources: str | Sequence[str] | None) -> list[str] | None:
    """Returns the source of each row.

    Raises:
        ValueError: There are not as many labels as rows, or there is no such column.
    """
    if isinstance(sources, str) and sources not in dataset.column_names:
        raise ValueError(f"sources is {sources!r}, which is none of the columns {', '.join(dataset.column_names)}")
    labels = dataset[sources] if isinstance(sources, str) else sources
    if labels is None:
        return None
    if len(labels) != len(dataset):
        raise ValueError(f"sources has {len(labels)} labels for {len(dataset)} rows; expected one each")
    # One text per source, not one per row: a path of a hundred characters for each of a million rows is a lot.
    names: dict[str, str] = {}
    return [names.setdefault(name, name) for name in map(str, labels)]
