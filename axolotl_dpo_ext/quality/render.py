"""Says what an audit found, as text for a terminal and as a section of the run report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.vocabulary import Section, Table

if TYPE_CHECKING:
    from axolotl_dpo_ext.quality.result import AuditResult, LengthBias, Reason

# A bias is worth a note if it is large and no accident: ten points from even, five standard errors.
_BIAS_POINTS, _BIAS_ERRORS = 0.10, 5.0


def summary(result: AuditResult) -> str:
    """Returns the outcome as plain text: reasons, what is left, length bias, examples."""
    bias = (
        f"chosen is longer in {_change(result, 'chosen_longer', _percent)} of the pairs, "
        f"mean log length ratio {_change(result, 'mean_log_ratio', _signed)} ({result.scored.unit})"
    )
    return "\n".join([reasons_text(result.reasons), "", _kept_line(result), bias])


def reasons_text(reasons: Sequence[Reason]) -> str:
    """Returns a table of what each check found, with an example of each below it."""
    if not reasons:
        return "no check was run"
    columns = ["check", "policy", "threshold", "flagged", "share"]
    cells = [
        [reason.check, reason.policy, f"> {reason.threshold:g}", str(reason.flagged), _percent(reason.share)]
        for reason in reasons
    ]
    examples = [f"  {reason.check}: {reason.example}" for reason in reasons if reason.example]
    heading = ["", "one example each, the strongest:"] if examples else []
    return "\n".join([*_aligned(columns, cells), *heading, *examples])


def advice(reasons: Sequence[Reason]) -> str:
    """Returns what to change when too much would be dropped, the check that drops most first."""
    dropping = sorted((r for r in reasons if r.policy == "drop" and r.flagged), key=lambda r: -r.flagged)
    lines = ["What to change (any of these, under `dpo_ext: {quality: …}`):"]
    lines.append("  - nothing here, if these pairs are faulty: mend or replace the data")
    for reason in dropping:
        lines.append(f"  - `policy: {{{reason.check}: flag}}` keeps its {reason.flagged} pairs and records them")
        if reason.setting:
            lines.append(f"  - a higher `{reason.setting}` than {reason.threshold:g} flags fewer")
    lines.append("  - a higher `max_drop_fraction`, if the rest is what you want to train on")
    return "\n".join(lines)


def section(result: AuditResult) -> Section:
    """Returns the outcome as the report's page on the data."""
    held_out = f"{len(result.heldout_rows)} ({_shared(result)} shared prompts)" if result.heldout else "none"
    return Section(
        title="Data",
        summary=_kept_line(result).capitalize() + ".",
        facts=[
            ("pairs audited", result.pairs),
            ("dropped", f"{len(result.dropped)} ({_percent(len(result.dropped) / result.pairs)})"),
            ("training pairs", len(result.train)),
            ("held-out pairs", held_out),
            ("lengths counted in", result.scored.unit),
            ("embedder", result.scored.embedder),
            ("chosen is longer", _change(result, "chosen_longer", _percent)),
            ("mean log length ratio", _change(result, "mean_log_ratio", _signed)),
        ],
        tables=[
            _reasons_table(result),
            *([_sources_table(result)] if result.scored.sources is not None else []),
        ],
        notes=_notes(result),
        data=_data(result),
    )


def _kept_line(result: AuditResult) -> str:
    kept = result.pairs - len(result.dropped)
    line = f"kept {kept} of {result.pairs} pairs, dropped {len(result.dropped)}"
    if result.heldout is None:
        return line + "; none held out"
    sizes = f"{len(result.train)} to train on, {len(result.heldout_rows)} held out"
    return f"{line}; {sizes}, {_shared(result)} prompts in both"


def _shared(result: AuditResult) -> int:
    """Counts the prompts that are in both splits, from the rows that were selected."""
    keys, out = result.scored.keys, result.heldout_rows
    train = np.setdiff1d(np.arange(result.pairs), np.union1d(out, result.dropped))
    return len(np.intersect1d(keys[out], keys[train]))


