"""How the data looks to the reference, from the data set that a trainer with stored log-probabilities holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import likelihood_section
from axolotl_dpo_ext.settings import QualitySettings


def tokenized(per_token: list[tuple[float, float]], length: int = 10) -> Dataset:
    """Returns what TRL's trainer holds: token ids, and sums of log-probabilities of so many nats a token."""
    rows = [
        {
            "prompt_ids": [1, 2],
            "chosen_ids": list(range(length)),
            "rejected_ids": list(range(2 * length)),
            "ref_chosen_logps": chosen * length,
            "ref_rejected_logps": rejected * 2 * length,
        }
        for chosen, rejected in per_token
    ]
    return Dataset.from_list(rows)


def test_outliers_are_counted_against_the_median():
    rng = np.random.default_rng(5)
    usual = [(-1.5 + 0.1 * a, -2.0 + 0.1 * b) for a, b in rng.normal(size=(200, 2))]
    section = likelihood_section(tokenized([*usual, (-9.0, -2.0), (-1.5, -8.0)]))
    assert section is not None
    assert section.data["outliers"] == 2
    assert section.data["median"] == pytest.approx({"chosen": -1.5, "rejected": -2.0}, abs=0.05)
    assert section.summary.startswith("2 of 202 pairs (1.0 %)")
    assert section.notes == []
    assert sum(section.histograms[0].counts["chosen"]) == 202
    json.dumps(section.data, allow_nan=False)
    strict = likelihood_section(
        tokenized([*usual, (-9.0, -2.0)]), settings=QualitySettings(max_likelihood_deviation=0.5)
    )
    assert strict is not None
    assert strict.data["outliers"] > 20


def test_only_the_tokens_that_the_run_keeps_count():
    # The sums are of the six and eight tokens that are left behind a prompt of two.
    rows = tokenized([(-0.6, -0.4)] * 3)
    whole, cut = likelihood_section(rows), likelihood_section(rows, max_length=8)
    assert whole is not None
    assert cut is not None
    assert whole.data["median"] == pytest.approx({"chosen": -0.6, "rejected": -0.4})
    assert cut.data["median"] == pytest.approx({"chosen": -1.0, "rejected": -0.4 * 20 / 6})


def test_data_that_the_reference_does_not_know_is_told():
    section = likelihood_section(tokenized([(-6.0 - i / 100, -5.5) for i in range(20)]))
    assert section is not None
    assert any("looks foreign to the reference model" in note for note in section.notes)


def test_without_log_probabilities_there_is_no_section():
    assert (
        likelihood_section(Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": [[1]], "rejected_ids": [[1]]})) is None
    )
    assert likelihood_section(tokenized([(-1.0, -1.0)]), max_length=2) is None
