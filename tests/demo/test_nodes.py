"""The second act must be able to fail: each promise about lost nodes, broken in made-up logs, is seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import demo_nodes
import pytest
import staging

from tests.demo.test_verdict import DIGEST, STEPS, Log, verdict


@pytest.fixture
def reference(tmp_path: Path) -> staging.Run:
    log = Log(tmp_path / "reference", with_ckptd=False)
    log.start()
    log.steps(1, STEPS)
    log.end()
    return log.run()


def loss(protected: int = 10) -> demo_nodes.Loss:
    made = demo_nodes.Loss(None, seed=0)  # type: ignore[arg-type]
    made.lost, made.protected, made.trained, made.processes = ("B", "C"), protected, 12, 6
    return made


def after(*, rebuilt: str = "EF", size: int = 100) -> dict[str, dict[str, Any]]:
    """What daemons say: those of the nodes in `rebuilt` have made their part anew."""
    return {
        node: {"slots": [{"rank": rank, "bytes": size}], "counters": {"rebuilt": int(node in rebuilt)}}
        for rank, node in enumerate("AEFD")
    }


def judged(
    tmp_path: Path,
    reference: staging.Run,
    found: dict[str, dict[str, Any]],
    *,
    source: str = "memory",
    shift: float = 0.0,
    weights: str = DIGEST,
    protected: int = 10,
) -> dict[str, bool | None]:
    log = Log(tmp_path / "nodes", with_ckptd=True)
    log.start()
    log.steps(1, 12)
    log.start()
    log.steps(11, STEPS, source, restored=10, shift=shift)
    log.end(weights)
    return verdict(demo_nodes.judge(reference, log.run(), loss(protected), found))


def test_as_promised(tmp_path: Path, reference: staging.Run) -> None:
    found = judged(tmp_path, reference, after())
    assert list(found)[1:5] == [
        "rank 0 on node A",
        "rank 1 on node E (new)",
        "rank 2 on node F (new)",
        "rank 3 on node D",
    ]
    assert all(good is not False for good in found.values())


@pytest.mark.parametrize(
    ("broken", "row"),
    [
        ({"source": "store"}, "nodes went on with step"),
        ({"protected": 11}, "nodes went on with step"),
        ({"shift": 1e-7}, "nodes: weights (SHA-256)"),
        ({"weights": "cd" * 32}, "nodes: weights (SHA-256)"),
    ],
)
def test_what_is_broken_is_seen(tmp_path: Path, reference: staging.Run, broken: dict[str, Any], row: str) -> None:
    assert judged(tmp_path, reference, after(), **broken)[row] is False


def test_bytes_from_elsewhere_are_seen(tmp_path: Path, reference: staging.Run) -> None:
    """A survivor that had to make its part anew, a new node that had it, and nodes without any bytes."""
    found = judged(tmp_path, reference, after(rebuilt="AE"))
    assert [good for name, good in found.items() if name.startswith("rank")] == [False, True, False, True]
    (tmp_path / "nodes").rename(tmp_path / "earlier")
    found = judged(tmp_path, reference, after(size=0))
    assert [good for name, good in found.items() if name.startswith("rank")] == [False] * 4


def test_the_loss_is_drawn_from_the_seed() -> None:
    drawn = [demo_nodes.Loss(None, seed) for seed in range(100)]  # type: ignore[arg-type]
    assert {made.lost for made in drawn} == {("A", "B"), ("A", "C"), ("A", "D"), ("B", "C"), ("B", "D"), ("C", "D")}
    assert drawn[3].lost == demo_nodes.Loss(None, 3).lost  # type: ignore[arg-type]
    assert loss().replaced == ["A", "E", "F", "D"]


def test_a_rank_that_fails_ends_the_others() -> None:
    failing = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    waiting = subprocess.Popen(["sleep", "60"])
    failing.wait(10)
    assert demo_nodes.Launch([waiting, failing]).poll() == 3
    assert waiting.poll() is not None
