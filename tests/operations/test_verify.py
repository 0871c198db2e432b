"""Every kind of damage is found and named; nothing else is called damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckptd.core.errors import NotFoundError
from ckptd.core.lineage import EpochRecord
from ckptd.operations.verify import verify
from ckptd.tiers.store import Store
from tests.operations.stores import FIRST, flip, newer, write

RANDOM = {"model/w": np.random.default_rng(0).integers(0, 256, 5000).astype("u1")}


def data(place: Path) -> Path:
    return next((place / "data").iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit of a chunk": (lambda place: flip(data(place), 2500), "CRC32C"),
    "bit of the manifest": (lambda place: flip(next((place / "manifest.parquet").iterdir()), 100), "SHA-256"),
    "bit of the objects": (lambda place: flip(place / "objects.msgpack", 3), "SHA-256"),
    "bit of COMMIT": (lambda place: flip(place / "COMMIT", 60), "COMMIT"),
    "data cut short": (lambda place: truncate(data(place)), "expected 5000 bytes, found 4999"),
    "manifest cut short": (lambda place: truncate(next((place / "manifest.parquet").iterdir())), "manifest.parquet"),
    "COMMIT cut short": (lambda place: truncate(place / "COMMIT"), "COMMIT"),
    "COMMIT empty": (lambda place: (place / "COMMIT").write_bytes(b""), "truncated or foreign"),
    "COMMIT foreign": (lambda place: (place / "COMMIT").write_bytes(b'{"format":"torch"}\n'), "not a file of ckptd"),
    "COMMIT newer": (newer, "version"),
    "data missing": (lambda place: data(place).unlink(), "w00000-00000.ckd"),
    "manifest missing": (lambda place: next((place / "manifest.parquet").iterdir()).unlink(), "w00000.parquet"),
    "objects missing": (lambda place: (place / "objects.msgpack").unlink(), "objects.msgpack"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, what: str) -> None:
    """By its own path and through the store: the damaged checkpoint is told, the sound one beside it is not."""
    damage, expected = DAMAGES[what]
    sound = write(tmp_path, 1, RANDOM, {"x": [1, 2, 3]})
    place = write(tmp_path, 2, RANDOM, {"x": [1, 2, 3]})
    assert verify(str(tmp_path), every=True).ok
    damage(place)
    for report in (verify(str(place)), verify(str(tmp_path)), verify(str(tmp_path), every=True)):
        problems = {verdict.name: verdict.problems for verdict in report.verdicts if verdict.problems}
        assert list(problems) == [place.name]
        assert any(expected in problem for problem in problems[place.name])
        assert not report.ok
    assert verify(str(sound)).ok


def test_several_chunks_are_each_told(tmp_path: Path) -> None:
    place = write(tmp_path, 1, RANDOM, chunk_bytes=1000)
    for position in (10, 1500, 4900):
        flip(data(place), position)
    assert len(verify(str(place)).verdicts[0].problems) == 3


def test_the_newest_or_all(tmp_path: Path) -> None:
    places = [write(tmp_path, step, RANDOM) for step in (1, 2)]
    assert [verdict.name for verdict in verify(str(tmp_path)).verdicts] == [places[1].name]
    assert [verdict.name for verdict in verify(str(tmp_path), every=True).verdicts] == [places[1].name, places[0].name]
    flip(data(places[0]), 7)
    assert verify(str(tmp_path)).ok
    assert not verify(str(tmp_path), every=True).ok


def test_a_leftover_is_no_problem(tmp_path: Path) -> None:
    write(tmp_path, 1, RANDOM)
    leftover = write(tmp_path, 2, RANDOM)
    (leftover / "COMMIT").unlink()
    report = verify(str(tmp_path), every=True)
    assert report.ok
    assert report.uncommitted == [leftover.name]
    with pytest.raises(NotFoundError, match="COMMIT"):
        verify(str(leftover))


def test_a_damaged_epoch_record(tmp_path: Path) -> None:
    """Nothing is the newest then: everything is verified, and the record is the problem."""
    write(tmp_path, 1, RANDOM)
    Store.open(tmp_path).write_record(EpochRecord(FIRST))
    flip(tmp_path / "epochs" / str(FIRST), 30)
    report = verify(str(tmp_path))
    assert [(verdict.name[:5], bool(verdict.problems)) for verdict in report.verdicts] == [
        ("step-", False),
        ("epoch", True),
    ]


def test_nothing_to_verify(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NotFoundError, match=str(place)):
            verify(str(place))


def test_a_copied_and_renamed_checkpoint(tmp_path: Path) -> None:
    place = write(tmp_path / "store", 1, RANDOM)
    copied = tmp_path / "best-model"
    place.rename(copied)
    report = verify(str(copied))
    assert report.ok
    assert report.verdicts[0].name == "best-model"


def test_progress_reaches_its_end_over_all_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, RANDOM, {"x": step}, chunk_bytes=1000)
    calls: list[tuple[int, int]] = []
    verify(str(tmp_path), every=True, progress=lambda done, total: calls.append((done, total)))
    assert len({total for _, total in calls}) == 1
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] <= calls[-1][1]
    assert calls[-1][0] >= 0.9 * calls[-1][1]
