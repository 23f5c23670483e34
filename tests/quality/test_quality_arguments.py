"""What is handed to ``audit()`` by mistake is refused with what to pass instead, before anything is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from axolotl_dpo_ext.quality import PairCheck, Scores, SetCheck, audit
from axolotl_dpo_ext.quality.policies import CheckFailedError
from axolotl_dpo_ext.settings import DPOExtSettings, QualitySettings
from axolotl_dpo_ext.vocabulary import ConfigurationError

from .conftest import make_pairs, sentence


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return Dataset.from_dict(make_pairs(20))


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"settings": 3}, TypeError, "settings is a int; pass QualitySettings"),
        ({"settings": {"max_length_ration": 3}}, ConfigurationError, "did you mean 'max_length_ratio'"),
        ({"tokenizer": QualitySettings()}, TypeError, "the tokenizer comes second"),
        ({"tokenizer": {"max_length_ratio": 3}}, TypeError, "the tokenizer comes second"),
        ({"tokenizer": "gpt2"}, TypeError, "pass the tokenizer of the run"),
        ({"holdout": "0.1"}, TypeError, "holdout is '0.1'; pass a fraction such as 0.1"),
        ({"holdout": True}, TypeError, "holdout is True"),
        ({"holdout": -1}, ConfigurationError, "holdout: -1"),
        ({"max_length": 0}, ValueError, "max_length is 0; pass the run's limit in tokens"),
        ({"max_length": 10.5}, ValueError, "max_length is 10.5"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"checks": ["malformed"]}, TypeError, "checks holds 'malformed', which is no check"),
        ({"embedders": [SimpleNamespace(name="mine")]}, TypeError, "which is no embedder; an embedder has a `name`"),
        ({"faults": {99: "broken"}}, ValueError, "faults has the key 99; keys are rows of the data, 0 to 19"),
        ({"faults": {"3": "broken"}}, ValueError, "faults has the key '3'"),
        ({"sources": "origin"}, ValueError, "sources is 'origin', which is none of the columns"),
        ({"sources": ["a"]}, ValueError, "1 labels for 20 rows"),
        ({"test": [{"prompt": "a"}]}, ConfigurationError, "test: list"),
    ],
)
def test_a_wrong_argument_is_refused(pairs: Dataset, given: dict[str, Any], error: type[Exception], told: str):
    with pytest.raises(error) as caught:
        audit(pairs, **given)
    assert told in str(caught.value)


def test_what_is_no_dataset_is_refused_with_how_to_make_one(pairs: Dataset):
    for given, fix in ((DatasetDict(train=pairs), "['train']"), ([{"chosen": "a"}], "Dataset.from_list(rows)")):
        with pytest.raises(ConfigurationError) as caught:
            audit(given)
        assert fix in str(caught.value)


def test_settings_may_be_a_mapping_or_those_of_the_whole_pack(pairs: Dataset):
    for given in ({"holdout": 5}, DPOExtSettings(quality=QualitySettings(holdout=5))):
        assert len(audit(pairs, settings=given).heldout_rows) == 5


def test_sources_may_be_any_labels(pairs: Dataset, tmp_path: Path):
    data = Dataset.from_dict({**pairs.to_dict(), "chosen": [*pairs["chosen"][:10], *pairs["rejected"][10:]]})
    audit(data, sources=[i % 2 for i in range(20)]).write_records(tmp_path / "records.parquet")


class _Faulty(SetCheck):
    name, summary = "faulty", "for tests"

    def __init__(self, sketch: Any, found: Any) -> None:
        self.made, self.found = sketch, found

    def threshold(self, settings):
        return 0.5

    def sketch(self, batch, settings):
        return self.made(batch)

    def compare(self, sketches, settings, read):
        return self.found(len(sketches))


@pytest.mark.parametrize(
    ("sketch", "found", "told"),
    [
        (lambda b: np.zeros(len(b)), lambda n: None, "returned shape ()"),
        (lambda b: np.zeros(len(b)), lambda n: np.zeros(n - 1), "returned shape (19,) for 20 pairs"),
        (lambda b: np.zeros(len(b)), lambda n: Scores(np.ones(n), np.full(n, 99)), "`matched` has to hold"),
        (lambda b: np.zeros(len(b)), lambda n: Scores(np.ones(n), np.zeros(3, int)), "`matched` has to hold"),
        (lambda b: np.zeros(3), lambda n: np.zeros(n), "returned shape (3,)"),
        (lambda b: np.zeros((len(b), len(b))), lambda n: np.zeros(n), "return numbers of one kind and as many"),
        (lambda b: np.array(b.prompts), lambda n: np.zeros(n), "return numbers of one kind and as many"),
    ],
)
def test_a_set_check_that_does_not_deliver_is_named(pairs: Dataset, sketch: Any, found: Any, told: str):
    with pytest.raises(CheckFailedError) as caught:
        audit(pairs, checks=[_Faulty(sketch, found)], batch_size=11)
    assert "quality check 'faulty'" in str(caught.value)
    assert told in str(caught.value)


def test_rethreshold_takes_the_holdout_of_the_new_settings(pairs: Dataset):
    assert len(audit(pairs).rethreshold(QualitySettings(holdout=4)).heldout_rows) == 4
    assert len(audit(pairs, holdout=3).rethreshold(QualitySettings()).heldout_rows) == 3
    assert audit(pairs, holdout=3).rethreshold(QualitySettings(holdout=4), holdout=0).heldout is None


def test_a_policy_for_a_check_that_cannot_see_the_data_is_refused():
    data = Dataset.from_dict({"prompt": ["a", "b"], "completion": [sentence(1), sentence(2)], "label": [True, False]})
    allowed = QualitySettings(policy={"length_ratio": "keep", "malformed": "flag"})
    assert audit(data, settings=allowed).rethreshold(allowed).pairs == 2
    with pytest.raises(ConfigurationError, match="length_ratio: drop, with unpaired data"):
        audit(data, settings=QualitySettings(policy={"length_ratio": "drop"}))


class _Word(PairCheck):
    name, summary = "word", "says the word"

    def __init__(self, word: str) -> None:
        self._word = word

    def threshold(self, settings):
        return 0.5

    def score(self, batch, settings, embedder):
        return np.array([float(self._word in text) for text in batch.chosen])


def test_a_check_that_was_made_with_something_else_is_another_check(pairs: Dataset, tmp_path: Path):
    for word in ("river", "engine", "river"):
        counted = audit(pairs, checks=[_Word(word)], cache=tmp_path).counts["word"]
        assert counted == sum(word in text for text in pairs["chosen"])
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_a_full_disk_does_not_cost_the_audit(
    pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert audit(pairs, cache=tmp_path).pairs == 20
    assert "could not be written" in caplog.text
    assert not list(tmp_path.glob("*.npz")) + list(tmp_path.glob(".*.tmp"))


def test_rows_with_other_tools_are_neither_duplicates_nor_contradictions():
    a, b = sentence(1, 40), sentence(2, 40)
    tools = ['[{"name": "add"}]', '[{"name": "subtract"}]', '[{"name": "add"}]']
    rows = {"prompt": ["Go on."] * 3, "chosen": [a] * 3, "rejected": [b] * 3, "tools": tools}
    assert audit(Dataset.from_dict(rows)).counts["duplicate"] == 1
    swapped = {**rows, "chosen": [a, b, b], "rejected": [b, a, a]}
    assert audit(Dataset.from_dict(swapped)).scores["contradiction"].tolist() == [2, 0, 2]


def test_rows_without_a_prompt_are_told(pairs: Dataset):
    renamed = audit(pairs.rename_column("prompt", "question"))
    assert "20 of 20 rows have no prompt (columns: question, chosen, rejected)" in renamed.summary_table()
    assert any("Name the prompt's column `prompt`" in note for note in renamed.section().notes)
    assert "have no prompt" not in audit(pairs).summary_table()


def test_what_could_not_be_read_is_never_trained_on(pairs: Dataset):
    flag = QualitySettings(policy={"malformed": "flag"})
    result = audit(pairs, settings=flag, faults={3: "pairs.jsonl, line 4: not JSON"})
    assert result.dropped_rows.tolist() == [3]
    assert [(r["row"], r["action"]) for r in result.records] == [(3, "drop")]
    assert result.rethreshold(flag).dropped_rows.tolist() == [3]
