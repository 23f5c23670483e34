"""Line charts as inline SVG: static, without scripts or fonts, coloured by the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from axolotl_dpo_ext.vocabulary import Chart, Series

Point = tuple[float, float]

COLOURS = 6  # --series-0 to --series-5 in the page's style; a seventh series is the first colour, dashed

_WIDTH, _HEIGHT = 560.0, 300.0
_LEFT, _RIGHT, _BOTTOM = 58.0, 62.0, 46.0
_LEGEND_ROW, _CHARACTER = 20.0, 6.7  # px at the font size of the legend, generous so that names do not touch
_MAX_POINTS = 400  # more than one a pixel cannot be seen and makes the file large
_MAX_MARKED = 30


@dataclass(frozen=True)
class _Frame:
    """Maps data to pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: float

    @property
    def right(self) -> float:
        return _WIDTH - _RIGHT

    @property
    def bottom(self) -> float:
        return _HEIGHT - _BOTTOM

    def px(self, x: float) -> float:
        return _LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - _LEFT)

    def py(self, y: float) -> float:
        return self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top)


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
    legend, top = _legend(chart, colours)
    view = f"0 0 {_WIDTH:g} {_HEIGHT:g}"
    svg = ET.Element("svg", {"viewBox": view, "role": "img", "class": "chart", "aria-label": describe(chart)})
    _text(svg, "title", describe(chart))
    finite = [p for series in chart.series for p in series.points if _is_finite(p)]
    if not finite:
        middle = {"x": _WIDTH / 2, "y": _HEIGHT / 2}
        _text(svg, "text", "no finite values", **middle, anchor="middle", kind="axis-label")
        return ET.tostring(svg, encoding="unicode")
    y_ticks = _y_ticks([y for _, y in finite], chart.baseline)
    frame = _Frame(_x_range([x for x, _ in finite]), (y_ticks[0], y_ticks[-1]), top)
    _axes(svg, frame, chart, y_ticks)
    if chart.baseline is not None and math.isfinite(chart.baseline):
        _line(svg, (_LEFT, frame.py(chart.baseline)), (frame.right, frame.py(chart.baseline)), "baseline")
    for series in chart.series:
        _draw(svg, frame, series, colours[series.name])
    _end_labels(svg, frame, chart.series, colours)
    svg.append(legend)
    return ET.tostring(svg, encoding="unicode")


