"""What all drawings of the report share: canvas, frame, axes, ticks, legend and the way numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

Point = tuple[float, float]
Tick = tuple[float, str]  # a place on an axis and what is written there

WIDTH, HEIGHT = 560.0, 300.0
LEFT, BOTTOM = 58.0, 46.0

_LEGEND_ROW, _CHARACTER = 20.0, 6.7  # px at the font size of the legend, generous so that names do not touch
_MAX_LOG_TICKS = 8


@dataclass(frozen=True)
class Frame:
    """Maps data to pixels.

    Attributes:
        x: Ends of the horizontal axis; on a logarithmic one, of the logarithms.
        y: Ends of the vertical axis.
        top: Height at which the plot starts, in pixels, below the legend.
        margin: Room on the right of the plot, in pixels.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    top: float
    margin: float

    @property
    def right(self) -> float:
        """Right edge of the plot in pixels."""
        return WIDTH - self.margin

    @property
    def bottom(self) -> float:
        """Bottom edge of the plot in pixels."""
        return HEIGHT - BOTTOM

    def px(self, x: float) -> float:
        """Returns the horizontal place of a value in pixels."""
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - LEFT)

    def py(self, y: float) -> float:
        """Returns the vertical place of a value in pixels."""
        return self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top)


@dataclass(frozen=True)
class Key:
    """An entry of a legend: its name, the CSS classes of its group and of its mark, and the mark's shape."""

    name: str
    group: str
    mark: str
    is_bar: bool = False


def canvas(description: str) -> ET.Element:
    """Returns an empty drawing with its text alternative."""
    view = f"0 0 {WIDTH:g} {HEIGHT:g}"
    svg = ET.Element("svg", {"viewBox": view, "role": "img", "class": "chart", "aria-label": description})
    draw_text(svg, "title", description)
    return svg


def draw_remark(svg: ET.Element, remark: str) -> None:
    """Writes in the middle of an empty drawing why it is empty."""
    draw_text(svg, "text", remark, x=WIDTH / 2, y=HEIGHT / 2, anchor="middle", kind="axis-label")


def draw_axes(
    svg: ET.Element, frame: Frame, x_ticks: Iterable[Tick], y_ticks: Iterable[Tick], x_label: str, y_label: str
) -> None:
    """Draws both axes with grid lines, ticks and labels."""
    for place, label in y_ticks:
        y = frame.py(place)
        draw_line(svg, (LEFT, y), (frame.right, y), "grid")
        draw_text(svg, "text", label, x=LEFT - 8, y=y + 4, anchor="end", kind="tick")
    for place, label in x_ticks:
        x = frame.px(place)
        draw_line(svg, (x, frame.bottom), (x, frame.bottom + 4), "axis")
        draw_text(svg, "text", label, x=x, y=frame.bottom + 18, anchor="middle", kind="tick")
    draw_line(svg, (LEFT, frame.bottom), (frame.right, frame.bottom), "axis")
    middle = (LEFT + frame.right) / 2
    draw_text(svg, "text", x_label, x=middle, y=HEIGHT - 8, anchor="middle", kind="axis-label")
    centre = (frame.top + frame.bottom) / 2
    upright = draw_text(svg, "text", y_label, x=14, y=centre, anchor="middle", kind="axis-label")
    upright.set("transform", f"rotate(-90 14 {centre:g})")


def legend(keys: Iterable[Key]) -> tuple[ET.Element, float]:
    """Returns the legend, and the height at which the plot may start below it."""
    drawn = ET.Element("g")
    x, y = LEFT, 12.0
    for key in keys:
        shown = key.name if len(key.name) <= 36 else key.name[:35] + "…"
        width = 26 + len(shown) * _CHARACTER + 14
        if x > LEFT and x + width > WIDTH:
            x, y = LEFT, y + _LEGEND_ROW
        group = ET.SubElement(drawn, "g", {"class": key.group})
        if key.is_bar:
            draw_bar(group, (x, y - 6), (x + 20, y + 5), key.mark)
        else:
            draw_line(group, (x, y), (x + 20, y), key.mark)
        draw_text(group, "text", shown, x=x + 26, y=y + 4, anchor="start", kind="legend")
        x += width
    return drawn, y + _LEGEND_ROW


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


