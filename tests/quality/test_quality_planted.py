"""Each check finds all of the faults planted for it, and hardly anything else, in text and in conversations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import AuditResult, audit
from axolotl_dpo_ext.quality.builtins import pair_checks
from axolotl_dpo_ext.settings import QualitySettings

from .planted_faults import BOS, IMPLIED, MAX_LENGTH, Row, clean_pairs, in_tokens, plant, to_conversations

ROWS, EACH = 2000, 30
# Every check's flags are wanted here, whatever is dropped.
SETTINGS = QualitySettings(max_drop_fraction=1.0)
Planted = dict[str, set[int]]


@pytest.fixture(scope="module")
def faulty(chat_tokenizer: Any) -> tuple[list[Row], Planted]:
    """Rows with every fault, also prompts that are in the test data, and which rows have which."""
    rows, planted = plant(clean_pairs(ROWS), each=EACH, seed=1)
    rows = in_tokens(rows, lambda text: len(chat_tokenizer(text).input_ids))
    sound = set(range(len(rows))) - set().union(*planted.values())
    return rows, {**planted, "leakage": set(sorted(sound)[:EACH])}


@pytest.fixture(scope="module", params=["text", "conversations"])
def audited(request: pytest.FixtureRequest, faulty: tuple[list[Row], Planted], chat_tokenizer: Any) -> AuditResult:
    rows, planted = faulty
    leaked = [rows[row]["prompt"] for row in sorted(planted["leakage"])]
    test = Dataset.from_dict(
        {
            "prompt": [f" {prompt.swapcase()}\n" for prompt in leaked],
            "chosen": ["A good answer."] * EACH,
            "rejected": ["A bad one."] * EACH,
        }
    )
    assert chat_tokenizer.bos_token == BOS
    data = Dataset.from_list(rows if request.param == "text" else to_conversations(rows, planted))
    return audit(data, chat_tokenizer, SETTINGS, max_length=MAX_LENGTH, test=test, holdout=0.1)


def flagged(result: AuditResult, check: str) -> set[int]:
    return {record["row"] for record in result.records if record["check"] == check}


@pytest.mark.parametrize("check", [check.name for check in pair_checks() if check.name != "duplicate"])
def test_a_check_finds_all_of_its_faults_and_hardly_anything_else(
    audited: AuditResult, faulty: tuple[list[Row], Planted], check: str
):
    planted = faulty[1]
    found = flagged(audited, check)
    assert planted[check] <= found, f"missed rows {sorted(planted[check] - found)}"
    implied = set().union(*(planted[fault] for fault, others in IMPLIED.items() if check in others))
    wrong = found - planted[check] - implied
    assert len(wrong) <= 0.001 * (audited.pairs - len(planted[check])), f"wrongly flagged rows {sorted(wrong)}"


def test_of_each_two_duplicates_one_is_found_and_the_other_is_named(
    audited: AuditResult, faulty: tuple[list[Row], Planted]
):
    rows, planted = faulty
    both = planted["duplicate"] | planted["duplicate_original"]
    found = {r["row"]: r["matched_row"] for r in audited.records if r["check"] == "duplicate"}
    assert set(found) <= both
    assert len(found) == EACH
    assert len({rows[row]["prompt"] for row in found}) == EACH
    assert all(rows[row]["prompt"] == rows[other]["prompt"] and row != other for row, other in found.items())


def test_each_dropping_check_drops_what_it_found_and_the_rest_is_kept(
    audited: AuditResult, faulty: tuple[list[Row], Planted]
):
    dropping = ("malformed", "identical", "same_tokens", "length_ratio", "similarity", "duplicate")
    assert {reason.check for reason in audited.reasons if reason.policy == "drop"} == set(dropping)
    assert set(audited.dropped_rows.tolist()) == set().union(*(flagged(audited, check) for check in dropping))
    assert audited.heldout is not None
    assert len(audited.train) + len(audited.heldout) + len(audited.dropped) == len(faulty[0])


def test_no_other_check_applies_to_malformed_pairs(audited: AuditResult, faulty: tuple[list[Row], Planted]):
    malformed = np.isin(np.arange(audited.pairs), sorted(faulty[1]["malformed"]))
    assert np.array_equal(audited.scores["malformed"], malformed)
    for name in audited.scores.keys() - {"malformed", "leakage"}:  # whose prompt leaks is told of all
        assert np.array_equal(np.isnan(audited.scores[name]), malformed), name
