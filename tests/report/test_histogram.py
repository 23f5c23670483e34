"""Histograms: what is drawn is what was counted, few rows stay visible beside many, the threshold is marked."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from axolotl_dpo_ext.report.axes import LEFT, WIDTH, log_ticks
from axolotl_dpo_ext.report.histogram import histogram_chart
from axolotl_dpo_ext.vocabulary import Histogram

EDGES = [0.0, 0.25, 0.5, 0.75, 1.0]


def draw(counts: dict[str, list[int]], edges: list[float] = EDGES, **options) -> ET.Element:
    return ET.fromstring(histogram_chart(Histogram("Similarity", edges, counts, **options)))


def texts(svg: ET.Element, kind: str) -> list[str]:
    return [one.text for one in svg.iter("text") if one.get("class") == kind]


def bars(svg: ET.Element, kind: str = "bar") -> list[tuple[float, float, float]]:
    """Left edge, width and height in pixels of every bar of a class; keys of the legend are left out."""
    bins = [group for group in svg.findall("g") if group.find("title") is not None]
    drawn = [one for group in bins for one in group.findall("rect") if one.get("class") == kind]
    return [tuple(float(one.get(name)) for name in ("x", "width", "height")) for one in drawn]


def markers(svg: ET.Element) -> list[float]:
    return [float(one.get("x1")) for one in svg.findall("line") if one.get("class") == "marker"]


def test_every_bin_that_is_not_empty_has_a_bar_at_its_place():
    found = bars(draw({"all pairs": [5, 0, 1, 5]}))
    width = (WIDTH - 26 - LEFT) / 4

    assert [left for left, _, _ in found] == pytest.approx([LEFT, LEFT + 2 * width, LEFT + 3 * width])
    assert [one for _, one, _ in found] == pytest.approx([width] * 3)
    assert found[0][2] == found[2][2] > found[1][2]


@pytest.mark.parametrize("most", [95, 950_000, 10**9])
def test_a_single_row_is_visible_beside_a_bin_with_nearly_all(most):
    (*_, highest), _, (*_, lowest) = bars(draw({"all pairs": [most, 0, 10, 1]}))

    assert lowest >= 6
    assert highest / lowest == pytest.approx(math.log1p(most) / math.log(2), rel=0.05)


def test_of_two_sets_the_first_is_outlined_and_the_second_filled():
    svg = draw({"all pairs": [9, 4, 3, 2], "kept": [9, 4, 1, 0]})

    assert (len(bars(svg, "bar under")), len(bars(svg))) == (4, 3)
    assert bars(svg, "bar under")[:2] == bars(svg)[:2]
    assert [one.get("d").count("H") for one in svg.findall("path")] == [4]
    assert texts(svg, "legend") == ["all pairs", "kept"]
    assert [one.text for one in svg.findall("g/title")][2:] == [
        "0.5 to 0.75: all pairs 3, kept 1",
        "0.75 to 1: all pairs 2, kept 0",
    ]


def test_axes_are_labelled_and_counts_said_to_be_logarithmic():
    svg = draw({"all pairs": [12_000, 30, 1, 0]}, x_label="cosine", y_label="answers")

    assert texts(svg, "axis-label") == ["cosine", "answers (log scale)"]
    assert texts(svg, "tick") == ["0", "1", "10", "100", "1k", "10k", "0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


@pytest.mark.parametrize("most", [1, 3, 40, 5_000, 10**7, 10**15])
def test_labels_of_counts_do_not_touch(most):
    svg = draw({"all pairs": [most, 1, 0, 0]})
    ticks = [one for one in svg.iter("text") if one.get("class") == "tick" and one.get("text-anchor") == "end"]
    heights = [float(one.get("y")) for one in ticks]

    assert len(heights) >= 2
    assert all(below - above >= 13.9 for below, above in pairwise(heights))


def test_the_text_alternative_gives_totals_the_fullest_bin_and_the_threshold():
    svg = draw({"all pairs": [9500, 0, 3, 2], "kept": [0, 0, 0, 0]}, marker=0.95)

    said = (
        "Similarity: pairs by score; all pairs: 9,505, most of them (9,500) from 0 to 0.25; kept: none; threshold 0.95."
    )
    assert svg.get("aria-label") == svg.find("title").text == said


def test_the_marker_stands_at_its_value():
    svg = draw({"all pairs": [5, 0, 1, 5]}, marker=0.5, marker_label="bound")

    assert markers(svg) == [pytest.approx((LEFT + WIDTH - 26) / 2)]
    assert texts(svg, "legend") == ["all pairs", "bound 0.5"]


def test_the_axis_reaches_to_a_marker_that_is_near():
    svg = draw({"all pairs": [5, 0, 1, 5]}, marker=1.25)

    assert markers(svg) == [pytest.approx(WIDTH - 26)]
    assert bars(svg)[0][1] == pytest.approx((WIDTH - 26 - LEFT) / 5, abs=0.1)


def test_a_marker_far_away_is_named_and_does_not_squeeze_the_bars():
    svg = draw({"all pairs": [5, 0, 1, 5]}, marker=1000.0)

    assert markers(svg) == []
    assert texts(svg, "legend")[1] == "threshold 1000, off this axis"
    assert bars(svg)[0][1] == pytest.approx((WIDTH - 26 - LEFT) / 4, abs=0.1)


def test_a_logarithmic_axis_gives_each_factor_the_same_width():
    svg = draw({"all pairs": [3, 2, 1]}, edges=[1.0, 4.0, 16.0, 64.0], marker=8.0, log_x=True, x_label="ratio")

    assert len({width for _, width, _ in bars(svg)}) == 1
    assert texts(svg, "tick")[-6:] == ["1", "2", "5", "10", "20", "50"]
    assert markers(svg) == [pytest.approx((LEFT + WIDTH - 26) / 2)]
    assert texts(svg, "axis-label")[0] == "ratio (log scale)"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.0, 64.0, [1, 2, 5, 10, 20, 50]),
        (1.0, 1e6, [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
        (1e-3, 1e12, [1e-2, 1, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12]),
        (1.1, 1.4, []),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round_and_few(low, high, ticks):
    assert log_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("edges", "log_x", "labels"),
    [
        ([1.1, 1.25, 1.4], True, ["1.10", "1.15", "1.20", "1.25", "1.30", "1.35", "1.40"]),
        ([0.9999, 0.99995, 1.0], False, ["0.99990", "0.99992", "0.99994", "0.99996", "0.99998", "1.00000"]),
    ],
)
def test_the_numbers_of_a_short_axis_can_be_told_apart(edges, log_x, labels):
    assert texts(draw({"all": [1, 2]}, edges=edges, log_x=log_x), "tick")[3:] == labels


def test_empty_bins_alone_are_said_in_words():
    assert texts(draw({"all pairs": [0, 0, 0, 0]}), "axis-label") == ["no values"]


@pytest.mark.parametrize(
    "edges", [[0.0, 5e-324], [1.0, 1.0 + 3e-16], [-9e299, 9e299], [1e-320, 1e-310], [1.00000001, 1.00000002]]
)
def test_any_range_of_edges_can_be_drawn(edges):
    draw({"all pairs": [1]}, edges=edges)
    if edges[0] > 0:
        draw({"all pairs": [1]}, edges=edges, log_x=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"counts": {}}, "0 sets of counts"),
        ({"counts": {"a": [1] * 4, "b": [1] * 4, "c": [1] * 4}}, "3 sets of counts"),
        ({"counts": {"all": [1] * 5}}, "5 counts of 'all' for 5 edges"),
        ({"edges": [0.0], "counts": {"all": []}}, "0 counts of 'all' for 1 edges"),
        ({"counts": {"all": [1, -1, 0, 0]}}, "a count of 'all' is negative"),
        ({"counts": {"all": [1, math.nan, 0, 0]}}, "a count of 'all' is negative or not finite"),
        ({"edges": [0.0, 0.25, 0.5, 0.75, math.inf]}, "not finite"),
        ({"edges": [math.nan, 0.25, 0.5, 0.75, 1.0]}, "not finite"),
        ({"marker": math.nan}, "not finite"),
        ({"edges": [0.0, 0.5, 0.5, 0.75, 1.0]}, "do not ascend"),
        ({"log_x": True}, "no place for 0"),
        ({"log_x": True, "edges": [1.0, 2.0, 3.0, 4.0, 5.0], "marker": -1.0}, "no place for -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused_where_it_is_made(changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        Histogram(**{"title": "Similarity", "edges": EDGES, "counts": {"all": [1, 2, 3, 4]}} | changes)
    assert str(caught.value).startswith("histogram 'Similarity' cannot be drawn: ")
