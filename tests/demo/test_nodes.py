"""The second act must be able to fail: each promise about lost nodes, broken in made-up logs, is seen."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import demo_nodes
import pytest
import staging

from tests.demo.test_verdict import DIGEST, STEPS, Log, verdict


@pytest.fixture
def reference(tmp_path: Path) -> staging.Run:
    return written(tmp_path / "reference", [Part(1, STEPS)], with_ckptd=False)


class Part(NamedTuple):
    """The steps of one launch, and what it says it has restored."""

    first: int
    last: int
    source: str = "none"
    weights: str = ""
    shift: float = 0.0


def weights_of(step: int) -> str:
    return f"{step:064x}"


def written(directory: Path, parts: Sequence[Part], *, with_ckptd: bool = True) -> staging.Run:
    log = Log(directory, with_ckptd=with_ckptd)
    for first, last, source, weights, shift in parts:
        log.start()
        if with_ckptd:
            log.write(0, event="restored", step=first - 1, weights=weights or weights_of(first - 1))
        for step in range(first, last + 1):
            statistics = {"restored": {"step": first - 1, "source": source, "took_s": 0.5, "memory_s": 0.1}}
            found = {"loss": 5.0 - step / 10 + shift, "weights": weights_of(step), "statistics": statistics}
            log.write(0, event="step", step=step, **found)
    log.end()
    return log.run()


def loss(nodes: str, lost: str, protected: int) -> demo_nodes.Loss:
    made = demo_nodes.Loss(None, nodes, random.Random(0), 5)  # type: ignore[arg-type]
    made.lost, made.protected, made.trained, made.processes = tuple(lost), protected, protected + 2, 6
    return made


def after(*, rebuilt: str = "EF", size: int = 100, lent: str = "AE") -> tuple[dict[str, dict[str, Any]], ...]:
    """What daemons say: those of the nodes in `rebuilt` have made their part anew, those in `lent` what others had."""
    four: dict[str, dict[str, Any]] = {
        node: {"slots": [{"rank": rank, "bytes": size}], "counters": {"rebuilt": int(node in rebuilt)}}
        for rank, node in enumerate("AEFD")
    }
    return four, {node: {"counters": {"lent": int(node in lent)}} for node in "AE"}


AGAIN, ALONE = Part(7, 14, "memory"), Part(13, STEPS, "memory", shift=1.0)


def judged(
    tmp_path: Path,
    reference: staging.Run,
    found: tuple[dict[str, dict[str, Any]], ...],
    *,
    again: Part = AGAIN,
    alone: Part = ALONE,
    protected: int = 6,
) -> dict[str, bool | None]:
    run = written(tmp_path / "nodes", [Part(1, 8), again, alone])
    first, second = loss("ABCD", "BC", protected), loss("AEFD", "FD", 12)
    return verdict(demo_nodes.judge(reference, run, first, second, found))


def test_as_promised(tmp_path: Path, reference: staging.Run) -> None:
    """Two nodes train on other samples: what they go on from is compared, not what they come to."""
    found = judged(tmp_path, reference, after())
    assert [name for name in found if name.startswith("rank")] == [
        "rank 0 on node A",
        "rank 1 on node E (new)",
        "rank 2 on node F (new)",
        "rank 3 on node D",
    ]
    assert all(good is not False for good in found.values()), found


@pytest.mark.parametrize(
    ("broken", "row"),
    [
        ({"again": AGAIN._replace(source="store")}, "four nodes went on with step"),
        ({"protected": 7}, "four nodes went on with step"),
        ({"again": AGAIN._replace(weights=DIGEST)}, "four nodes went on with step"),
        ({"again": AGAIN._replace(shift=1e-7)}, "nodes: losses"),
        ({"alone": ALONE._replace(source="store")}, "two nodes went on with step"),
        ({"alone": ALONE._replace(weights=DIGEST)}, "two nodes went on with step"),
        ({"alone": ALONE._replace(first=12)}, "two nodes went on with step"),
        ({"alone": ALONE._replace(last=STEPS - 1)}, "nodes: losses"),
    ],
)
def test_what_is_broken_is_seen(tmp_path: Path, reference: staging.Run, broken: dict[str, Any], row: str) -> None:
    assert judged(tmp_path, reference, after(), **broken)[row] is False


def test_bytes_from_elsewhere_are_seen(tmp_path: Path, reference: staging.Run) -> None:
    """A survivor that had to make its part anew, a new node that had it, and nodes without any bytes."""
    found = judged(tmp_path, reference, after(rebuilt="DE"))
    assert not found["rank 2 on node F (new)"]
    assert not found["rank 3 on node D"]
    (tmp_path / "nodes").rename(tmp_path / "earlier")
    found = judged(tmp_path, reference, after(size=0, lent="A"))
    assert not any(good for name, good in found.items() if "(new)" in name or name.endswith("node D"))
    assert found["then rank 0 on node A"]
    assert not found["then rank 1 on node E"]


def test_the_loss_is_drawn_from_the_seed() -> None:
    drawn = [demo_nodes.Loss(None, "ABCD", random.Random(seed), 5) for seed in range(100)]  # type: ignore[arg-type]
    assert {made.lost for made in drawn} == {("A", "B"), ("A", "C"), ("A", "D"), ("B", "C"), ("B", "D"), ("C", "D")}
    assert loss("ABCD", "BC", 6).replaced == ["A", "E", "F", "D"]
    assert loss("AEFD", "FD", 6).left == ["A", "E"]


def test_a_rank_that_fails_ends_the_others() -> None:
    failing = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    waiting = subprocess.Popen(["sleep", "60"])
    failing.wait(10)
    assert demo_nodes.Launch([waiting, failing]).poll() == 3
    assert waiting.poll() is not None
