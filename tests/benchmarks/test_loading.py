"""Figures of the loading benchmark from made-up loads."""

from __future__ import annotations

from typing import Any

from benchmarks.loading import CHANGES, _row, _together, markdown, parse_arguments
from benchmarks.loading_worker import CKPTD, DCP, WARM


def load(name: str, seconds: float, read: int, fingerprint: int = 7) -> dict[str, Any]:
    return {"name": name, "cache": WARM, "seconds": seconds, "read": read, "disk": 0, "fingerprint": [fingerprint]}


def rows(ours: float, theirs: float, read: int, fingerprint: int = 7) -> list[Any]:
    ranks = [
        [load(CKPTD, ours / 2, read // 2), load(DCP, theirs, 100)],
        [load(CKPTD, ours, read // 2, fingerprint), load(DCP, theirs, 100)],
    ]
    loads = [_together(each) for each in zip(*ranks, strict=True)]
    return [_row(CHANGES[0], name, WARM, loads, 100, [7]) for name in (CKPTD, DCP)]


def test_time_is_the_slowest_ranks_and_bytes_are_everybodys() -> None:
    ours, theirs = rows(0.5, 1.0, 104)
    assert (ours.seconds.median, ours.read_multiple.median, ours.speedup) == (0.5, 1.04, 2.0)
    assert (theirs.read_multiple.median, theirs.reached) == (2.0, None)
    assert ours.reached
    assert not rows(0.6, 1.0, 104)[0].reached
    assert not rows(0.5, 1.0, 120)[0].reached


def test_other_bytes_are_seen() -> None:
    found = rows(0.5, 1.0, 104, fingerprint=8)
    assert [row.right for row in found] == [False, True]
    assert "ckptd.load (LOADED OTHER BYTES)" in markdown(found, parse_arguments([]))
