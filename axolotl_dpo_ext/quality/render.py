"""Says what an audit found, as text for a terminal; the page of the run report uses the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_dpo_ext.quality.checks.reference_likelihood import foreign_warning

if TYPE_CHECKING:
    from axolotl_dpo_ext.quality.bias import LengthBias
    from axolotl_dpo_ext.quality.result import AuditResult, Reason

# A bias is worth a note if it is large and no accident: ten points from even, and one in a million by chance.
_BIAS_POINTS, _BIAS_P = 0.10, 1e-6


def summary(result: AuditResult) -> str:
    """Returns the outcome as plain text: reasons, what is left, length bias, examples."""
    bias = [f"{name}: {value}" for name, value in bias_lines(result)]
    return "\n".join(
        [
            reasons_text(result.reasons),
            *_not_run(result.reasons),
            "",
            *_source_lines(result),
            kept_line(result),
            *bias,
            *_warnings(result),
        ]
    )


def reasons_text(reasons: Sequence[Reason]) -> str:
    """Returns a table of what each check found, with an example of each below it."""
    if not reasons:
        return "no check was run"
    columns = ["check", "policy", "threshold", "flagged", "share"]
    cells = [[reason.check, reason.policy, f"> {reason.threshold:g}", *found(reason)] for reason in reasons]
    examples = [f"  {reason.check}: {reason.example}" for reason in reasons if reason.example]
    heading = ["", "one example each, the strongest:"] if examples else []
    return "\n".join([*_aligned(columns, cells, left=2), *heading, *examples])


def found(reason: Reason) -> tuple[str, str]:
    """Returns how many pairs a check flagged; not "0" where it had nothing to look at."""
    return (str(reason.flagged), percent(reason.share)) if reason.scored else ("–", "–")


def _not_run(reasons: Sequence[Reason]) -> list[str]:
    """Returns what the checks that had nothing to look at would have needed."""
    return [f"{r.check} had nothing to look at: it needs {r.needs or 'other data'}." for r in reasons if not r.scored]


def advice(reasons: Sequence[Reason]) -> str:
    """Returns what to change when too much would be dropped, the check that drops most first."""
    dropping = sorted((r for r in reasons if r.policy == "drop" and r.flagged), key=lambda r: -r.flagged)
    lines = ["What to change (any of these, under `dpo_ext: {quality: …}`):"]
    lines.append("  - nothing here, if these pairs are faulty: mend or replace the data")
    for reason in dropping:
        lines.append(f"  - `policy: {{{reason.check}: flag}}` keeps its {reason.flagged} pairs and records them")
        if reason.setting:
            # A smallest allowed value is compared the other way round.
            change = "a lower" if reason.setting.startswith("min_") else "a higher"
            lines.append(f"  - {change} `{reason.setting}` flags fewer")
    lines.append("  - a higher `max_drop_fraction`, if the rest is what you want to train on")
    return "\n".join(lines)


def kept_line(result: AuditResult) -> str:
    """Returns how many rows are kept, dropped and held out, in one line."""
    kept = result.pairs - len(result.dropped_rows)
    noun = "pairs" if result.scored.paired else "answers"
    line = f"kept {kept} of {result.pairs} {noun}, dropped {len(result.dropped_rows)}"
    if result.heldout is None:
        return line + "; none held out"
    sizes = f"{len(result.train)} to train on, {len(result.heldout_rows)} held out"
    return f"{line}; {sizes}, {shared_prompts(result)} prompts in both"


def shared_prompts(result: AuditResult) -> int:
    """Counts the prompts that are in both splits, from the rows that were selected."""
    keys, out = result.scored.keys, result.heldout_rows
    train = np.setdiff1d(np.arange(result.pairs), np.union1d(out, result.dropped_rows))
    return len(np.intersect1d(keys[out], keys[train]))


def notes(result: AuditResult) -> list[str]:
    """Returns what is worth knowing before training, one sentence each."""
    noun = "pairs" if result.scored.paired else "answers"
    # What another check drops is gone, also where this one only flags it.
    left = {r.check: _flagged_and_kept(result, r) for r in result.reasons if r.policy == "flag"}
    flagged = [
        f"{n} {noun} that {name} flagged are still in the data: its policy is `flag`." for name, n in left.items() if n
    ]
    return [*_warnings(result), *flagged]


def _flagged_and_kept(result: AuditResult, reason: Reason) -> int:
    flagged = np.flatnonzero(result.scores[reason.check] > reason.threshold)
    return len(np.setdiff1d(flagged, result.dropped_rows, assume_unique=True))


def by_source(result: AuditResult) -> dict[str, dict[str, Any]]:
    """Returns the figures of each source, by its name."""
    names, source = result.scored.source_numbers
    k = len(names)
    pairs = np.bincount(source, minlength=k)
    dropped = np.bincount(source[result.dropped_rows], minlength=k)
    heldout = np.bincount(source[result.heldout_rows], minlength=k)
    flagged = {r.check: np.bincount(source[result.scores[r.check] > r.threshold], minlength=k) for r in result.reasons}
    return {
        str(name): {
            "pairs": int(pairs[i]),
            "dropped": int(dropped[i]),
            "train": int(pairs[i] - dropped[i] - heldout[i]),
            "heldout": int(heldout[i]),
            "flagged": {check: int(counts[i]) for check, counts in flagged.items()},
        }
        for i, name in enumerate(names)
    }


def _source_lines(result: AuditResult) -> list[str]:
    """Returns the figures of several sources as a table."""
    if result.scored.sources is None or len(figures := by_source(result)) < 2:
        return []
    columns = ["source", "rows", "dropped", "training", "held out"]
    keys = ("pairs", "dropped", "train", "heldout")
    cells = [[name, *(str(of[key]) for key in keys)] for name, of in figures.items()]
    return [*_aligned(columns, cells, left=1), ""]


def _warnings(result: AuditResult) -> list[str]:
    """Returns what may spoil the run as a whole, rather than single pairs."""
    words = [] if result.scored.unit == "tokens" else ["Lengths are words, not tokens: no tokenizer was given."]
    return [
        *_prompt_warning(result),
        *_bias_warning(result.length_bias_after),
        *foreign_warning(result.scored.log_likelihood),
        *words,
    ]


def _prompt_warning(result: AuditResult) -> list[str]:
    missing = result.scored.promptless
    if not missing:
        return []
    columns = ", ".join(result.scored.dataset.column_names)
    return [
        f"{missing} of {result.pairs} rows have no prompt (columns: {columns}): they are compared by their answers "
        "alone, so answers to different questions can look contradictory or double, and one question can be on both "
        "sides of the held-out split. Name the prompt's column `prompt`."
    ]


def _bias_warning(bias: LengthBias) -> list[str]:
    unequal = bias.chosen_longer + bias.rejected_longer if bias.pairs else 0.0
    if not unequal or bias.p_value > _BIAS_P or abs(bias.chosen_longer / unequal - 0.5) < _BIAS_POINTS:
        return []
    longer, share = max(("chosen", bias.chosen_longer), ("rejected", bias.rejected_longer), key=lambda side: side[1])
    return [
        f"The {longer} answer is the longer one in {percent(share)} of the pairs kept (sign test: p = "
        f"{bias.p_value:.1g}), so the model can win by length alone; balance the data, or compare lengths before "
        "trusting a higher accuracy."
    ]


def bias_lines(result: AuditResult) -> list[tuple[str, str]]:
    """Returns the length bias before and after as names and values; nothing for unpaired data."""
    lines = (
        []
        if not result.scored.paired
        else [
            ("chosen is longer", _change(result, "chosen_longer", percent)),
            ("mean log length ratio", f"{_change(result, 'mean_log_ratio', _signed)} ({result.scored.unit})"),
            ("sign test of the length bias", f"p = {_change(result, 'p_value', _probability)}"),
        ]
    )
    likely = result.scored.log_likelihood[np.isfinite(result.scored.log_likelihood)]
    if len(likely):
        lines.append(("median log-likelihood under the reference", f"{float(np.median(likely)):.3f} nats a token"))
    return lines


def _change(result: AuditResult, name: str, show: Any) -> str:
    return f"{show(getattr(result.length_bias_before, name))} → {show(getattr(result.length_bias_after, name))}"


def _probability(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.2g}" if value else "0 (below 1e-300)"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "–"


def percent(share: float) -> str:
    """Returns a share as a percentage, for people."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Returns a table as lines: the first ``left`` columns to the left, figures to the right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (columns, *rows)
    ]