def _reasons_table(result: AuditResult) -> Table:
    return Table(
        columns=["check", "policy", "threshold", "flagged", "share", "finds", "strongest example"],
        rows=[
            [
                r.check,
                r.policy,
                f"> {r.threshold:g}",
                r.flagged,
                _percent(r.share),
                r.summary,
                r.example or "–",
            ]
            for r in result.reasons
        ],
        caption="Pairs flagged by each check. A pair can be flagged by several.",
    )


def _sources_table(result: AuditResult) -> Table:
    rows = [[name, *figures.values()] for name, figures in _by_source(result).items()]
    return Table(columns=["source", "pairs", "dropped", "training", "held out"], rows=rows, caption="Pairs by source.")


def _by_source(result: AuditResult) -> dict[str, dict[str, int]]:
    labels = np.asarray(result.scored.sources, dtype=object)
    figures = {}
    for name in dict.fromkeys(labels.tolist()):
        of = labels == name
        pairs, dropped, out = int(of.sum()), int(of[result.dropped].sum()), int(of[result.heldout_rows].sum())
        figures[str(name)] = {
            "pairs": pairs,
            "dropped": dropped,
            "train": pairs - dropped - out,
            "heldout": out,
        }
    return figures


def _notes(result: AuditResult) -> list[str]:
    notes = [
        f"{r.flagged} pairs that {r.check} flagged are still in the data: its policy is `flag`."
        for r in result.reasons
        if r.policy == "flag" and r.flagged
    ]
    after = result.length_bias_after
    if _is_biased(after):
        longer, share = (
            ("chosen", after.chosen_longer)
            if after.chosen_longer > after.rejected_longer
            else ("rejected", after.rejected_longer)
        )
        notes.append(
            f"The {longer} answer is the longer one in {_percent(share)} of the pairs kept, so the model can "
            "win by length alone; balance the data, or compare lengths before trusting a higher accuracy."
        )
    if result.scored.unit != "tokens":
        notes.append("Lengths are whitespace words, not tokens: no tokenizer was given.")
    return notes


def _is_biased(bias: LengthBias) -> bool:
    """Tells whether one side is longer far more often than the other, by a sign test without the ties."""
    unequal = bias.pairs * (bias.chosen_longer + bias.rejected_longer) if bias.pairs else 0.0
    if not unequal:
        return False
    distance = abs(bias.chosen_longer * bias.pairs / unequal - 0.5)
    return distance >= _BIAS_POINTS and distance * 2 * math.sqrt(unequal) >= _BIAS_ERRORS


def _data(result: AuditResult) -> dict[str, Any]:
    data: dict[str, Any] = {
        "pairs": result.pairs,
        "dropped": len(result.dropped),
        "train": len(result.train),
        "heldout": len(result.heldout_rows),
        "shared_prompts": _shared(result),
        "length_unit": result.scored.unit,
        "embedder": result.scored.embedder,
        "checks": {
            r.check: {
                "policy": r.policy,
                "threshold": _finite(r.threshold),
                "flagged": r.flagged,
                "share": r.share,
                "example": r.example,
            }
            for r in result.reasons
        },
        "length_bias": {
            "before": _bias_data(result.length_bias_before),
            "after": _bias_data(result.length_bias_after),
        },
    }
    if result.scored.sources is not None:
        data["sources"] = _by_source(result)
    return data


def _bias_data(bias: LengthBias) -> dict[str, float | int | None]:
    return {
        "pairs": bias.pairs,
        "chosen_longer": _finite(bias.chosen_longer),
        "rejected_longer": _finite(bias.rejected_longer),
        "mean_log_ratio": _finite(bias.mean_log_ratio),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _change(result: AuditResult, name: str, show: Any) -> str:
    return f"{show(getattr(result.length_bias_before, name))} → {show(getattr(result.length_bias_after, name))}"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table as lines: the first two columns to the left, figures to the right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (columns, *rows)
    ]
