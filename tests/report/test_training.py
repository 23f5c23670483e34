"""The training section says what the log says, and draws the right conclusions from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from axolotl_dpo_ext.report import headline, training_section
from axolotl_dpo_ext.vocabulary import Chart, Section
from tests.report.preference_logs import BETA, end, good_run, measured, start, write


def section_of(folder: Path, records: list[dict], tail: str = "") -> Section:
    section = training_section(write(folder, records, tail))
    assert section is not None
    return section


def chart(section: Section, title: str) -> Chart:
    return next(one for one in section.charts if one.title == title)


def points(section: Section, title: str, series: str) -> list[tuple[float, float]]:
    return list(next(one for one in chart(section, title).series if one.name == series).points)


def test_data_holds_the_heldout_figures_before_and_after(tmp_path):
    heldout = section_of(tmp_path, good_run()).data["heldout"]

    expected = {"before": 0.0, "before_step": 0, "after": 0.9375, "after_step": 20}
    assert heldout["accuracy"] == expected
    assert heldout["margin_per_beta"] == pytest.approx(expected | {"after": 11.75})
    assert heldout["before_is_tie"] is True


def test_facts_give_steps_beta_loss_and_time(tmp_path):
    facts = dict(section_of(tmp_path, good_run()).facts)

    assert facts["steps"] == "20 of 20"
    assert (facts["beta"], facts["loss"]) == (BETA, "sigmoid")
    assert facts["held-out accuracy"] == "0.000 (step 0) → 0.938 (step 20)"
    assert facts["started"] == "2023-11-14 22:13 UTC"
    assert facts["duration"] == "1 min 5 s"


def test_charts_are_in_units_that_compare_across_betas(tmp_path):
    section = section_of(tmp_path, good_run())

    assert points(section, "Margin ÷ beta", "held-out") == [
        (0, 0),
        (10, pytest.approx(5.25)),
        (20, pytest.approx(11.75)),
    ]
    assert points(section, "Margin ÷ beta", "training")[-1] == (20, pytest.approx(12.0))
    assert points(section, "Rewards ÷ beta, held-out", "chosen")[-1] == (20, pytest.approx(0.5))
    assert points(section, "Rewards ÷ beta, held-out", "rejected")[-1] == (20, pytest.approx(-11.25))
    assert points(section, "Reward accuracy", "training")[0] == (5, pytest.approx(0.6))
    assert chart(section, "Reward accuracy").baseline == 0.5


@pytest.mark.parametrize(
    ("loss_type", "baseline"), [(["sigmoid"], math.log(2)), (["ipo"], None), (["sigmoid", "sft"], None)]
)
def test_ln_2_is_a_baseline_of_the_sigmoid_loss_only(tmp_path, loss_type, baseline):
    section = section_of(tmp_path, [start(loss_type=loss_type), *good_run()[1:]])

    assert chart(section, "Loss").baseline == baseline


def test_a_good_run_is_only_told_why_step_0_measures_no_accuracy(tmp_path):
    (note,) = section_of(tmp_path, good_run()).notes

    assert "At step 0 the policy still equals the reference" in note
    assert "says nothing. Chance is 0.5" in note


@pytest.mark.parametrize(
    ("records", "said"),
    [
        pytest.param(
            [start(), measured("eval", 0, 0.4, 3.0), measured("eval", 20, 0.9, 9.0), end()],
            "held-out margin ÷ beta is 3.00 nats where 0 is expected",
            id="reference differs at step 0",
        ),
        pytest.param(
            [start(), measured("eval", 10, 0.7, 1.0), measured("eval", 20, 0.4375, -1.0), end()],
            "ends at 0.438 (step 20), no better than the 0.5",
            id="at chance",
        ),
        pytest.param(
            [start(), *(measured("train", s, 0.5, 0.001) for s in (5, 10, 20)), end()],
            "stayed within 0.001 of ln 2 = 0.6931 for 20 steps (last 0.6931)",
            id="stuck",
        ),
        pytest.param([start(), measured("train", 20, 0.9, 4.0), end()], "no held-out evaluation", id="no held-out set"),
        pytest.param(
            [start(), measured("eval", 20, 0.9, 4.0), end()],
            "only one held-out evaluation (step 20)",
            id="one",
        ),
        pytest.param(
            [start(), *good_run()[1:-1], measured("eval", 20, 0.9, 30.0, chosen=-12.5), end()],
            "-12.5 nats for chosen and -42.5 nats for rejected",
            id="chosen fell",
        ),
        pytest.param(
            [
                start(),
                *(measured("train", s, 1.0, 9.0) for s in (5, 10, 15)),
                measured("eval", 10, 0.875, 5.0),
                measured("eval", 20, 0.75, 6.0),
                end(),
            ],
            "fell from 0.875 (step 10) to 0.750 (step 20)",
            id="overfit",
        ),
        pytest.param(
            [start(max_steps=50), measured("train", 20, 0.9, 4.0), end(reason="stopped_early")],
            "stopped by a callback at step 20 of 50",
            id="stopped early",
        ),
        pytest.param(
            [start(), measured("train", 5, 0.5, 1.0), measured("train", 10, 0.5, 1.0, loss="nan"), end()],
            "loss was NaN or infinite once, first at step 10",
            id="not finite",
        ),
    ],
)
def test_diagnoses(tmp_path, records, said):
    notes = section_of(tmp_path, records).notes

    assert [note for note in notes if said in note], notes
    assert said not in " ".join(section_of(tmp_path, good_run()).notes)


def test_a_loss_other_than_sigmoid_is_not_called_stuck_at_ln_2(tmp_path):
    stuck = [measured("train", step, 0.5, 0.001) for step in (5, 10, 20)]

    assert "ln 2" not in " ".join(section_of(tmp_path, [start(loss_type=["hinge"]), *stuck, end()]).notes)


def test_a_killed_run_is_read_up_to_its_last_whole_line(tmp_path):
    section = section_of(tmp_path, good_run()[:4], tail='{"event": "eval", "step": 10, "rewards/accur')

    assert section.data["steps"] == 10
    assert section.data["ended"] is None
    assert [note for note in section.notes if "up to step 10 of 20" in note]
    assert [note for note in section.notes if "cut short" in note]


def test_a_broken_line_in_the_middle_is_counted_and_skipped(tmp_path):
    path = write(tmp_path, good_run())
    path.write_text(path.read_text().replace("\n", "\n[1, 2]\n", 1))
    section = training_section(path)

    assert section.data["heldout"]["accuracy"]["after"] == 0.9375
    assert [note for note in section.notes if note.startswith("1 line of the log")]


def test_non_finite_values_become_gaps_not_errors(tmp_path):
    records = [start(), measured("train", 5, 0.5, 1.0), measured("train", 10, 0.5, 1.0, loss="-inf"), end()]

    assert points(section_of(tmp_path, records), "Loss", "training")[-1] == (10, -math.inf)


@pytest.mark.parametrize("records", [[], [start()], [start(), end(0)]])
def test_no_measurement_no_section(tmp_path, records):
    assert training_section(write(tmp_path, records)) is None


def test_a_missing_log_is_no_section(tmp_path):
    assert training_section(tmp_path / "preference_log.jsonl") is None


def test_the_kept_model_is_the_best_checkpoint_where_that_was_loaded(tmp_path):
    section = section_of(tmp_path, [*good_run()[:-1], end(best_step=10)])

    assert section.data["heldout"]["accuracy"]["after"] == 0.8125
    assert dict(section.facts)["kept model"] == "best checkpoint, step 10"


def test_every_evaluation_set_is_reported_under_its_name(tmp_path):
    records = [
        start(),
        *(measured("eval", step, 0.6, 1.0, dataset="easy") for step in (10, 20)),
        *(measured("eval", step, 0.4, -1.0, dataset="hard") for step in (10, 20)),
        end(),
    ]
    section = section_of(tmp_path, records)

    assert section.data["heldout"]["accuracy"]["after"] == 0.6
    assert section.data["heldout"]["datasets"]["hard"]["accuracy"]["after"] == 0.4
    assert {s.name for s in chart(section, "Reward accuracy").series} == {"held-out easy", "held-out hard"}
    assert [note for note in section.notes if "on hard ends at 0.400" in note]


def test_without_beta_rewards_are_shown_as_they_are(tmp_path):
    section = section_of(tmp_path, [start(beta=None), *good_run()[1:]])

    assert section.data["heldout"]["margin_per_beta"] is None
    assert points(section, "Margin", "held-out")[-1] == (20, pytest.approx(1.175))


def test_the_time_between_two_parts_of_a_run_is_not_counted(tmp_path):
    resumed = [
        *good_run()[:4],
        start(resumed_at=10, time=1_700_009_000.0),
        measured("eval", 20, 0.9, 9.0, time=1_700_009_010.0),
        end(time=1_700_009_010.0),
    ]
    facts = dict(section_of(tmp_path, resumed).facts)

    assert facts["duration"] == "20 s"
    assert facts["resumed at step"] == "10"


def test_headline_of_a_section(tmp_path):
    accuracy, margin = headline(section_of(tmp_path, good_run())).splitlines()

    assert accuracy.startswith("held-out accuracy:    0.000 at step 0 -> 0.938 at step 20")
    assert "ties" in accuracy
    assert margin == "held-out margin/beta: 0.00 nats at step 0 -> 11.75 nats at step 20"


def test_headline_without_heldout_pairs_says_so(tmp_path):
    text = headline(section_of(tmp_path, [start(), measured("train", 20, 0.9, 4.0), end()]))

    assert text == "training:             accuracy 0.900, loss 0.513 at step 20; no held-out evaluation"


def test_headline_is_ascii_even_with_non_finite_figures(tmp_path):
    records = [start(), measured("eval", 0, 0.0, 0.0), measured("eval", 20, 0.0, math.nan), end()]

    assert "-> nan nats at step 20" in headline(section_of(tmp_path, records))
    assert headline(section_of(tmp_path, records)).isascii()


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "train", "step": Infinity}',
        '{"event": "eval", "step": 4, "loss": ' + "9" * 400 + "}",
        '{"event": "train", "step": ' + "9" * 400 + "}",
        '{"event": "start", "time": "abc", "beta": 0.1}',
        '{"event": "start", "time": 1e308, "beta": 0.1}',
        '{"event": "end", "time": NaN, "step": 20}',
        "[" * 100_000,
        "5",
    ],
)
def test_no_line_can_make_a_log_unreadable(tmp_path, line):
    write(tmp_path, good_run()[:-1], tail=line + "\n")
    section = training_section(tmp_path / "preference_log.jsonl")
    assert section is not None
    assert section.data["heldout"]["accuracy"]["after"] is not None
