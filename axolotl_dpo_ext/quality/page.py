"""The page of the run report on the data: what was found, what other thresholds would find, and examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from axolotl_dpo_ext.quality.histograms import histograms
from axolotl_dpo_ext.quality.reading import read_pairs
from axolotl_dpo_ext.quality.render import bias_lines, by_source, found, kept_line, notes, percent, shared_prompts
from axolotl_dpo_ext.quality.text import excerpt
from axolotl_dpo_ext.settings import QualitySettings
from axolotl_dpo_ext.vocabulary import Example, ExampleGroup, Section, Table

if TYPE_CHECKING:
    from axolotl_dpo_ext.quality.bias import LengthBias
    from axolotl_dpo_ext.quality.pairs import Pair
    from axolotl_dpo_ext.quality.result import AuditResult, Reason

_EXAMPLES, _EXCERPT = 3, 600


def section(result: AuditResult) -> Section:
    """Returns the outcome as the report's page on the data."""
    held_out = f"{len(result.heldout_rows)} ({shared_prompts(result)} shared prompts)" if result.heldout else "none"
    dropped = len(result.dropped_rows)
    return Section(
        title="Data",
        summary=kept_line(result).capitalize() + ".",
        facts=[
            ("pairs audited" if result.scored.paired else "answers audited", result.pairs),
            ("dropped", f"{dropped} ({percent(dropped / result.pairs)})"),
            ("to train on", len(result.train)),
            ("held out", held_out),
            ("lengths counted in", result.scored.unit),
            ("embedder", result.scored.embedder),
            *bias_lines(result),
        ],
        tables=[_reasons(result), *_what_if(result), *_sources(result)],
        histograms=histograms(result),
        examples=_examples(result),
        notes=notes(result),
        data=_data(result),
    )


def _reasons(result: AuditResult) -> Table:
    rows = [[r.check, r.policy, f"> {r.threshold:g}", *found(r), _finds(r)] for r in result.reasons]
    caption = "Rows flagged by each check. A row can be flagged by several."
    return Table(columns=["check", "policy", "score", "flagged", "share", "finds"], rows=rows, caption=caption)


def _finds(reason: Reason) -> str:
    return reason.summary if reason.scored or not reason.needs else f"nothing: it needs {reason.needs}"


def _what_if(result: AuditResult) -> list[Table]:
    """Returns which share other thresholds would flag, of the checks whose threshold is a setting."""
    found = {r: _settable(r, result.what_if(r.check)) for r in result.reasons if r.setting and r.scored}
    rows = [
        [r.check, r.setting, ", ".join(_at(threshold, flagged, r, result.pairs) for threshold, flagged in counts)]
        for r, counts in found.items()
    ]
    caption = "Share of rows that other thresholds would flag; `rethreshold()` decides again without a new audit."
    return [Table(columns=["check", "setting", "would flag"], rows=rows, caption=caption)] if rows else []


def _settable(reason: Reason, counts: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Leaves out thresholds that the setting refuses: scores below its bound are not computed."""
    if not reason.setting.startswith("max_") or reason.setting not in QualitySettings.model_fields:
        return list(counts)
    return [(threshold, flagged) for threshold, flagged in counts if _is_allowed(reason.setting, threshold)]


def _is_allowed(setting: str, value: float) -> bool:
    try:
        QualitySettings.model_validate({setting: value})
    except ValidationError:
        return False
    return True


def _at(threshold: float, flagged: int, reason: Reason, pairs: int) -> str:
    now = " (now)" if threshold == reason.threshold else ""
    # The score behind a smallest allowed value is one minus it.
    limit = f"below {round(1 - threshold, 6):g}" if reason.setting.startswith("min_") else f"above {threshold:g}"
    return f"{percent(flagged / pairs)} {limit}{now}"


def _sources(result: AuditResult) -> list[Table]:
    if result.scored.sources is None:
        return []
    figures = by_source(result)
    checks = [reason.check for reason in result.reasons if reason.flagged]
    rows = [
        [name, of["pairs"], of["dropped"], of["train"], of["heldout"], *(of["flagged"][check] for check in checks)]
        for name, of in figures.items()
    ]
    columns = ["source", "rows", "dropped", "training", "held out", *checks]
    return [Table(columns=columns, rows=rows, caption="Rows by source, and those flagged by each check.")]


def _examples(result: AuditResult) -> list[ExampleGroup]:
    return [
        ExampleGroup(f"{reason.check}: {reason.summary}", [_example(result, reason, row) for row in rows])
        for reason in result.reasons
        if (rows := _strongest(result, reason))
    ]


def _strongest(result: AuditResult, reason: Reason) -> list[int]:
    scores = result.scores[reason.check]
    flagged = np.flatnonzero(scores > reason.threshold)
    return [int(row) for row in flagged[np.argsort(-scores[flagged], kind="stable")][:_EXAMPLES]]


def _example(result: AuditResult, reason: Reason, row: int) -> Example:
    score = result.scores[reason.check][row]
    fault = result.scored.faults.get(row) if reason.check == "malformed" else None
    matched = result.scored.matched.get(reason.check)
    other = int(matched[row]) if matched is not None and not reason.matches_test_data else -1
    pair = read_pairs(result.scored.dataset, [row])[0]
    answers = _answers(pair)
    if other >= 0:
        answers += [
            (f"{name} of row {other}", text) for name, text in _answers(read_pairs(result.scored.dataset, [other])[0])
        ]
    return Example(f"{place(result, row)}: {fault or f'{score:.4g}'}", excerpt(pair.prompt, _EXCERPT), answers)


def place(result: AuditResult, row: int) -> str:
    """Returns where a row is, for people."""
    if result.scored.sources is None or result.source_rows is None:
        return f"row {row}"
    return f"{result.scored.sources[row]}, row {result.source_rows[row]}"


def _answers(pair: Pair) -> list[tuple[str, str]]:
    if pair.desirable is not None:
        return [("desirable" if pair.desirable else "undesirable", excerpt(pair.chosen, _EXCERPT))]
    return [("chosen", excerpt(pair.chosen, _EXCERPT)), ("rejected", excerpt(pair.rejected, _EXCERPT))]


def _data(result: AuditResult) -> dict[str, Any]:
    data: dict[str, Any] = {
        "pairs": result.pairs,
        "dropped": len(result.dropped_rows),
        "train": len(result.train),
        "heldout": len(result.heldout_rows),
        "shared_prompts": shared_prompts(result),
        "length_unit": result.scored.unit,
        "embedder": result.scored.embedder,
        "checks": checks_data(result.reasons),
    }
    if result.scored.paired:
        before, after = result.length_bias_before, result.length_bias_after
        data["length_bias"] = {"before": _bias_data(before), "after": _bias_data(after)}
    if result.scored.sources is not None:
        data["sources"] = by_source(result)
    return data


def checks_data(reasons: Sequence[Reason]) -> dict[str, dict[str, Any]]:
    """Returns what each check found, for JSON."""
    return {
        r.check: {
            "policy": r.policy,
            "threshold": _finite(r.threshold),
            "scored": r.scored,
            "flagged": r.flagged,
            "share": r.share,
            "example": r.example,
        }
        for r in reasons
    }


def _bias_data(bias: LengthBias) -> dict[str, float | int | None]:
    return {name: _finite(value) for name, value in vars(bias).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
