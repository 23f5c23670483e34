"""The checks that need more than one pair, or figures of the data: what they flag, with which row, and what not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import AuditResult, audit
from axolotl_dpo_ext.quality.bias import LengthBias
from axolotl_dpo_ext.settings import QualitySettings

from .conftest import make_pairs, of_lengths, sentence

ONLY = {name: "keep" for name in ("similarity", "length_ratio", "minimal_edit", "same_tokens", "identical")}
A, B, C, D = (sentence(900 + i, 40) for i in range(4))


def audited(rows: list[dict[str, Any]], tokenizer: Any = None, **given: Any) -> AuditResult:
    return audit(Dataset.from_list(rows), tokenizer, QualitySettings(policy=ONLY, max_drop_fraction=1.0), **given)


def preferences(*pairs: tuple[str, str], prompt: str = "Which one?") -> list[dict[str, Any]]:
    return [{"prompt": prompt, "chosen": better, "rejected": worse} for better, worse in pairs]


def matched(result: AuditResult, check: str) -> dict[int, int | None]:
    return {record["row"]: record["matched_row"] for record in result.records if record["check"] == check}


@pytest.mark.parametrize(
    ("pairs", "scores", "others"),
    [
        ([(A, B), (B, A)], [2, 2], {0: 1, 1: 0}),
        ([(A, B), (B, C), (C, A)], [3, 3, 3], {0: 1, 1: 2, 2: 0}),
        ([(A, B), (B, C), (A, C)], [0, 0, 0], {}),
        ([(A, B), (B, C), (C, A), (C, D)], [3, 3, 3, 0], {0: 1, 1: 2, 2: 0}),
        ([(A, B), (C, D), (B, A), (D, C)], [2, 2, 2, 2], {0: 2, 2: 0, 1: 3, 3: 1}),
        ([(A, B), (B, A), (B, C), (C, A)], [3, 3, 3, 3], {0: 1, 1: 0, 2: 3, 3: 0}),
        ([(A, A), (A, B)], [0, 0], {}),
    ],
    ids=["reversal", "cycle", "chain", "cycle and tail", "two reversals", "reversal within a cycle", "itself"],
)
def test_contradictions_are_cycles(pairs: list[tuple[str, str]], scores: list[float], others: dict[int, int]):
    result = audited(preferences(*pairs))
    assert result.scores["contradiction"].tolist() == scores
    assert matched(result, "contradiction") == others


def test_opposite_preferences_of_two_prompts_are_no_contradiction():
    rows = preferences((A, B)) + preferences((B, A), prompt="Which other one?")
    assert audited(rows).counts["contradiction"] == 0
    written_otherwise = preferences((A, B)) + preferences((f" {B}\n", A.replace(" ", "  ")), prompt="WHICH  one? ")
    assert matched(audited(written_otherwise), "contradiction") == {0: 1, 1: 0}


def test_an_answer_with_both_labels_is_a_contradiction_in_unpaired_data():
    labels = [(A, True), (B, True), (A, False), (A, True), (C, False)]
    rows = [{"prompt": "Which one?", "completion": answer, "label": label} for answer, label in labels]
    result = audited([*rows, {"prompt": "Another?", "completion": B, "label": False}])
    assert matched(result, "contradiction") == {0: 2, 2: 0, 3: 2}
    # The two copies with one label are duplicates as well; those with different labels are none.
    assert matched(result, "duplicate") == {3: 0}


def test_duplicates_exact_and_near_and_written_otherwise():
    question, other = sentence(1, 30), sentence(2, 30)
    changed = " ".join(["other", *A.split(" ")[1:]])
    base = {"prompt": question, "chosen": A, "rejected": B}
    variations = {
        "exact": base,
        "one word": {**base, "chosen": changed},
        "case": {**base, "prompt": question.upper()},
        "spaces": {**base, "rejected": f"  {B}\n"},
        "another answer": {**base, "rejected": C},
        "another prompt": {**base, "prompt": other},
        "swapped": {**base, "chosen": B, "rejected": A},
    }
    found = {name: audited([base, row]).counts["duplicate"] for name, row in variations.items()}
    assert found == dict.fromkeys(variations, 0) | dict.fromkeys(("exact", "one word", "case", "spaces"), 1)
    accents = ["caf\u00e9 d\u00e9j\u00e0 vu", "cafe\u0301 de\u0301ja\u0300 vu"]
    assert audited([{**base, "chosen": f"{A} {accent}"} for accent in accents]).scores["duplicate"].max() == 1


def test_of_many_copies_one_stays_and_is_named():
    result = audited([{"prompt": "Which?", "chosen": A, "rejected": B}] * 5)
    assert matched(result, "duplicate") == {1: 0, 2: 0, 3: 0, 4: 0}
    assert result.dropped_rows.tolist() == [1, 2, 3, 4]


def test_leakage_names_the_row_of_the_test_data():
    rows = make_pairs(6)
    test = {**make_pairs(3), "prompt": ["Unseen?", f" {rows['prompt'][4].upper()} \n", rows["prompt"][2]]}
    result = audit(Dataset.from_dict(rows), test=Dataset.from_dict(test))
    assert matched(result, "leakage") == {2: 2, 4: 1}
    assert len(result.train) == 6  # flagged; dropped only if that is asked for
    dropping = QualitySettings(policy={"leakage": "drop"})
    assert audit(Dataset.from_dict(rows), None, dropping, test=Dataset.from_dict(test)).dropped_rows.tolist() == [2, 4]


def test_without_test_data_leakage_is_not_zero_but_unknown():
    result = audited(preferences((A, B)))
    assert np.isnan(result.scores["leakage"]).all()
    assert "leakage had nothing to look at: it needs test data." in result.summary_table()


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating")],
)
def test_scores_below_and_equal(chosen: str, rejected: str):
    scores = [(9, 1), (1, 9), (5, 5), (None, 3), (3, None)]
    rows = [row | {chosen: a, rejected: b} for row, (a, b) in zip(distinct(5), scores, strict=True)]
    result = audited(rows)
    assert result.scores["label_noise"].tolist()[:3] == [-8, 8, 0]
    assert np.isnan(result.scores["label_noise"][3:]).all()
    assert np.isnan(result.scores["tie"][3:]).all()
    assert (list(matched(result, "label_noise")), list(matched(result, "tie"))) == ([1], [2])


def test_a_margin_column_serves_too():
    result = audited([row | {"margin": m} for row, m in zip(distinct(4), (0.5, -0.5, 0.0, None), strict=True)])
    assert (list(matched(result, "label_noise")), list(matched(result, "tie"))) == ([1], [2])
    assert next(r.scored for r in result.reasons if r.check == "tie") == 3


def test_a_column_of_text_is_no_score():
    rows = [row | {"score_chosen": "good", "score_rejected": "bad"} for row in distinct(2)]
    assert np.isnan(audited(rows).scores["label_noise"]).all()


def distinct(n: int) -> list[dict[str, Any]]:
    pairs = make_pairs(n)
    return [dict(zip(pairs, row, strict=True)) for row in zip(*pairs.values(), strict=True)]


def test_the_deviation_of_a_likelihood_by_hand():
    # Ten tokens each: -1, -1.2, -1.4, … a token, and one answer of -6.
    per_token = [-1.0, -1.2, -1.4, -1.6, -1.8, -2.0, -6.0, -1.4, None, -1.4]
    sums = [None if value is None else 10 * value for value in per_token]
    rows = [
        row | {"ref_chosen_logps": a, "ref_rejected_logps": b}
        for row, a, b in zip(distinct(5), sums[::2], sums[1::2], strict=True)
    ]
    result = audited(rows, of_lengths(lambda text: 10))
    known = sorted(value for value in per_token if value is not None)
    median = known[4]  # of nine: -1.4
    deviation = 1.4826 * sorted(abs(value - median) for value in known)[4]
    expected = [max(0, (median - min(v for v in pair if v is not None)) / deviation) for pair in _pairs(per_token)]
    assert result.scores["reference_likelihood"] == pytest.approx(expected)
    assert list(matched(result, "reference_likelihood")) == [3]
    assert "median log-likelihood under the reference: -1.400 nats a token" in result.summary_table()
    assert "foreign" not in result.summary_table()


def _pairs(values: list[float | None]) -> list[tuple[float | None, ...]]:
    return list(zip(values[::2], values[1::2], strict=True))


def test_data_that_looks_foreign_to_the_reference_model_is_told():
    rows = [row | {"ref_chosen_logps": -50.0, "ref_rejected_logps": -55.0} for row in distinct(8)]
    result = audited(rows, of_lengths(lambda text: 10))
    (note,) = [note for note in result.section().notes if "foreign" in note]
    assert "half of the answers have less than -5.25 nats a token (perplexity 191)" in note
    assert note in result.summary_table()


def test_one_of_the_two_columns_is_not_enough():
    result = audited([row | {"ref_chosen_logps": -50.0} for row in distinct(2)])
    assert np.isnan(result.scores["reference_likelihood"]).all()


def test_the_sign_test_by_hand():
    # Nine of ten longer: 2 · (1 + 10) / 2¹⁰; the two of equal length do not count.
    bias = LengthBias.of(np.array([0.1] * 9 + [-0.1] + [0.0] * 2 + [math.nan]))
    assert (bias.pairs, bias.chosen_longer, bias.rejected_longer) == (12, 9 / 12, 1 / 12)
    assert bias.p_value == pytest.approx(22 / 1024)
    assert LengthBias.of(np.zeros(3)).p_value == 1
    assert LengthBias.of(np.array([0.1, -0.1])).p_value == 1
    nothing = LengthBias.of(np.array([math.nan]))
    assert nothing.pairs == 0
    assert math.isnan(nothing.p_value)
