"""`dpo_ext: {quality: …}` in real Axolotl runs: what is trained on, what is read again, and what stays Axolotl's."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.integration import runs
from tests.integration.quality_runs import BATCH, FLAG_ALL, PLUGIN, ROWS, SPOILT, keys, lines_of, load, start


def data_page(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "output" / "dpo_report.json").read_text(encoding="utf-8"))
    page: dict[str, Any] = next(section["data"] for section in report["sections"] if section["title"] == "Data")
    return page


def trained_rows(folder: Path, rank: int = 0) -> dict[str, list[list[int]]]:
    rows: dict[str, list[list[int]]] = json.loads((folder / f"rows-of-{rank}.json").read_text(encoding="utf-8"))
    return rows


def assert_trains_on(folder: Path, kept: int, heldout: int) -> None:
    page, rows = data_page(folder), trained_rows(folder)
    assert (page["pairs"], page["dropped"]) == (ROWS, ROWS - kept)
    assert (page["train"], page["heldout"], page["shared_prompts"]) == (kept - heldout, heldout, 0)
    assert (len(rows["train"]), len(rows["heldout"])) == (kept - heldout, heldout)
    assert not {*map(tuple, rows["train"])} & {*map(tuple, rows["heldout"])}
    log = lines_of(folder / "output" / "preference_log.jsonl")
    assert log[0]["max_steps"] == math.ceil((kept - heldout) / BATCH)
    assert [entry["step"] for entry in log if entry["event"] == "train"][-1] == log[0]["max_steps"]


def test_train_uses_what_preprocess_left_and_other_settings_read_the_same_scores(inputs: Path, tmp_path: Path):
    quality: dict[str, Any] = {"holdout": 40}
    prepared = start("preprocess", keys(inputs, quality), tmp_path)
    assert prepared.returncode == 0, runs.tail(prepared)
    assert f"audited {ROWS} pairs" in prepared.stdout
    records = lines_of(tmp_path / "output" / "dpo_quality_records.jsonl")
    assert len({record["row"] for record in records if record["action"] == "drop"}) == SPOILT

    done = start("train", keys(inputs, quality), tmp_path)
    assert done.returncode == 0, runs.tail(done)
    assert_trains_on(tmp_path, ROWS - SPOILT, 40)
    assert f"read the scores of {ROWS} pairs from" in done.stdout
    assert "audited" not in done.stdout
    assert lines_of(tmp_path / "output" / "dpo_quality_records.jsonl") == records

    done = start("train", keys(inputs, {"holdout": 0.25, **FLAG_ALL}), tmp_path)
    assert done.returncode == 0, runs.tail(done)
    assert_trains_on(tmp_path, ROWS, 96)
    assert f"read the scores of {ROWS} pairs from" in done.stdout
    assert "audited" not in done.stdout
    again = lines_of(tmp_path / "output" / "dpo_quality_records.jsonl")
    assert {record["action"] for record in again} == {"flag"}
    assert {record["row"] for record in again} == {record["row"] for record in records}


def test_changed_data_are_scored_anew_and_a_run_without_the_pack_is_as_ever(inputs: Path, tmp_path: Path):
    data = runs.write_rows(tmp_path / "pairs.jsonl", runs.made_pairs())
    source = {"datasets": [{"path": str(data), **runs.CHAT_DATASET}]}
    ours = keys(inputs, {"holdout": 0, **FLAG_ALL}, plugins=[PLUGIN], **source)
    plain = keys(inputs, None, **source)
    fresh, first, off, shorter = load(
        [
            {"keys": plain | {"dataset_prepared_path": "fresh"}},
            {"keys": ours},
            {"keys": plain},
            {"keys": ours | {"sequence_len": 128}},
        ],
        tmp_path,
    )
    assert off == fresh, "Axolotl reads rows that were prepared for the audit"
    assert sorted(first["train"]) == sorted(fresh["train"])
    assert first["train"] == fresh["train"], "unfiltered, our order is not Axolotl's"
    assert first["steps"] == fresh["steps"] == ROWS // BATCH
    assert any(f"audited {ROWS} pairs" in line for line in shorter["log"])

    runs.write_rows(data, runs.made_pairs()[:100])
    # What Axolotl had prepared before the pack was asked for is shuffled: our rows would not be the file's.
    mended, after = load([{"keys": ours}, {"keys": ours | {"shuffle_merged_datasets": False}}], tmp_path)
    assert any("audited 100 pairs" in line for line in mended["log"])
    assert any("read the scores of 100 pairs" in line for line in after["log"])
    asked = [row["messages"][0]["content"] for row in runs.made_pairs()[:100]]
    assert [prompt.removeprefix("<|user|>").partition("<|end|>")[0] for prompt, _ in after["train"]] == asked
    assert (mended["steps"], len(mended["train"])) == (math.ceil(100 / BATCH), 100)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two sources, the second with other field names; 40 of its 124 prompts are in the first too."""
    folder = tmp_path_factory.mktemp("sources")
    rows = runs.made_pairs()
    again = [row | {"rejected": {"role": "assistant", "content": "No, I would rather not."}} for row in rows[:40]]
    renamed = [
        {"messages": row["messages"], "good": row["chosen"], "bad": row["rejected"]} for row in rows[300:] + again
    ]
    runs.write_rows(folder / "first.jsonl", rows[:200])
    runs.write_rows(folder / "second.jsonl", renamed)
    runs.write_rows(folder / "test-of-first.jsonl", rows[190:210])
    runs.write_rows(folder / "test-of-second.jsonl", renamed[80:90])
    return [
        {"path": str(folder / "first.jsonl"), **runs.CHAT_DATASET},
        {"path": str(folder / "second.jsonl"), **runs.CHAT_DATASET, "field_chosen": "good", "field_rejected": "bad"},
    ]


