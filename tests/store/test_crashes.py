"""Power is lost at every point of every way of writing; afterwards each checkpoint is old or new, and whole.

The story: a checkpoint tool that renames before it syncs works for years, until a machine room loses power and the
newest checkpoint has a valid name and holes in its data. Here every operation of a save is followed by every legal loss
of unsynced data (tests/simulated_disk.py), and the same test is then shown to fail if any one sync or rename is left
out.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckptd.core.errors import CkptdError, FormatError, StoreError
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import SnapshotId
from ckptd.tiers.store import Store
from ckptd.tiers.store.files import FileBackEnd
from tests.simulated_disk import Operation, SimulatedDisk
from tests.store.samples import JOB, Memory, Tensors, equal, identity, read, shared_objects, split, tensors, write

OLD, NEW = identity(1), identity(2)
RECORD = EpochRecord(identity(1, 2).epoch, OLD)
CONTENTS: dict[SnapshotId, Tensors] = {
    name: {k: v for k, v in tensors(name.step).items() if k in ("model/weight", "model/step", "model/empty")}
    for name in (OLD, NEW, identity(3))
}


class LostError(AssertionError):
    """What the enumeration found to be broken after a crash."""


class Witness:
    """What has been promised so far, checked against every crash after every operation."""

    thorough = True

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self.store = Store(FileBackEnd(self.disk), "simulated")
        self.must: set[SnapshotId] = set()
        self.may: set[SnapshotId] = set()
        self.records: set[EpochRecord] = set()
        self.possible_records: set[EpochRecord] = set()
        self._seen: set[object] = set()
        self.recovered = 0

    def watch(self) -> None:
        self.disk.after = lambda operation: self.check()

    def check(self) -> None:
        promised = (
            frozenset(self.must),
            frozenset(self.may),
            frozenset(self.records),
            frozenset(self.possible_records),
        )
        for crashed in self.disk.crashes(len(self._seen), self.thorough):
            fingerprint = (crashed.fingerprint(), promised)
            if fingerprint not in self._seen:
                self._seen.add(fingerprint)
                self._check_crashed(crashed)

    def _check_crashed(self, crashed: SimulatedDisk) -> None:
        store = Store(FileBackEnd(crashed), "crashed")
        found = set(store.checkpoints())
        if not self.must <= found <= self.may:
            raise LostError(f"promised {self.must}, possible {self.may}, found {found}")
        try:
            records = set(store.records())
        except FormatError as error:
            raise LostError(f"torn record: {error}") from None
        if not self.records <= records <= self.possible_records:
            raise LostError(f"records {self.records} became {records}")
        for name in found:
            checkpoint = store.reader(name)
            problems = checkpoint.verify()
            if problems or not equal(read(checkpoint), CONTENTS[name]):
                raise LostError(f"{name}: {problems}")
        if len(self._seen) % 8 == 0:
            self._check_recovery(store)

    def _check_recovery(self, store: Store) -> None:
        """The next flush of the same step works over whatever was left."""
        self.recovered += 1
        for name in self.may - set(store.checkpoints()):
            write(store, name, CONTENTS[name])
            assert store.reader(name).verify() == []
        store.clean()
        assert store.broken() == []

    def save(self, name: SnapshotId, writers: int = 1) -> None:
        """Writes a checkpoint, every writer on a node of its own, and promises it."""
        self.may.add(name)
        root = self.store.writer(name, JOB)
        parts = []
        for number, share in enumerate(split(CONTENTS[name], writers)):
            on_node = (
                Store(FileBackEnd(self.disk.on_node(number)), "simulated").writer(name, JOB, joined=True)
                if number
                else root
            )
            memory = Memory(share, writer=number)
            parts.append(on_node.part(number).write(memory.catalog, memory.read))
        root.commit(parts, shared_objects(name.step))
        self.must.add(name)
        self.check()


def save(witness: Witness) -> None:
    """A first checkpoint."""
    witness.watch()
    witness.save(NEW)


def save_with_two_writers(witness: Witness) -> None:
    """Two daemons flush one checkpoint, next to an older one."""
    witness.save(OLD)
    witness.watch()
    witness.save(NEW, writers=2)


def save_over_a_leftover(witness: Witness) -> None:
    """An attempt died after its data and some metadata; the same step is flushed again."""
    died = witness.store.writer(NEW, "died")
    witness.may.add(NEW)
    share = {key: (dtype, array + 1) for key, (dtype, array) in CONTENTS[NEW].items()}
    memory = Memory(share)
    died.part(0).write(memory.catalog, memory.read)
    witness.watch()
    witness.save(NEW)


def prune(witness: Witness) -> None:
    """The older of two is removed."""
    witness.save(OLD)
    witness.save(NEW)
    witness.must.remove(OLD)
    witness.watch()
    assert witness.store.prune(keep=1) == [OLD]
    witness.may.remove(OLD)
    witness.check()


def record_an_epoch(witness: Witness) -> None:
    """A restart writes its restore point."""
    witness.save(OLD)
    witness.watch()
    witness.possible_records.add(RECORD)
    witness.store.write_record(RECORD)
    witness.records.add(RECORD)
    witness.check()


Scenario = Callable[[Witness], None]
SCENARIOS: list[Scenario] = [save, save_with_two_writers, save_over_a_leftover, prune, record_an_epoch]
NEEDED = ("sync", "sync_directory", "rename")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_every_crash_leaves_old_or_new_and_whole(scenario: Scenario) -> None:
    witness = Witness()
    scenario(witness)
    assert len(witness._seen) > 10
    assert witness.recovered > 0


def _needed_operations(scenario: Scenario) -> list[Operation]:
    """Syncs and renames that the scenario makes while it is watched."""
    operations: list[Operation] = []

    class Recorder(Witness):
        def watch(self) -> None:
            self.disk.after = operations.append

        def check(self) -> None:
            pass

    scenario(Recorder())
    return [operation for operation in operations if operation.kind in NEEDED]


CALL_SITES = [
    pytest.param(scenario, index, id=f"{scenario.__name__}-{index}-{operation.kind}-{'/'.join(operation.path)[-24:]}")
    for scenario in SCENARIOS
    for index, operation in enumerate(_needed_operations(scenario))
]


@pytest.mark.parametrize(("scenario", "left_out"), CALL_SITES)
def test_leaving_out_any_sync_or_rename_is_noticed(scenario: Scenario, left_out: int) -> None:
    """Otherwise the enumeration proves nothing, or the operation is not needed."""

    class Saboteur(Witness):
        thorough = False

        def watch(self) -> None:
            super().watch()
            count = iter(range(10**6))
            self.disk.before = lambda operation: operation.kind not in NEEDED or next(count) != left_out

    with pytest.raises(LostError):
        scenario(Saboteur())


def _all_operations(writers: int) -> list[Operation]:
    disk = SimulatedDisk()
    store = Store(FileBackEnd(disk), "simulated")
    write(store, OLD, CONTENTS[OLD])
    operations: list[Operation] = []
    disk.after = operations.append
    write(store, NEW, CONTENTS[NEW], writers=writers)
    return operations


@pytest.mark.parametrize("failing", range(len(_all_operations(2))))
def test_a_failed_operation_loses_nothing_and_the_next_step_works(failing: int) -> None:
    """Disk full, EIO at any write, sync or rename: the step fails, older ones stand, the next one is durable."""
    witness = Witness()
    witness.thorough = False
    witness.save(OLD)
    count = iter(range(10**6))

    def fail(operation: Operation) -> bool:
        if next(count) == failing:
            raise StoreError(f"{operation}: Input/output error (EIO)")
        return True

    witness.disk.before = fail
    witness.may.add(NEW)
    with pytest.raises(StoreError, match="EIO"):
        write(witness.store, NEW, CONTENTS[NEW], writers=2)
    witness.disk.before = lambda operation: True
    witness.check()
    witness.save(identity(3))
    witness.store.prune(keep=1)
    witness.must.remove(OLD)
    witness.check()
    assert identity(3) in witness.store.checkpoints()


@pytest.mark.parametrize("kind", ["rename", "sync_directory"])
def test_a_commit_in_doubt_is_not_called_durable(kind: str) -> None:
    """The sync after the rename of COMMIT fails. Repeating it would succeed and mean nothing."""
    witness = Witness()
    witness.save(OLD)
    done: list[Operation] = []

    def fail(operation: Operation) -> bool:
        done.append(operation)
        last = operation.kind == "rename" if kind == "rename" else any(o.kind == "rename" for o in done[:-1])
        if last:
            raise StoreError("EIO")
        return True

    witness.disk.before = fail
    writer = witness.store.writer(NEW, "job")
    with pytest.raises(StoreError, match="EIO"):
        writer.commit([], {})
    witness.disk.before = lambda operation: True
    writer.abort()
    with pytest.raises(StoreError, match="failed in this process"):
        witness.store.committed(NEW)
    with pytest.raises(StoreError, match="failed in this process"):
        witness.store.writer(NEW, "job")
    with pytest.raises(CkptdError):
        writer.commit([], {})
    assert witness.store.prune(keep=1) == []
