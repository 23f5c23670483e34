"""Charts: round ticks, gaps where nothing finite is, and nothing lost that can be seen."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from axolotl_dpo_ext.report.axes import nice_ticks
from axolotl_dpo_ext.report.svg import line_chart, thin
from axolotl_dpo_ext.vocabulary import Chart, Series


def draw(*series: Series, **options) -> ET.Element:
    chart = Chart("Loss", series, **options)
    return ET.fromstring(line_chart(chart, {one.name: number for number, one in enumerate(series)}))


def texts(svg: ET.Element, kind: str) -> list[str]:
    return [one.text for one in svg.iter("text") if one.get("class") == kind]


def path_lengths(svg: ET.Element) -> list[int]:
    return [one.get("d").count("L") + 1 for one in svg.iter("path")]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.3, 11.75, [-2.5, 0.0, 2.5, 5.0, 7.5, 10.0, 12.5]),
        (0.688, 0.694, [0.688, 0.69, 0.692, 0.694]),
        (0.0, 0.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_axes_labels_legend_and_last_values():
    svg = draw(
        Series("training", [(0, 0.0), (100, 0.9)]),
        Series("held-out", [(0, 0.1), (100, 0.75)]),
        y_label="fraction",
        baseline=0.5,
    )

    assert texts(svg, "tick") == [
        "0.0",
        "0.2",
        "0.4",
        "0.6",
        "0.8",
        "1.0",
        "0",
        "20",
        "40",
        "60",
        "80",
        "100",
    ]
    assert texts(svg, "axis-label") == ["step", "fraction"]
    assert texts(svg, "legend") == ["training", "held-out", "baseline 0.5"]
    assert set(texts(svg, "end-label")) == {"0.900", "0.750"}
    assert [one.get("class") for one in svg.iter("line")].count("baseline") == 2  # in the plot and its key
    assert svg.find("title").text.startswith("Loss: fraction by step; training from 0 at 0 to 0.900 at 100")


@pytest.mark.parametrize(
    "values",
    [(1e308, -1e308), (0.0, 5e-324), (1.0, 1.0 + 2e-16), (1e-320, 1e-320), (-3.0, -3.0), (1e299, -1e299)],
)
def test_any_range_of_values_can_be_drawn(values):
    draw(Series("a", list(enumerate(values))), baseline=0.0)
    draw(Series("a", [(value, 1.0) for value in values]))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.93751, "0.938"),
        (-5.876, "−5.88"),
        (12.34, "12.3"),
        (123.4, "123"),
        (240.0, "240"),
        (1.2e7, "1.2e7"),
        (-4.5e-5, "−4.5e−5"),
        (9.999e6, "1e7"),
    ],
)
def test_last_values_have_three_digits(value, shown):
    assert texts(draw(Series("a", [(0, 1.0), (1, value)])), "end-label") == [shown]


def test_last_values_do_not_overlap():
    svg = draw(*(Series(name, [(0, 0.0), (9, 1.0 + number / 1e4)]) for number, name in enumerate("abcd")))
    heights = sorted(float(one.get("y")) for one in svg.iter("text") if one.get("class") == "end-label")

    assert min(b - a for a, b in pairwise(heights)) >= 12


def test_a_series_of_one_point_is_a_dot():
    svg = draw(Series("a", [(7, 0.4)]))

    assert path_lengths(svg) == []
    assert [one.get("r") for one in svg.iter("circle")] == ["4"]
    assert texts(svg, "tick")[-1] == "7"


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_point_that_is_not_finite_is_a_gap(odd):
    svg = draw(Series("a", [(0, 1.0), (1, 2.0), (2, odd), (3, 2.0), (4, 3.0), (5, odd), (6, 1.0)]))

    assert path_lengths(svg) == [2, 2]
    assert "nan" not in ET.tostring(svg, encoding="unicode")
    assert "inf" not in ET.tostring(svg, encoding="unicode")


def test_nothing_finite_is_said_in_words():
    assert texts(draw(Series("a", [(0, math.nan)])), "axis-label") == ["no finite values"]


def test_a_seventh_series_differs_from_the_first_by_its_dashes():
    svg = draw(*(Series(name, [(0, 1.0), (1, 2.0)]) for name in "abcdefg"))
    classes = [one.get("class") for one in svg.iter("g") if one.find("path") is not None]

    assert classes[0] == "series s0"
    assert classes[6] == "series s0 dashed"


def test_thinning_keeps_ends_and_extremes():
    points = [(float(x), math.sin(x / 50)) for x in range(5000)]
    points[1234] = (1234.0, 99.0)
    kept = thin(points)

    assert len(kept) <= 402
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (1234.0, 99.0) in kept
    assert kept == sorted(kept)