def test_each_source_is_named_and_each_test_set_is_looked_for(
    inputs: Path, sources: list[dict[str, Any]], tmp_path: Path
):
    tests = [{**source, "path": re.sub(r"(\w+)\.jsonl$", r"test-of-\1.jsonl", source["path"])} for source in sources]
    made = keys(inputs, {"holdout": 0.2, **FLAG_ALL}, plugins=[PLUGIN], datasets=sources, output_dir="split")
    tested = made | {"test_datasets": tests}
    parts = [FLAG_ALL, {"policy": FLAG_ALL["policy"] | {"leakage": "drop"}}, {"holdout": 0.1}]
    flag, drop, refuse = (
        tested | {"dpo_ext": {"quality": part}, "output_dir": name}
        for part, name in zip(parts, ("flag", "drop", "refuse"), strict=True)
    )
    split, flagged, dropped, refused = load([{"keys": each} for each in (made, flag, drop, refuse)], tmp_path)

    heldout = {prompt for prompt, _ in split["heldout"]}
    assert len(split["train"]) + len(split["heldout"]) == 200 + 124
    assert not heldout & {prompt for prompt, _ in split["train"]}
    assert len(split["heldout"]) == pytest.approx(0.2 * 324, abs=2)
    records = lines_of(tmp_path / "split" / "dpo_quality_records.jsonl")
    place = {(record["source"], record["row"] - record["source_row"]) for record in records}
    assert place == {(sources[0]["path"], 0), (sources[1]["path"], 200)}

    # Rows 190 to 199, and the six of the first that the second's test set has; of the second ten.
    leaking = [
        record
        for record in lines_of(tmp_path / "flag" / "dpo_quality_records.jsonl")
        if record["check"] == "leakage" and record["action"] == "flag"
    ]
    assert [record["row"] for record in leaking] == [*range(6), *range(190, 200), *range(280, 290)]
    assert (len(flagged["train"]), len(dropped["train"])) == (324, 324 - 26)
    tested_on = {prompt for prompt, _ in dropped["heldout"]}
    assert len(dropped["heldout"]) == len(flagged["heldout"]) == 30
    assert tested_on & {prompt for prompt, _ in flagged["train"]}
    assert not tested_on & {prompt for prompt, _ in dropped["train"]}
    assert dropped["steps"] == math.ceil(298 / BATCH)
    assert "holdout: 0.1, with test_datasets" in refused["stopped"]


