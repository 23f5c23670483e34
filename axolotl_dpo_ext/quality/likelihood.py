"""How likely the reference model finds the answers that a run trains on, where their log-probabilities are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from axolotl_dpo_ext.quality.checks.reference_likelihood import deviations, foreign_warning, per_token
from axolotl_dpo_ext.quality.histograms import plain_histogram
from axolotl_dpo_ext.settings import QualitySettings
from axolotl_dpo_ext.vocabulary import Section

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

_SIDES = ("chosen", "rejected")
_ROWS_AT_A_TIME = 10_000


def likelihood_section(
    dataset: Dataset, max_length: int | None = None, settings: QualitySettings | None = None
) -> Section | None:
    """Returns the report's section on how the training data looks to the reference model.

    The log-probabilities are there once the trainer has been made, after the audit: so outliers are counted here, and
    dropped only by an audit of data that has the columns (the check ``reference_likelihood``).

    Args:
        dataset: The trainer's: ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and TRL's ``ref_chosen_logps`` and
            ``ref_rejected_logps``, sums in nats.
        max_length: Tokens of prompt and answer that the run keeps.
        settings: How far below the median an answer is an outlier.

    Returns:
        The section; ``None`` where the columns are absent.
    """
    needed = [*(f"ref_{side}_logps" for side in _SIDES), *(f"{side}_ids" for side in _SIDES), "prompt_ids"]
    if not set(needed) <= set(getattr(dataset, "column_names", None) or ()) or not len(dataset):
        return None
    likely = _per_token(dataset, max_length)
    if not np.isfinite(likely).any(axis=0).all():
        return None
    limit = (settings or QualitySettings()).max_likelihood_deviation
    outliers = int((deviations(likely) > limit).sum())
    share = outliers / len(dataset)
    by_side = dict(zip(_SIDES, likely.T, strict=True))
    medians = {side: float(np.median(values[np.isfinite(values)])) for side, values in by_side.items()}
    x_label = "nats a token under the reference"
    return Section(
        title="Data under the reference",
        summary=f"{outliers:,} of {len(dataset):,} pairs ({100 * share:.1f} %) have an answer more than {limit:g} "
        "robust standard deviations less likely than the median.",
        facts=[(f"median log-likelihood, {side}", f"{median:.3f} nats a token") for side, median in medians.items()],
        histograms=[plain_histogram(by_side, "Log-likelihood of the answers", x_label)],
        notes=foreign_warning(likely),
        data={"pairs": len(dataset), "outliers": outliers, "share": share, "median": medians},
    )


def _per_token(dataset: Dataset, max_length: int | None) -> NDArray[np.float64]:
    """Returns the log-likelihood per token of both answers as they are trained on, shape ``(n, 2)``."""
    import pyarrow.compute as pc

    found = np.full((len(dataset), 2), np.nan)
    columns = ["prompt_ids", *(name for side in _SIDES for name in (f"{side}_ids", f"ref_{side}_logps"))]
    rows = dataset.select_columns(columns).with_format("arrow")
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        table = rows[start : start + _ROWS_AT_A_TIME]
        lengths = {name: pc.list_value_length(table[name]).to_numpy() for name in columns if name.endswith("_ids")}
        for column, side in enumerate(_SIDES):
            sums = table[f"ref_{side}_logps"].to_numpy().astype(np.float64)
            values = per_token(sums, lengths[f"{side}_ids"], lengths["prompt_ids"], max_length)
            found[start : start + len(table), column] = values
    return found
