"""The audit as a whole: policies, stops, records, report, re-thresholding; on generated and on real pairs."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from axolotl_dpo_ext.plugins import extensions
from axolotl_dpo_ext.quality import AuditResult, PairBatch, PairCheck, QualityStop, audit, builtins
from axolotl_dpo_ext.quality.checks import LengthRatio, Malformed
from axolotl_dpo_ext.settings import QualitySettings
from axolotl_dpo_ext.vocabulary import ConfigurationError

from .conftest import make_pairs, of_lengths, sentence

DEFAULTS = QualitySettings()


def faulty(n: int = 60) -> Dataset:
    """Every third pair is identical, every fifth too long; rows carry their number."""
    pairs = make_pairs(n, prompts=n // 2)
    pairs["rejected"][::3] = pairs["chosen"][::3]
    pairs["chosen"][1::5] = [sentence(9000 + i, 300) for i in range(len(pairs["chosen"][1::5]))]
    return Dataset.from_dict({**pairs, "row": list(range(n))})


def outcome(result: AuditResult) -> tuple[list[int], list[int], str]:
    heldout = result.heldout["row"][:] if result.heldout else []
    return result.train["row"][:], heldout, json.dumps(result.records) + result.summary_table()


class ThirdParty(PairCheck):
    """Flags chosen answers with too many question marks."""

    name = "asks_back"
    summary = "the chosen answer asks back"

    def threshold(self, settings: QualitySettings) -> float:
        return 2.0

    def score(self, batch: PairBatch, settings: QualitySettings, embedder) -> np.ndarray:
        assert all(batch.chosen), "malformed pairs are not shown"
        return np.array([text.count("?") for text in batch.chosen], dtype=np.float64)


def test_sound_pairs_pass_in_their_order(sound: Dataset):
    result = audit(sound, settings=DEFAULTS)
    assert set(result.counts) == set(extensions().pair_checks)
    assert set(result.counts.values()) == {0}
    assert result.train.to_dict() == sound.to_dict()
    assert result.heldout is None
    assert result.records == []


def test_drop_flag_and_keep():
    data = faulty()
    dropped = audit(data, settings=DEFAULTS)
    assert dropped.counts["identical"] == 16  # four of the twenty were then made long
    assert len(dropped.train) == 60 - 28
    flagged = audit(data, settings=QualitySettings(policy={"identical": "flag", "similarity": "flag"}))
    assert len(flagged.train) == 60 - 12
    assert {r["action"] for r in flagged.records if r["check"] == "identical"} == {"flag"}
    assert any("16 pairs that identical flagged" in note for note in flagged.section().notes)
    kept = audit(data, settings=QualitySettings(policy={name: "keep" for name in dropped.counts}))
    assert kept.counts == kept.scores == {}
    assert len(kept.train) == 60
    assert "no check was run" in kept.summary_table()


def test_a_third_partys_check_runs_beside_the_built_in_ones():
    pairs = make_pairs(20)
    pairs["chosen"][4] += " ???"
    pairs["chosen"][5] = ""
    checks = [*builtins.pair_checks(), ThirdParty()]
    result = audit(Dataset.from_dict(pairs), settings=DEFAULTS, checks=checks)
    assert [(r["row"], r["check"], r["action"]) for r in result.records] == [
        (4, "asks_back", "flag"),
        (5, "malformed", "drop"),
    ]


def test_a_check_that_fails_is_named_with_its_rows():
    class Broken(ThirdParty):
        def score(self, batch, settings, embedder):
            return np.zeros(3) if len(batch) > 3 else 1 / 0

    with pytest.raises(
        RuntimeError, match=r"'asks_back' of \S+ failed on rows 0 to 9: ValueError: it returned shape \(3,\) for 10"
    ):
        audit(Dataset.from_dict(make_pairs(12)), settings=DEFAULTS, checks=[Broken()], batch_size=10)


def test_unknown_names_are_all_reported_with_the_nearest():
    settings = QualitySettings(policy={"lenght_ratio": "flag", "zzz": "drop"}, embedder="lexicl")
    with pytest.raises(ConfigurationError) as caught:
        audit(faulty(), settings=settings, holdout=-1)
    text = str(caught.value)
    assert [problem.setting for problem in caught.value.problems] == [
        "dpo_ext.quality.policy.lenght_ratio",
        "dpo_ext.quality.policy.zzz",
        "dpo_ext.quality.embedder",
        "dpo_ext.quality.holdout",
    ]
    assert "did you mean 'length_ratio'?" in text
    assert "did you mean 'lexical'?" in text
    assert "choose from: malformed, doubled_bos, " in text


def test_names_used_twice_and_impossible_default_policies_are_reported():
    class Odd(ThirdParty):
        default_policy = "remove"

    with pytest.raises(ConfigurationError, match="two checks named 'malformed'") as caught:
        audit(faulty(), settings=DEFAULTS, checks=[Malformed(), Malformed(), Odd()])
    assert "default policy 'remove' of" in str(caught.value)


def test_the_run_stops_instead_of_training_on_a_remnant():
    with pytest.raises(QualityStop) as caught:
        audit(faulty(), settings=QualitySettings(max_drop_fraction=0.4))
    text = str(caught.value)
    assert "would drop 28 of 60 pairs (46.7%), more than `max_drop_fraction: 0.4` allows" in text
    assert re.search(r"length_ratio +drop +> 2 +12 +20.0 %", text)
    assert "\n  identical: row 0 (1): chosen '" in text
    assert "`policy: {identical: flag}` keeps its 16 pairs" in text
    assert "a higher `max_length_ratio` flags fewer" in text
    assert {reason.check: reason.flagged for reason in caught.value.reasons}["identical"] == 16
    assert len(audit(faulty(), settings=QualitySettings(max_drop_fraction=28 / 60)).train) == 32


def test_the_run_stops_when_nothing_is_left():
    pairs = make_pairs(5)
    pairs["rejected"] = pairs["chosen"]
    with pytest.raises(QualityStop, match="would drop all 5 pairs"):
        audit(Dataset.from_dict(pairs), settings=QualitySettings(max_drop_fraction=1.0))
    with pytest.raises(QualityStop, match="no pairs"):
        audit(Dataset.from_dict({"chosen": [], "rejected": []}), settings=DEFAULTS)


def test_neither_row_order_nor_batch_size_changes_anything():
    data = faulty()
    result = audit(data, settings=DEFAULTS, holdout=0.2)
    order = random.Random(5).sample(range(60), 60)
    shuffled = audit(data.select(order), settings=DEFAULTS, holdout=0.2, batch_size=7)
    assert sorted(shuffled.train["row"]) == result.train["row"][:]
    assert result.heldout is not None
    assert shuffled.heldout is not None
    assert sorted(shuffled.heldout["row"]) == result.heldout["row"][:]
    for name, scores in result.scores.items():
        assert np.array_equal(shuffled.scores[name], scores[order], equal_nan=True)
    assert outcome(audit(data, settings=DEFAULTS, holdout=0.2, batch_size=13)) == outcome(result)


def test_auditing_what_was_kept_drops_nothing_more():
    again = audit(audit(faulty(), settings=DEFAULTS).train, settings=DEFAULTS)
    assert len(again.dropped) == 0
    assert set(again.counts.values()) == {0}


def test_rethreshold_is_an_audit_without_scoring():
    data, calls = faulty(), []

    def count(texts: list[str], **_: bool) -> dict[str, list[list[int]]]:
        calls.append(len(texts))
        return of_lengths(len)(texts)

    result = audit(data, settings=DEFAULTS, holdout=0.1, tokenizer=count)
    calls.clear()
    stricter = QualitySettings(max_length_ratio=1.1, policy={"identical": "flag"}, max_drop_fraction=1.0)
    again = result.rethreshold(stricter)
    assert not calls
    assert outcome(again) == outcome(audit(data, settings=stricter, holdout=0.1, tokenizer=count))
    assert outcome(again) != outcome(result)
    assert result.rethreshold(DEFAULTS, holdout=0).heldout is None


def test_rethreshold_says_what_it_cannot_do():
    result = audit(faulty(), settings=QualitySettings(policy={"similarity": "keep"}))
    with pytest.raises(ValueError, match="no scores of similarity"):
        result.rethreshold(DEFAULTS)
    with pytest.raises(ValueError, match="'lexical', not 'other'"):
        result.rethreshold(QualitySettings(embedder="other"))
    with pytest.raises(ConfigurationError, match="no check of that name"):
        result.rethreshold(QualitySettings(policy={"x": "drop"}))


def test_records_say_which_row_why_and_show_it(tmp_path: Path):
    pairs = make_pairs(6)
    pairs["rejected"][2] = "word \x1b[31m" + "long " * 500
    result = audit(Dataset.from_dict(pairs), settings=DEFAULTS, sources=["a", "a", "b", "b", "b", "b"])
    (record,) = result.records
    assert (record["row"], record["source"], record["check"], record["action"]) == (
        2,
        "b",
        "length_ratio",
        "drop",
    )
    assert record["score"] > record["threshold"] == 2.0
    assert record["prompt"] == pairs["prompt"][2]
    assert len(record["rejected"]) <= 120
    assert record["rejected"].endswith("…")
    assert "\x1b" not in record["rejected"] + result.summary_table()

    path = tmp_path / "new" / "records.jsonl"
    result.write_records(path)
    first = path.stat().st_ino
    result.write_records(path)
    assert path.stat().st_ino != first  # replaced in one step, not written over
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == result.records
    assert [file.name for file in path.parent.iterdir()] == ["records.jsonl"]


def test_a_failed_write_leaves_the_old_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "records.jsonl"
    path.write_text("old\n", encoding="utf-8")
    result = audit(faulty(), settings=DEFAULTS)
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result.write_records(path)
    assert path.read_text(encoding="utf-8") == "old\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_infinite_scores_are_recorded_as_valid_json(tmp_path: Path):
    class Infinite(ThirdParty):
        def score(self, batch, settings, embedder):
            return np.full(len(batch), np.inf)

    result = audit(Dataset.from_dict(make_pairs(2)), settings=DEFAULTS, checks=[Infinite()])
    result.write_records(tmp_path / "r.jsonl")
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["score"] is None


def test_length_bias_before_and_after():
    long, short = "a " * 30, "b " * 10
    data = Dataset.from_dict(
        {
            "prompt": [f"q{i}" for i in range(8)],
            "chosen": [long, long, long, "a " * 12, "a " * 10, "a " * 8, "a " * 10, ""],
            "rejected": [short, short, short, short, short, short, short, short],
        }
    )
    result = audit(data, settings=DEFAULTS)
    before, after = result.length_bias_before, result.length_bias_after
    assert (before.pairs, after.pairs) == (7, 4)
    assert (before.chosen_longer, before.rejected_longer) == pytest.approx((4 / 7, 1 / 7))
    assert (after.chosen_longer, after.rejected_longer) == pytest.approx((1 / 4, 1 / 4))
    assert before.mean_log_ratio == pytest.approx((3 * np.log(3) + np.log(1.2) + np.log(0.8)) / 7)
    assert after.mean_log_ratio == pytest.approx((np.log(1.2) + np.log(0.8)) / 4)


def test_a_set_in_which_better_means_longer_gets_a_note(sound: Dataset):
    assert not any("longer one" in note for note in audit(sound, settings=DEFAULTS).section().notes)
    pairs = make_pairs(200)
    pairs["chosen"] = [text + " and more of it here for all to see" for text in pairs["chosen"]]
    notes = audit(Dataset.from_dict(pairs), settings=DEFAULTS).section().notes
    assert any(note.startswith("The chosen answer is the longer one in 100.0 % of") for note in notes)
    swapped = Dataset.from_dict({**pairs, "chosen": pairs["rejected"], "rejected": pairs["chosen"]})
    assert any(
        "The rejected answer is the longer" in note for note in audit(swapped, settings=DEFAULTS).section().notes
    )


def test_the_section_has_the_figures_and_is_json():
    result = audit(faulty(), settings=DEFAULTS, holdout=0.25, sources="prompt")
    section = result.section()
    facts, data = dict(section.facts), json.loads(json.dumps(section.data, allow_nan=False))
    assert facts["held out"] == "8 (0 shared prompts)"
    assert facts["lengths counted in"] == "words"
    assert any("no tokenizer was given" in note for note in section.notes)
    assert data["train"] + data["heldout"] + data["dropped"] == data["pairs"] == 60
    assert data["checks"]["identical"]["flagged"] == 16
    assert [row[0] for row in section.tables[0].rows] == list(result.counts)
    assert all(len(row) == len(table.columns) for table in section.tables for row in table.rows)
    assert sum(source["train"] for source in data["sources"].values()) == data["train"]
    counted = audit(faulty(), settings=DEFAULTS, tokenizer=of_lengths(len)).section()
    assert dict(counted.facts)["lengths counted in"] == "tokens"
    assert not any("no tokenizer" in note for note in counted.notes)


def test_a_section_without_any_well_formed_pair_is_json_too():
    data = Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["", ""], "rejected": ["x", "y"]})
    result = audit(data, settings=QualitySettings(policy={"malformed": "flag"}))
    assert json.loads(json.dumps(result.section().data, allow_nan=False))["length_bias"]["after"]["pairs"] == 0
    assert "nan" not in result.summary_table() + str(result.section().facts)


def test_wrong_counts_and_labels_are_refused():
    with pytest.raises(ValueError, match="returned 1 sequences for 180 texts, not one each"):
        audit(faulty(), settings=DEFAULTS, tokenizer=lambda texts, **_: {"input_ids": [[1]]})
    with pytest.raises(ValueError, match="1 labels for 60 rows"):
        audit(faulty(), settings=DEFAULTS, sources=["a"])


def test_the_settings_holdout_is_the_default():
    assert audit(faulty(), settings=QualitySettings(holdout=8)).section().data["heldout"] == 8
    assert audit(faulty(), settings=QualitySettings(holdout=8), holdout=0).heldout is None


def test_real_conversations(sharegpt: Dataset):
    result = audit(sharegpt, settings=DEFAULTS, holdout=0.1)
    ratios = result.scores["length_ratio"]
    assert result.counts["malformed"] == 0
    assert result.counts["length_ratio"] == (ratios > 2).sum() > 30
    assert np.isfinite(result.scores["similarity"]).all()
    assert result.heldout is not None
    assert len(result.train) + len(result.heldout) + len(result.dropped) == 300
    # The system prompt and earlier turns belong to the prompt.
    assert all(text.startswith("system: ") for text in _prompts(result, sharegpt, "system"))
    assert len(audit(result.train, settings=DEFAULTS).dropped) == 0


def _prompts(result: AuditResult, data: Dataset, first: str) -> list[str]:
    openings = [row["conversations"][0]["from"] for row in data]
    return [record["prompt"] for record in result.records if openings[record["row"]] == first]


def test_real_judged_pairs(judged: Dataset):
    with_sources = audit(judged, settings=QualitySettings(max_drop_fraction=0.9), sources="source", holdout=70)
    expected = sum(" ".join(row["chosen"].split()) == " ".join(row["rejected"].split()) for row in judged)
    assert with_sources.counts["identical"] == expected
    assert sum(s["pairs"] for s in with_sources.section().data["sources"].values()) == len(judged)
    # The filter is symmetric in length, so it cannot create a bias that was not there.
    assert abs(with_sources.length_bias_after.mean_log_ratio) <= abs(with_sources.length_bias_before.mean_log_ratio)


def test_importing_the_room_is_cheap():
    code = (
        "import sys, axolotl_dpo_ext.quality, axolotl_dpo_ext.quality.builtins; sys.stdout.write(' '.join(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    loaded = set(done.stdout.split())
    assert "axolotl_dpo_ext.quality.audit" in loaded
    assert not loaded & {"sklearn", "scipy", "datasets", "pandas", "torch", "transformers", "trl", "axolotl"}


def test_the_built_ins_are_registered_through_the_hooks():
    import pluggy

    from axolotl_dpo_ext import hookspecs

    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(builtins)
    assert [c.name for c in manager.hook.pair_checks()[0]] == list(extensions().pair_checks)
    assert [e.name for e in manager.hook.embedders()[0]] == ["lexical"]
    assert LengthRatio.setting in QualitySettings.model_fields
