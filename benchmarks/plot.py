"""Charts as SVG. `log_log`: a line for each series, decades as a grid, dashes of slope 1. `bars`: one for each name."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 380, 64, 170, 24, 48
COLOURS = ("#1b6ca8", "#c8553d", "#3f8f5b", "#8a5fa8", "#7a6a4f")

Points = Sequence[tuple[float, float]]


def log_log(title: str, across: str, up: str, series: Mapping[str, Points]) -> str:
    """The chart; raises ValueError for coordinates that are not positive, or without any."""
    points = [point for found in series.values() for point in found]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError("a logarithmic chart needs positive numbers")
    x, y = (_Axis([point[axis] for point in points]) for axis in (0, 1))
    across_px, up_px = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(point: tuple[float, float]) -> str:
        return f"{LEFT + x.share(point[0]) * across_px:.1f},{TOP + (1 - y.share(point[1])) * up_px:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-weight="bold">{html.escape(title)}</text>',
    ]
    for decade in x.decades:
        column = LEFT + x.share(10.0**decade) * across_px
        parts.append(f'<path d="M{column:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{column:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">1e{decade}</text>')
    for decade in y.decades:
        height = TOP + (1 - y.share(10.0**decade)) * up_px
        parts.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">1e{decade}</text>')
    centre, middle = LEFT + across_px / 2, TOP + up_px / 2
    parts.append(f'<text x="{centre}" y="{HEIGHT - 12}" text-anchor="middle">{html.escape(across)}</text>')
    parts.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{html.escape(up)}</text>')
    for number, (name, found) in enumerate(series.items()):
        colour, line = COLOURS[number % len(COLOURS)], sorted(found)
        first, last = line[0], line[-1]
        ideal = [first, (last[0], first[1] * last[0] / first[0])]
        if y.low <= math.log10(ideal[1][1]) <= y.high:
            parts.append(f'{_line(map(place, ideal), colour)} stroke-dasharray="3 4" opacity="0.6"/>')
        parts.append(f'{_line(map(place, line), colour)} stroke-width="2"/>')
        for at in map(place, line):
            left, top = at.split(",")
            parts.append(f'<circle cx="{left}" cy="{top}" r="3" fill="{colour}"/>')
        row = TOP + 12 + 18 * number
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{row}" fill="{colour}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _line(places: Iterable[str], colour: str) -> str:
    return f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}"'


class _Axis:
    """Whole decades around some numbers."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self.low = math.floor(math.log10(min(numbers)))
        self.high = max(math.ceil(math.log10(max(numbers))), self.low + 1)

    @property
    def decades(self) -> range:
        return range(self.low, self.high + 1)

    def share(self, number: float) -> float:
        """Where on the axis, from 0 to 1."""
        return (math.log10(number) - self.low) / (self.high - self.low)


BAR, GAP, NAMES = 18, 8, 220


def bars(title: str, values: Mapping[str, Sequence[float]]) -> str:
    """A bar for each (median, least, greatest), with a whisker from least to greatest; raises ValueError for none."""
    greatest = max((max(found) for found in values.values()), default=0.0)
    if greatest <= 0:
        raise ValueError("a chart of bars needs a positive number")
    width, height = NAMES + 420, TOP + (BAR + GAP) * len(values) + GAP
    scale = (width - NAMES - 60) / greatest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="16" font-weight="bold">{html.escape(title)}</text>',
    ]
    for number, (name, (median, least, most)) in enumerate(values.items()):
        top = TOP + GAP + (BAR + GAP) * number
        colour = COLOURS[0] if name.startswith("ckptd") else COLOURS[-1]
        left, middle = NAMES + max(0.0, least) * scale, top + BAR / 2
        length, right = max(0.0, median) * scale, NAMES + max(0.0, most) * scale
        parts += [
            f'<text x="{NAMES - 8}" y="{middle + 4}" text-anchor="end">{html.escape(name)}</text>',
            f'<rect x="{NAMES}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{colour}" opacity="0.8"/>',
            f'<path d="M{left:.1f} {middle}H{right:.1f}" stroke="#222"/>',
            f'<text x="{right + 6:.1f}" y="{middle + 4}">{median:.3g}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
