"""What prune chooses, and that what it said beforehand is what it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckptd.core.errors import ConfigError, FormatError
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import SnapshotId
from ckptd.operations.prune import prune, select
from ckptd.tiers.store import Store
from tests.operations.stores import FIRST, SECOND, flip, write

TENSORS = {"model/w": np.ones(4)}


@pytest.fixture
def branched(tmp_path: Path) -> Store:
    """Epoch 1 wrote steps 10, 20, 30; epoch 2 went on from 10 and wrote 15. A killed writer left step 40."""
    for step in (10, 20, 30):
        write(tmp_path, step, TENSORS)
    store = Store.open(tmp_path)
    store.write_record(EpochRecord(FIRST))
    store.write_record(EpochRecord(SECOND, SnapshotId(FIRST, 10)))
    write(tmp_path, 15, TENSORS, epoch=SECOND, job="other")
    (write(tmp_path, 40, TENSORS, epoch=SECOND) / "COMMIT").unlink()
    return store


def steps(names: list[str]) -> list[int]:
    return [int(name.split(".")[0].removeprefix("step-")) for name in names]


@pytest.mark.parametrize(
    ("keep", "kept", "doomed"),
    [(1, [15], [20, 30, 10]), (2, [15, 10], [20, 30]), (3, [15, 10, 30], [20]), (9, [15, 10, 30, 20], [])],
)
def test_the_dead_branch_goes_first(branched: Store, keep: int, kept: list[int], doomed: list[int]) -> None:
    """A dead branch counts as older than anything live, however high its steps; the dry run says what is done."""
    before = select(branched, keep)
    assert steps(before.kept) == kept
    assert steps(before.doomed) == doomed
    assert steps(before.leftovers) == [40]
    assert before.jobs == {"job-1", "other"}
    assert prune(branched, keep) == before
    left = {path.name for path in Path(branched.uri).iterdir() if path.name.startswith("step-")}
    assert left == set(before.kept)


def test_selecting_changes_nothing(branched: Store) -> None:
    before = sorted(Path(branched.uri).rglob("*"))
    select(branched, 1)
    assert sorted(Path(branched.uri).rglob("*")) == before


def test_keep_none_is_refused(branched: Store) -> None:
    with pytest.raises(ConfigError, match="at least the newest"):
        prune(branched, 0)


def test_a_damaged_record_stops_it(branched: Store) -> None:
    """Without knowing the live branch, what would be kept might be the wrong one."""
    flip(Path(branched.uri) / "epochs" / str(SECOND), 30)
    before = sorted(Path(branched.uri).rglob("*"))
    with pytest.raises(FormatError, match="epochs"):
        prune(branched, 1)
    assert sorted(Path(branched.uri).rglob("*")) == before


def test_a_broken_checkpoint_stays(tmp_path: Path) -> None:
    """It may be of a newer version, or worth a rescue."""
    broken = write(tmp_path, 1, TENSORS)
    write(tmp_path, 2, TENSORS)
    flip(broken / "COMMIT", 50)
    selection = prune(Store.open(tmp_path), 1)
    assert (selection.doomed, selection.leftovers) == ([], [])
    assert broken.exists()