def describe(chart: Chart) -> str:
    """Returns the chart in words for those who cannot see it: title, axes, first and last values."""
    said = [f"{chart.title}: {chart.y_label or 'value'} by {chart.x_label}"]
    for series in chart.series:
        points = [p for p in series.points if _is_finite(p)]
        if not points:
            said.append(f"{series.name} has no finite values")
        elif len(points) == 1:
            said.append(f"{series.name} is {_short(points[0][1])} at {_short(points[0][0])}")
        else:
            (x0, y0), (x1, y1) = points[0], points[-1]
            said.append(f"{series.name} from {_short(y0)} at {_short(x0)} to {_short(y1)} at {_short(x1)}")
    if chart.baseline is not None:
        said.append(f"baseline {chart.baseline:.3g}")
    return "; ".join(said) + "."


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Returns evenly spaced round numbers that cover the range from ``low`` to ``high``, at least two.

    Args:
        low: Lower end, finite.
        high: Upper end, finite, not below ``low``.
        wanted: About how many intervals.
    """
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-100):  # a constant: room on both sides, scaled to its size
        room = 0.1 * size if size > 1e-12 else 1.0
        low, high = low - room, high + room
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


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


def _axes(svg: ET.Element, frame: _Frame, chart: Chart, y_ticks: Sequence[float]) -> None:
    for tick in y_ticks:
        y = frame.py(tick)
        _line(svg, (_LEFT, y), (frame.right, y), "grid")
        _text(svg, "text", _tick(tick, y_ticks), x=_LEFT - 8, y=y + 4, anchor="end", kind="tick")
    x_ticks = _x_ticks(frame.x)
    for tick in x_ticks:
        x = frame.px(tick)
        _line(svg, (x, frame.bottom), (x, frame.bottom + 4), "axis")
        _text(svg, "text", _tick(tick, x_ticks), x=x, y=frame.bottom + 18, anchor="middle", kind="tick")
    _line(svg, (_LEFT, frame.bottom), (frame.right, frame.bottom), "axis")
    middle = (_LEFT + frame.right) / 2
    _text(svg, "text", chart.x_label, x=middle, y=_HEIGHT - 8, anchor="middle", kind="axis-label")
    centre = (frame.top + frame.bottom) / 2
    label = _text(svg, "text", chart.y_label, x=14, y=centre, anchor="middle", kind="axis-label")
    label.set("transform", f"rotate(-90 14 {centre:g})")


def _x_ticks(x: tuple[float, float]) -> list[float]:
    if x[1] - x[0] == 2.0 and x[0].is_integer():  # a single step, with room on both sides
        return [x[0] + 1.0]
    ticks = [tick for tick in nice_ticks(*x, wanted=6) if x[0] <= tick <= x[1]]
    whole = [tick for tick in ticks if tick.is_integer()]
    return whole if x[1] - x[0] >= 2.0 and len(whole) >= 2 else ticks


def _draw(svg: ET.Element, frame: _Frame, series: Series, colour: int) -> None:
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


def _end_labels(svg: ET.Element, frame: _Frame, series: Sequence[Series], colours: Mapping[str, int]) -> None:
    """Writes the last value of each line at the right edge, pushed apart where two would overlap."""
    ends = []
    for one in series:
        finite = [p for p in one.points if _is_finite(p)]
        if finite:
            ends.append((frame.py(finite[-1][1]), _short(finite[-1][1]), colours[one.name]))
    ends.sort()
    gap = 14.0
    lowest = frame.bottom - gap * (len(ends) - 1)
    previous = -math.inf
    for number, (y, text, colour) in enumerate(ends):
        place = max(min(y, lowest + gap * number), previous + gap)
        previous = place
        group = ET.SubElement(svg, "g", {"class": _series_class(colour)})
        _line(group, (frame.right + 6, place), (frame.right + 13, place), "line key")
        _text(group, "text", text, x=frame.right + 16, y=place + 4, anchor="start", kind="end-label")


def _legend(chart: Chart, colours: Mapping[str, int]) -> tuple[ET.Element, float]:
    """Returns the legend, and the height at which the plot may start below it."""
    legend = ET.Element("g")
    entries: list[tuple[str, str]] = [(s.name, _series_class(colours[s.name])) for s in chart.series]
    if chart.baseline is not None:
        entries.append((f"baseline {chart.baseline:.3g}", "baseline-key"))
    x, y = _LEFT, 12.0
    for name, kind in entries:
        shown = name if len(name) <= 36 else name[:35] + "…"
        width = 26 + len(shown) * _CHARACTER + 14
        if x > _LEFT and x + width > _WIDTH:
            x, y = _LEFT, y + _LEGEND_ROW
        group = ET.SubElement(legend, "g", {"class": kind})
        _line(group, (x, y), (x + 20, y), "baseline" if kind == "baseline-key" else "line")
        _text(group, "text", shown, x=x + 26, y=y + 4, anchor="start", kind="legend")
        x += width
    return legend, y + _LEGEND_ROW


def _series_class(colour: int) -> str:
    dashed = " dashed" if colour // COLOURS % 2 else ""
    return f"series s{colour % COLOURS}{dashed}"


def _line(parent: ET.Element, start: Point, end: Point, kind: str) -> None:
    (x1, y1), (x2, y2) = start, end
    place = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    ET.SubElement(parent, "line", {"class": kind, **place})


def _text(
    parent: ET.Element,
    tag: str,
    text: str,
    *,
    x: float | None = None,
    y: float | None = None,
    anchor: str = "",
    kind: str = "",
) -> ET.Element:
    element = ET.SubElement(parent, tag)
    if x is not None and y is not None:
        element.attrib |= {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": kind}
    element.text = text
    return element


def _tick(value: float, ticks: Sequence[float]) -> str:
    """Returns a tick with just as many decimals as tell it from its neighbours."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    largest = max(abs(tick) for tick in ticks)
    if largest >= 1e6 or step < 1e-4:
        return _exponent(value) if value else "0"
    decimals = next(d for d in range(6) if abs(round(step, d) - step) < step * 1e-6)
    return f"{value + 0.0:,.{decimals}f}".replace("-", "−")


def _short(value: float) -> str:
    """Returns a number with three significant digits, without an exponent where it can be read without."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return _exponent(value)
    if float(value).is_integer():
        return f"{value:.0f}".replace("-", "−")
    decimals = next(digits for limit, digits in ((1, 3), (10, 2), (100, 1), (1e6, 0)) if size < limit)
    return f"{value:.{decimals}f}".replace("-", "−")


def _exponent(value: float) -> str:
    """Returns a very large or small number as ``1.2e7``, which fits where ``1.2e+07`` does not."""
    mantissa, power = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(power)}".replace("-", "−")