def inner_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Returns those `nice_ticks` that lie within the range, for an axis that ends where the data does."""
    slack = 1e-9 * (high - low)  # a multiple of the step can lie a rounding error beyond an end that it equals
    return [tick for tick in nice_ticks(low, high, wanted) if low - slack <= tick <= high + slack]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers within a logarithmic range: 1, 2, 5 and so on, or, of a long range, powers of ten.

    Args:
        low: Lower end, above 0.
        high: Upper end, finite, not below ``low``.

    Returns:
        At most eight numbers; none if the range is so short that no round number lies in it.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = math.ceil(len(powers) / _MAX_LOG_TICKS)
    for numbers in (
        [float(f"{m}e{power}") for power in powers for m in (1, 2, 5)],
        [float(f"1e{power}") for power in powers if power % every == 0],
    ):
        inside = [number for number in numbers if low <= number <= high]
        if len(inside) <= _MAX_LOG_TICKS:
            break
    return inside


def labelled(ticks: Sequence[float]) -> list[Tick]:
    """Returns evenly spaced ticks with their text: just as many decimals as tell each from its neighbours."""
    if not ticks:
        return []
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0
    if not 1e-3 <= max(abs(tick) for tick in ticks) < 1e6:
        return [(tick, exponent(tick) if tick else "0") for tick in ticks]
    decimals = next((d for d in range(12) if abs(round(step, d) - step) < step * 1e-6), 12)
    return [(tick, f"{tick + 0.0:,.{decimals}f}".replace("-", "−")) for tick in ticks]


def log_label(tick: float) -> str:
    """Returns a tick of a logarithmic axis as text, such as ``0.05``, ``20`` or ``10k``."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if unit <= tick < 1e3 * unit:
            return f"{tick / unit:g}{letter}"
    return f"{tick:g}" if tick == 0 or 1e-3 <= tick < 1e3 else exponent(tick)


def short(value: float) -> str:
    """Returns a number with three significant digits, without an exponent where it can be read without."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return exponent(value)
    if float(value).is_integer():
        return f"{value:.0f}".replace("-", "−")
    decimals = next(digits for limit, digits in ((1, 3), (10, 2), (100, 1), (1e6, 0)) if size < limit)
    return f"{value:.{decimals}f}".replace("-", "−")


def exponent(value: float) -> str:
    """Returns a very large or small number as ``1.2e7``, which fits where ``1.2e+07`` does not."""
    mantissa, power = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(power)}".replace("-", "−")


def draw_line(parent: ET.Element, start: Point, end: Point, kind: str) -> None:
    """Adds a straight line of a CSS class, from pixel to pixel."""
    (x1, y1), (x2, y2) = start, end
    place = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    ET.SubElement(parent, "line", {"class": kind, **place})


def draw_bar(parent: ET.Element, start: Point, end: Point, kind: str) -> None:
    """Adds a rectangle of a CSS class, from its upper left to its lower right pixel."""
    (x1, y1), (x2, y2) = start, end
    size = {"width": f"{x2 - x1:.1f}", "height": f"{y2 - y1:.1f}"}
    ET.SubElement(parent, "rect", {"class": kind, "x": f"{x1:.1f}", "y": f"{y1:.1f}", **size})


def draw_text(
    parent: ET.Element,
    tag: str,
    text: str,
    *,
    x: float | None = None,
    y: float | None = None,
    anchor: str = "",
    kind: str = "",
) -> ET.Element:
    """Adds a text at a place of the drawing, or, without a place, a ``<title>``; returns it."""
    element = ET.SubElement(parent, tag)
    if x is not None and y is not None:
        element.attrib |= {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": kind}
    element.text = text
    return element
