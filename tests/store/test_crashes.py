"""Power is lost at every point of every way of writing; afterwards each checkpoint is old or new, and whole.

The story: a checkpoint tool that renames before it syncs works for years, until a machine room loses power and the
newest checkpoint has a valid name and holes in its data. Here every operation of a save is followed by every legal loss
of unsynced data (tests/simulated_disk.py), and the same test is then shown to fail if any one sync or rename is left
out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ckptd.core.errors import CkptdError, FormatError, NotFoundError, StoreError
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import SnapshotId
from ckptd.format import manifest
from ckptd.tiers.store import Store, joint, names, reader
from ckptd.tiers.store.files import FileBackEnd
from ckptd.tiers.store.joint import Contribution, NodeWriter, Rows
from ckptd.tiers.store.pipeline import copying
from ckptd.tiers.store.writer import Pace, Resting
from tests.simulated_disk import Operation, SimulatedDisk
from tests.store.samples import (
    JOB,
    Memory,
    Tensors,
    contributions,
    equal,
    identity,
    jointly,
    read,
    shared_objects,
    split,
    staged,
    tensors,
    write,
    write_jointly,
)

OLD, NEW = identity(1), identity(2)
ROOT = 9
RESTING: Tensors = {"model/noise": tensors()["model/noise"]}
RECORD = EpochRecord(identity(1, 2).epoch, OLD)
CONTENTS: dict[SnapshotId, Tensors] = {
    name: {k: v for k, v in tensors(name.step).items() if k in ("model/weight", "model/step", "model/empty")}
    for name in (OLD, NEW, identity(3))
}


@pytest.fixture(autouse=True, scope="module")
def parsed_once() -> Iterator[None]:
    """To parse the same bytes thousands of times would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        remembering = functools.lru_cache(1024)(manifest.from_parquet)
        for module in (reader, joint):
            patch.setattr(module, "from_parquet", remembering)
        yield


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
        self.contents = dict(CONTENTS)
        self.nodes = 0
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
            self._check_whole(store, name)
        for name in self.may - found if self.nodes else ():
            with contextlib.suppress(StoreError):
                joint.commit(store, name, JOB, self.nodes)
                self._check_whole(store, name)
        if len(self._seen) % 8 == 0:
            self._check_recovery(store)

    def _check_whole(self, store: Store, name: SnapshotId) -> None:
        checkpoint = store.reader(name)
        problems = checkpoint.verify()
        if problems or not equal(read(checkpoint), self.contents[name]):
            raise LostError(f"{name}: {problems}")

    def _check_recovery(self, store: Store) -> None:
        """The next flush of the same step works over whatever was left."""
        self.recovered += 1
        for name in self.may - set(store.checkpoints()):
            if self.nodes:
                write_jointly([store] * self.nodes, name, CONTENTS[name], own=staged)
            else:
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

    def save_jointly(self, name: SnapshotId, nodes: int) -> None:
        """Every node writes on its own, and another one commits."""
        self.may.add(name)
        self.contents[name] = jointly(CONTENTS[name], nodes, staged)
        self.nodes = nodes
        *stores, root = [Store(FileBackEnd(self.disk.on_node(n)), "simulated") for n in (*range(nodes), ROOT)]
        write_jointly(stores, name, CONTENTS[name], own=staged, root=root)
        self.must.add(name)
        self.check()

    def save_linked(self, root: Store, name: SnapshotId, earlier: Resting | None) -> Resting:
        """Written by one node, committed by `root`: most of it is new, and some rests, as in an `earlier` checkpoint if
        there is one."""
        self.may.add(name)
        self.nodes = 1
        self.contents[name] = held = CONTENTS[name] | RESTING
        memory = Memory(held)
        resting = np.array([info.key in RESTING for info in memory.catalog.tensors])[memory.catalog.tensor]
        given = Contribution(
            [0], Rows(memory.catalog, copying(memory.read), resting), None, {0: shared_objects(name.step)}
        )
        found = NodeWriter(self.store, name, JOB, "node-0", 0, 1).write(given, Pace(), earlier)
        assert found is not None
        joint.commit(root, name, JOB, 1)
        self.must.add(name)
        root.sweep(name)
        self.check()
        return found


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


def save_jointly(witness: Witness) -> None:
    """Two daemons write, each on its own, and one of them commits from the lists of both."""
    witness.watch()
    witness.save_jointly(NEW, 2)


def save_jointly_over_a_leftover(witness: Witness) -> None:
    """Two machines were replaced after they had listed what they wrote, and not all was committed."""
    witness.may.add(NEW)
    lost = [Store(FileBackEnd(witness.disk.on_node(number)), "simulated") for number in (7, 8)]
    for number, given in enumerate(contributions(NEW, CONTENTS[NEW], 2, staged)):
        NodeWriter(lost[number], NEW, JOB, "lost", number, 2).write(given, Pace())
    witness.watch()
    witness.save_jointly(NEW, 2)


