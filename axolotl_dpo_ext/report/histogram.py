"""Histograms as inline SVG, drawn so that one bin with nearly all rows does not hide the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from xml.etree import ElementTree as ET

from axolotl_dpo_ext.report.axes import (
    Frame,
    Key,
    Tick,
    canvas,
    draw_axes,
    draw_bar,
    draw_line,
    draw_remark,
    draw_text,
    inner_ticks,
    labelled,
    legend,
    log_label,
    log_ticks,
)
from axolotl_dpo_ext.vocabulary import Histogram

_MARGIN = 26.0  # px on the right, for half of the last tick's label
_TICK_GAP = 14.0  # px between the tick labels of the vertical axis
_HEADROOM = 1.04
_LOG_SCALE = " (log scale)"


def histogram_chart(histogram: Histogram) -> str:
    """Draws a histogram.

    Bars are as high as log(1 + count): scores of real pairs are often all but a few in one bin, and the few are
    what a check is about. A bin of one row is then still 5 % of the height of one with a million, and an empty
    bin has no bar. The first of two sets is drawn as an outline on a pale ground, the second filled.

    Args:
        histogram: What to draw.

    Returns:
        An ``<svg>`` element. All text is escaped. Pointing at a bin shows its counts.
    """
    svg = canvas(describe(histogram))
    most = max(max(counts) for counts in histogram.counts.values())
    if not most:
        draw_remark(svg, "no values")
        return ET.tostring(svg, encoding="unicode")
    x_range = _x_range(histogram)
    keys, top = legend(_keys(histogram, x_range))
    ends = _place(histogram, x_range[0]), _place(histogram, x_range[1])
    frame = Frame(ends, (0.0, math.log1p(most) * _HEADROOM), top, _MARGIN)
    x_label = histogram.x_label + _LOG_SCALE * histogram.log_x
    x_ticks, y_ticks = _x_ticks(histogram, x_range), _y_ticks(most, frame)
    draw_axes(svg, frame, x_ticks, y_ticks, x_label, histogram.y_label + _LOG_SCALE)
    _draw_bins(svg, frame, histogram)
    if histogram.marker is not None and _is_inside(histogram, x_range):
        x = frame.px(_place(histogram, histogram.marker))
        for kind in ("halo", "marker"):  # the halo parts the line from bars behind it
            draw_line(svg, (x, frame.top), (x, frame.bottom), kind)
    svg.append(keys)
    return ET.tostring(svg, encoding="unicode")


def describe(histogram: Histogram) -> str:
    """Returns the histogram in words for those who cannot see it: title, axes, totals, where most rows are."""
    said = [f"{histogram.title}: {histogram.y_label} by {histogram.x_label}"]
    for name, counts in histogram.counts.items():
        most = max(counts)
        where = _span(histogram, counts.index(most))
        said.append(f"{name}: {sum(counts):,}, most of them ({most:,}) from {where}" if most else f"{name}: none")
    if histogram.marker is not None:
        said.append(f"{histogram.marker_label} {histogram.marker:g}")
    return "; ".join(said) + "."


def _span(histogram: Histogram, number: int) -> str:
    low, high = histogram.edges[number : number + 2]
    return f"{low:.4g} to {high:.4g}".replace("-", "−")


def _place(histogram: Histogram, value: float) -> float:
    return math.log10(value) if histogram.log_x else value


def _x_range(histogram: Histogram) -> tuple[float, float]:
    """Returns the ends of the axis: the bins, and the marker unless the bins would be squeezed into less than half."""
    low, high = histogram.edges[0], histogram.edges[-1]
    if histogram.marker is None:
        return low, high
    wide = min(low, histogram.marker), max(high, histogram.marker)
    return wide if _length(histogram, wide) <= 2 * _length(histogram, (low, high)) else (low, high)


def _length(histogram: Histogram, x_range: tuple[float, float]) -> float:
    return _place(histogram, x_range[1]) - _place(histogram, x_range[0])


def _is_inside(histogram: Histogram, x_range: tuple[float, float]) -> bool:
    return histogram.marker is not None and x_range[0] <= histogram.marker <= x_range[1]


def _x_ticks(histogram: Histogram, x_range: tuple[float, float]) -> list[Tick]:
    low, high = x_range
    round_ones = log_ticks(low, high) if histogram.log_x else []
    if len(round_ones) > 1:
        return [(math.log10(tick), log_label(tick)) for tick in round_ones]
    # Evenly spaced ones, also on a logarithmic axis that is too short for two of 1, 2, 5.
    return [(_place(histogram, tick), label) for tick, label in labelled(inner_ticks(low, high))]


def _y_ticks(most: int, frame: Frame) -> Iterator[Tick]:
    """Yields 0 and round counts, without those whose labels would touch the one below."""
    previous = math.inf
    for count in (0.0, *log_ticks(1.0, float(most))):
        y = math.log1p(count)
        if previous - frame.py(y) >= _TICK_GAP:
            previous = frame.py(y)
            yield y, log_label(count)


def _draw_bins(svg: ET.Element, frame: Frame, histogram: Histogram) -> None:
    sets = list(histogram.counts.items())
    edges = [frame.px(_place(histogram, edge)) for edge in histogram.edges]
    for number, (left, right) in enumerate(pairwise(edges)):
        group = ET.SubElement(svg, "g")
        counts = ", ".join(f"{name} {counts[number]:,}" for name, counts in sets)
        draw_text(group, "title", f"{_span(histogram, number)}: {counts}")
        for (_, of_set), kind in zip(sets, _kinds(histogram), strict=True):
            if of_set[number]:
                draw_bar(group, (left, frame.py(math.log1p(of_set[number]))), (right, frame.bottom), kind)
    if len(sets) == 2:
        steps = _steps(edges, [frame.py(math.log1p(count)) for count in sets[0][1]])
        path = f"M{edges[0]:.1f} {frame.bottom:.1f}{steps}V{frame.bottom:.1f}"
        ET.SubElement(svg, "path", {"class": "outline", "d": path})


def _steps(edges: Sequence[float], heights: Sequence[float]) -> str:
    return "".join(f"V{y:.1f}H{right:.1f}" for right, y in zip(edges[1:], heights, strict=True))


def _kinds(histogram: Histogram) -> list[str]:
    """Returns the CSS class of each set's bars."""
    return ["bar"] if len(histogram.counts) == 1 else ["bar under", "bar"]


def _keys(histogram: Histogram, x_range: tuple[float, float]) -> Iterator[Key]:
    for name, kind in zip(histogram.counts, _kinds(histogram), strict=True):
        yield Key(name, "bar-key", kind, is_bar=True)
    if histogram.marker is not None:
        off = "" if _is_inside(histogram, x_range) else ", off this axis"
        yield Key(f"{histogram.marker_label} {histogram.marker:g}{off}", "marker-key", "marker")
