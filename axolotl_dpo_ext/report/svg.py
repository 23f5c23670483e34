"""Line charts as inline SVG: static, without scripts or fonts, coloured by the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from xml.etree import ElementTree as ET

from axolotl_dpo_ext.report.axes import (
    LEFT,
    Frame,
    Key,
    Point,
    canvas,
    draw_axes,
    draw_line,
    draw_remark,
    draw_text,
    inner_ticks,
    labelled,
    legend,
    nice_ticks,
    short,
)
from axolotl_dpo_ext.vocabulary import Chart, Series

COLOURS = 6  # --series-0 to --series-5 in the page's style; a seventh series is the first colour, dashed

_END_LABELS = 62.0  # px on the right for the last values
_MAX_POINTS = 400  # more than one a pixel cannot be seen and makes the file large
_MAX_MARKED = 30


def line_chart(chart: Chart, colours: Mapping[str, int]) -> str:
    """Draws a chart.

    A point that is not finite is a gap in its line. A series of one point is a dot.

    Args:
        chart: What to draw.
        colours: Colour number of every series name; it is the page that knows them, so that a series has one
            colour throughout.

    Returns:
        An ``<svg>`` element. All text of the chart is escaped.
    """
    svg = canvas(describe(chart))
    finite = [p for series in chart.series for p in series.points if _is_finite(p)]
    if not finite:
        draw_remark(svg, "no finite values")
        return ET.tostring(svg, encoding="unicode")
    keys, top = legend(_keys(chart, colours))
    y_ticks = _y_ticks([y for _, y in finite], chart.baseline)
    frame = Frame(_x_range([x for x, _ in finite]), (y_ticks[0], y_ticks[-1]), top, _END_LABELS)
    draw_axes(svg, frame, labelled(_x_ticks(frame.x)), labelled(y_ticks), chart.x_label, chart.y_label)
    if chart.baseline is not None and math.isfinite(chart.baseline):
        draw_line(svg, (LEFT, frame.py(chart.baseline)), (frame.right, frame.py(chart.baseline)), "baseline")
    for series in chart.series:
        _draw(svg, frame, series, colours[series.name])
    _end_labels(svg, frame, chart.series, colours)
    svg.append(keys)
    return ET.tostring(svg, encoding="unicode")


def describe(chart: Chart) -> str:
    """Returns the chart in words for those who cannot see it: title, axes, first and last values."""
    said = [f"{chart.title}: {chart.y_label or 'value'} by {chart.x_label}"]
    for series in chart.series:
        points = [p for p in series.points if _is_finite(p)]
        if not points:
            said.append(f"{series.name} has no finite values")
        elif len(points) == 1:
            said.append(f"{series.name} is {short(points[0][1])} at {short(points[0][0])}")
        else:
            (x0, y0), (x1, y1) = points[0], points[-1]
            said.append(f"{series.name} from {short(y0)} at {short(x0)} to {short(y1)} at {short(x1)}")
    if chart.baseline is not None:
        said.append(f"baseline {chart.baseline:.3g}")
    return "; ".join(said) + "."


def thin(points: Sequence[Point], most: int = _MAX_POINTS) -> list[Point]:
    """Returns about ``most`` of the points at most, keeping both ends and every extreme that can be seen."""
    if len(points) <= most:
        return list(points)
    bucket = math.ceil(len(points) / (most // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), bucket):
        inside = range(start, min(start + bucket, len(points)))
        kept |= {min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _is_finite(point: Point) -> bool:
    # Short of the largest float, so that the width of a range is finite too.
    return all(math.isfinite(value) and abs(value) < 1e300 for value in point)


def _x_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 1.0, high + 1.0
    # Steps start at 0; an axis that starts at the first logged one hides how long the start was.
    return (0.0, high) if 0.0 < low <= high / 4 else (low, high)


def _y_ticks(values: Sequence[float], baseline: float | None) -> list[float]:
    shown = [*values, baseline] if baseline is not None and math.isfinite(baseline) else values
    return nice_ticks(min(shown), max(shown))


def _x_ticks(x: tuple[float, float]) -> list[float]:
    if x[1] - x[0] == 2.0 and x[0].is_integer():  # a single step, with room on both sides
        return [x[0] + 1.0]
    ticks = inner_ticks(*x)
    whole = [tick for tick in ticks if tick.is_integer()]
    return whole if x[1] - x[0] >= 2.0 and len(whole) >= 2 else ticks


def _draw(svg: ET.Element, frame: Frame, series: Series, colour: int) -> None:
    group = ET.SubElement(svg, "g", {"class": _series_class(colour)})
    runs = list(_runs(series.points))
    marked = sum(map(len, runs)) <= _MAX_MARKED
    for run in runs:
        pixels = [(frame.px(x), frame.py(y)) for x, y in thin(run)]
        if len(pixels) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)
            ET.SubElement(group, "path", {"class": "line", "d": path})
        # A lone point between two gaps has no line to be seen by.
        for x, y in pixels if marked or len(pixels) == 1 else pixels[-1:]:
            radius = "4" if len(pixels) == 1 else "2.6"
            ET.SubElement(group, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": radius})


def _runs(points: Iterable[Point]) -> Iterator[list[Point]]:
    """Yields the stretches of finite points between gaps."""
    run: list[Point] = []
    for point in points:
        if _is_finite(point):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _end_labels(svg: ET.Element, frame: Frame, series: Sequence[Series], colours: Mapping[str, int]) -> None:
    """Writes the last value of each line at the right edge, pushed apart where two would overlap."""
    ends = []
    for one in series:
        finite = [p for p in one.points if _is_finite(p)]
        if finite:
            ends.append((frame.py(finite[-1][1]), short(finite[-1][1]), colours[one.name]))
    ends.sort()
    gap = 14.0
    lowest = frame.bottom - gap * (len(ends) - 1)
    previous = -math.inf
    for number, (y, text, colour) in enumerate(ends):
        place = max(min(y, lowest + gap * number), previous + gap)
        previous = place
        group = ET.SubElement(svg, "g", {"class": _series_class(colour)})
        draw_line(group, (frame.right + 6, place), (frame.right + 13, place), "line key")
        draw_text(group, "text", text, x=frame.right + 16, y=place + 4, anchor="start", kind="end-label")


def _keys(chart: Chart, colours: Mapping[str, int]) -> Iterator[Key]:
    for series in chart.series:
        yield Key(series.name, _series_class(colours[series.name]), "line")
    if chart.baseline is not None:
        yield Key(f"baseline {chart.baseline:.3g}", "baseline-key", "baseline")


def _series_class(colour: int) -> str:
    dashed = " dashed" if colour // COLOURS % 2 else ""
    return f"series s{colour % COLOURS}{dashed}"