@pytest.mark.skipif(not runs.SEVERAL_PROCESSES, reason="Axolotl needs the driver of a CUDA build for several processes")
def test_of_two_processes_one_scores_and_both_have_the_same_rows(
    inputs: Path, sources: list[dict[str, Any]], tmp_path: Path
):
    made = keys(inputs, {"holdout": 0.2, **FLAG_ALL}, datasets=sources)
    launcher = ["--launcher", "accelerate", "--", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = start("train", made | {"max_steps": 2}, tmp_path, *launcher, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, runs.tail(done)
    assert done.stdout.count("audited 324 pairs") == 1, runs.tail(done)
    rows = trained_rows(tmp_path, 0)
    assert trained_rows(tmp_path, 1) == rows
    page = data_page(tmp_path)
    assert (len(rows["train"]), len(rows["heldout"])) == (page["train"], page["heldout"])
    assert {name: figures["pairs"] for name, figures in page["sources"].items()} == {
        sources[0]["path"]: 200,
        sources[1]["path"]: 124,
    }
    for figures in page["sources"].values():
        assert figures["heldout"] == pytest.approx(figures["pairs"] / 5, abs=6)
    records = lines_of(tmp_path / "output" / "dpo_quality_records.jsonl")
    found = [(record["row"], record["check"]) for record in records]
    assert len(found) == len(set(found)) > SPOILT // 2


def test_a_run_stops_before_its_model_is_loaded_when_too_much_would_be_dropped(inputs: Path, tmp_path: Path):
    strict = {"holdout": 0, "max_length_ratio": 1.0}
    made = keys(inputs, strict)
    stopped = start("train", made, tmp_path)
    assert stopped.returncode != 0
    assert re.search(r"length_ratio +drop +> 1 +298 ", stopped.stdout)
    assert "a higher `max_drop_fraction`" in stopped.stdout
    assert "raise QualityStop" not in stopped.stdout, "the table must not be buried in a traceback"
    assert not (tmp_path / "rows-of-0.json").exists()
    assert not (tmp_path / "output" / "model.safetensors").exists()

    (dropped,) = map(int, re.findall(r"would drop (\d+) of 384 pairs", stopped.stdout))
    made = keys(inputs, strict | {"max_drop_fraction": 1}, plugins=[PLUGIN])
    (went_on,) = load([{"keys": made}], tmp_path)
    assert len(went_on["train"]) == ROWS - dropped > 0


def test_single_answers_for_kto(inputs: Path, tmp_path: Path):
    pairs = [row for number, row in enumerate(runs.made_pairs()) if number % 20 not in (7, 14)][:120]
    rows = [
        {
            "prompt": pair["messages"][0]["content"],
            "completion": pair["chosen" if number % 2 else "rejected"]["content"],
            "label": bool(number % 2),
        }
        for number, pair in enumerate(pairs)
    ]
    rows += rows[:6]  # again, and dropped
    rows += [row | {"label": not row["label"]} for row in rows[10:13]]  # contradicted, and flagged
    data = runs.write_rows(tmp_path / "answers.jsonl", rows)
    source = {"path": str(data), "split": "train", "type": "chatml.prompt_pairs"}
    made = keys(inputs, {"holdout": 20}, datasets=[source], rl="kto", remove_unused_columns=False)
    done = start("train", made, tmp_path)
    assert done.returncode == 0, runs.tail(done)
    page, trained = data_page(tmp_path), trained_rows(tmp_path)
    assert (page["pairs"], page["dropped"], page["train"] + page["heldout"]) == (129, 6, 123)
    assert (len(trained["train"]), len(trained["heldout"])) == (page["train"], page["heldout"])
    assert page["heldout"] == pytest.approx(20, abs=1)
    assert page["checks"]["contradiction"]["flagged"] == 6
    assert page["shared_prompts"] == 0