def save_with_links(witness: Witness) -> None:
    """What rests is linked from an older checkpoint, which is then pruned: the newer one has it all the same."""
    root = Store(FileBackEnd(witness.disk.on_node(ROOT)), "simulated")
    earlier = witness.save_linked(root, OLD, None)
    witness.watch()
    linked = witness.save_linked(root, NEW, earlier)
    assert witness.disk.file(linked.held[0]) is witness.disk.file(earlier.held[0])
    witness.must.remove(OLD)
    assert root.prune(keep=1) == [OLD]
    witness.may.remove(OLD)
    witness.check()


def confirm(witness: Witness) -> None:
    """A commit whose last sync failed is found by the next process, which says that it is durable."""

    def fail(operation: Operation) -> bool:
        if operation.kind == "sync_directory" and any(o.kind == "rename" for o in done):
            raise StoreError("EIO")
        done.append(operation)
        return True

    done: list[Operation] = []
    witness.may.add(NEW)
    witness.disk.before = fail
    with pytest.raises(StoreError, match="EIO"):
        write(witness.store, NEW, CONTENTS[NEW])
    witness.disk.before = lambda operation: True
    witness.watch()
    if Store(FileBackEnd(witness.disk), "the next process").committed(NEW):
        witness.must.add(NEW)
    witness.check()


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
SCENARIOS: list[Scenario] = [
    save,
    save_with_two_writers,
    save_over_a_leftover,
    save_jointly,
    save_jointly_over_a_leftover,
    save_with_links,
    confirm,
    prune,
    record_an_epoch,
]
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
    return [operation for operation in operations if _is_needed(operation)]


def _is_needed(operation: Operation) -> bool:
    """But for what nodes sync that write jointly: directories, which here the first of them has made; and lists, since
    without them nothing is committed."""
    made = (1, ROOT) if operation.path == () else (1,) if len(operation.path) == 1 else ()
    return operation.kind in NEEDED and names.WRITTEN not in operation.path and operation.node not in made


CALL_SITES = [
    pytest.param(scenario, index, id=f"{scenario.__name__}-{index}-{operation.kind}-{'/'.join(operation.path)[-24:]}")
    for scenario in SCENARIOS
    if scenario is not save_jointly_over_a_leftover
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
            self.disk.before = lambda operation: not _is_needed(operation) or next(count) != left_out
            if scenario is save_jointly:  # whose many operations would take long; what is lost is so to the end
                self.disk.after = lambda operation: self.check() if names.COMMIT in operation.path else None

    with pytest.raises((LostError, NotFoundError)):
        scenario(Saboteur())


def test_a_list_is_gone_before_what_it_names_is_changed() -> None:
    """Otherwise it may come back after a loss of power, beside files that are not what it says."""

    class Saboteur(Witness):
        def watch(self) -> None:
            super().watch()
            left_out: list[Operation] = []

            def before(operation: Operation) -> bool:
                first = operation.kind == "sync_directory" and names.WRITTEN in operation.path and not left_out
                left_out.extend([operation] if first else [])
                return not first

            self.disk.before = before

    with pytest.raises(LostError):
        save_jointly_over_a_leftover(Saboteur())


def _joint_operations() -> list[Operation]:
    disk = SimulatedDisk()
    operations: list[Operation] = []
    disk.after = operations.append
    write_jointly([Store(FileBackEnd(disk), "simulated")] * 2, NEW, CONTENTS[NEW], own=staged)
    return operations


@pytest.mark.parametrize("failing", range(len(_joint_operations())))
def test_a_failed_operation_of_any_node_loses_nothing_and_is_made_good(failing: int) -> None:
    """The flush fails; the same processes do it again, unless COMMIT is in doubt, and later ones work in any case."""
    witness = Witness()
    witness.thorough = False
    witness.save(OLD)
    count = iter(range(10**6))

    def fail(operation: Operation) -> bool:
        if next(count) == failing:
            raise StoreError(f"{operation}: Input/output error (EIO)")
        return True

    witness.may.add(NEW)
    witness.contents[NEW] = jointly(CONTENTS[NEW], 2, staged)
    stores = [Store(FileBackEnd(witness.disk), "simulated") for _ in range(2)]
    witness.disk.before = fail
    with contextlib.suppress(StoreError):  # of making a directory, it may be there all the same
        write_jointly(stores, NEW, CONTENTS[NEW], own=staged)
        witness.must.add(NEW)
    witness.disk.before = lambda operation: True
    witness.check()
    with contextlib.suppress(StoreError):
        write_jointly(stores, NEW, CONTENTS[NEW], own=staged)
        witness.must.add(NEW)
    if NEW not in witness.must:
        with pytest.raises(StoreError, match="failed in this process"):
            stores[0].committed(NEW)
    witness.check()
    witness.save(identity(3))


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
