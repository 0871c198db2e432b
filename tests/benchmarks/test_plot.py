"""Charts: where points come to lie, and what is refused."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, bars, log_log


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'circle cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_a_decade_is_as_wide_everywhere() -> None:
    """From corner to corner, in order, whatever the order of the points."""
    svg = log_log("t", "x", "y <s>", {"a": [(1e4, 1.0), (1e2, 0.01), (1e3, 0.1)]})
    ElementTree.fromstring(svg)
    found = circles(svg)
    assert found[0] == (LEFT, HEIGHT - BOTTOM)
    assert found[-1] == (WIDTH - RIGHT, TOP)
    assert found[1] == pytest.approx(((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2), abs=0.1)


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(1.0, -1.0)]])
def test_what_has_no_logarithm(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="positive"):
        log_log("t", "x", "y", {"a": points})


def test_a_bar_is_as_long_as_its_number() -> None:
    svg = bars("t", {"whole <s>": (2.0, 1.0, 2.0), "half": (1.0, 0.5, 1.5)})
    ElementTree.fromstring(svg)
    _, whole, half = (float(width) for width in re.findall(r'<rect .*?width="([\d.]+)"', svg))
    assert whole == pytest.approx(2 * half, abs=0.2)
    with pytest.raises(ValueError, match="positive"):
        bars("t", {})
