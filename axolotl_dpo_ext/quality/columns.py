"""Which columns of a dataset hold the preference data: pairs, or the single answers of unpaired data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from axolotl_dpo_ext.vocabulary import ConfigurationError, Problem

if TYPE_CHECKING:
    from datasets import Dataset

PROMPT_COLUMNS = ("prompt", "conversations", "messages")
PAIRED, UNPAIRED = ("chosen", "rejected"), ("completion", "label")
# What datasets call the scores of the two answers: UltraFeedback, its cleaned versions, Argilla's.
_SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
_LOGP_COLUMNS = {"chosen_logp": "ref_chosen_logps", "rejected_logp": "ref_rejected_logps"}  # as TRL names them


@dataclass(frozen=True)
class Columns:
    """The columns to read.

    Attributes:
        sides: ``chosen`` and ``rejected``, or ``completion`` and ``label``.
        prompt: The prompt's column; ``None`` where the prompt is implicit.
        template: Columns that the chat template needs: ``tools``, ``chat_template_kwargs``.
        figures: Columns with numbers, by what they mean: ``margin``, ``chosen_score``, ``rejected_score``,
            ``chosen_logp``, ``rejected_logp``.
    """

    sides: tuple[str, str]
    prompt: str | None = None
    template: tuple[str, ...] = ()
    figures: dict[str, str] = field(default_factory=dict)

    @property
    def paired(self) -> bool:
        """Whether the rows are pairs."""
        return self.sides == PAIRED

    @property
    def names(self) -> list[str]:
        """Names of all columns to read."""
        texts = [*self.sides, *([self.prompt] if self.prompt else []), *self.template]
        return list(dict.fromkeys([*texts, *self.figures.values()]))


def find_columns(dataset: Dataset, setting: str = "datasets") -> Columns:
    """Finds the columns that hold the preference data.

    Args:
        dataset: The data.
        setting: What it was given as, for messages.

    Raises:
        ConfigurationError: If there are neither pairs nor answers with labels, or if the dataset has no length.
    """
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "select"):
        raise ConfigurationError([_no_dataset(dataset, setting)])
    sides = UNPAIRED if set(UNPAIRED) <= set(names) and not set(PAIRED) <= set(names) else PAIRED
    missing = [name for name in sides if name not in names]
    if missing:
        raise ConfigurationError([_missing(names, missing, setting)])
    return Columns(
        sides=sides,
        prompt=next((name for name in PROMPT_COLUMNS if name in names), None),
        template=tuple(name for name in ("tools", "chat_template_kwargs") if name in names),
        figures=_figures(dataset) if sides == PAIRED else {},
    )


def _figures(dataset: Dataset) -> dict[str, str]:
    numeric = {name for name, feature in dataset.features.items() if _is_number(feature)}
    found = {meaning: name for meaning, name in _LOGP_COLUMNS.items() if name in numeric}
    if len(found) < len(_LOGP_COLUMNS):
        found = {}
    scores = next((names for names in _SCORE_COLUMNS if numeric.issuperset(names)), None)
    if scores is not None:
        return {**found, "chosen_score": scores[0], "rejected_score": scores[1]}
    return {**found, "margin": "margin"} if "margin" in numeric else found


def _is_number(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float"))


def _no_dataset(given: Any, setting: str) -> Problem:
    return Problem(
        setting=setting,
        found=type(given).__name__,
        reason="the audit reads every pair and selects rows, which needs a `datasets.Dataset`",
        fix=_one_split(given),
    )


def _one_split(given: Any) -> str:
    if isinstance(given, Mapping) and given:  # a DatasetDict
        return f"pass one split, such as `[{next(iter(given))!r}]` of it"
    if isinstance(given, (list, tuple)):
        return "make one of the rows: `datasets.Dataset.from_list(rows)`"
    return "load the data without streaming, and pass one split at a time"


def _missing(names: Sequence[str], missing: Sequence[str], setting: str) -> Problem:
    return Problem(
        setting=setting,
        found=f"columns {', '.join(names) or '(none)'}",
        reason=f"there is no column {' and no column '.join(map(repr, missing))}, so no pairs",
        fix="rename the columns to `chosen` and `rejected` (for kto: `completion` and `label`), or set the dataset's "
        "`type:` so that they are made",
    )
