"""What the run report says of the reference."""

from __future__ import annotations

from collections.abc import Mapping

from axolotl_dpo_ext.vocabulary import Section, Table


def reference_section(record: Mapping[str, Mapping[str, float]]) -> Section:
    """Returns the report's section on log-probabilities that were handed over.

    Args:
        record: For each dataset its ``pairs``, how many answers were ``computed``, and the ``seconds`` that took.
    """
    computed = sum(int(found["computed"]) for found in record.values())
    seconds = sum(found["seconds"] for found in record.values())
    summary = (
        f"{computed:,} answers were computed in {seconds:.1f} s and stored; later runs with this reference read them."
        if computed
        else "Every reference log-probability was read from the store; the reference model was not run."
    )
    rows = [
        [name, int(found["pairs"]), int(found["computed"]), round(found["seconds"], 1)]
        for name, found in record.items()
    ]
    table = Table(("dataset", "pairs", "answers computed", "seconds"), rows, "Reference log-probabilities")
    return Section("Reference", summary, tables=[table], data={name: dict(found) for name, found in record.items()})
