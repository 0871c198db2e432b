"""The benchmark of protection: it compares the same bytes, and its table says what was missed."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.protection import CONTENDERS, Contender, Sample, markdown, plan_pulls, rows
from ckptd.plan.stripe import PIECE_BYTES, Group, Striping


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_others_pull_what_protection_pulls(k: int, m: int) -> None:
    size = 3 * k * PIECE_BYTES
    striping = Striping(Group(tuple(range(k + m)), m), (size,) * (k + m))
    for number, own in enumerate(plan_pulls(striping, "encode")):
        assert number not in dict(own)
        assert sum(part for _, part in own) == size + (m - 1) * size // k
    (rebuilding,) = plan_pulls(striping, "rebuild")
    assert sum(part for _, part in rebuilding) == k * size
    assert all(part <= size for _, part in rebuilding)


def test_the_table_says_what_was_reached() -> None:
    seconds = {"tcp": 1.0, "flight": 2.0, "encode": 2.5, "rebuild": 5.0, "describe": 0.5}
    samples = {one: [Sample(seconds[one.what], 1.0)] * 3 for one in CONTENDERS}
    found = rows(samples, {"encode": 10**9, "rebuild": 10**9, "seal": 10**9}, 10**9)
    assert [row["name"] for row in found] == [str(one) for one in CONTENDERS]
    encode = found[CONTENDERS.index(Contender("encode", "encode", False))]
    assert (encode["gb_per_s"], encode["of_flight"], encode["of_tcp"]) == (0.4, 0.8, 0.4)
    text = markdown([{"code": "2+1", "rows": found}], argparse.Namespace(size=10**8, rounds=3), (0.0, 0.0))
    (line,) = [line for line in text.splitlines() if line.startswith("| encode |")]
    assert "80% (goal 70%: reached)" in line
    assert "40% (goal 45%: MISSED)" in line
    (line,) = [line for line in text.splitlines() if line.startswith("| rebuild |")]
    assert "40% (goal 50%: MISSED)" in line
