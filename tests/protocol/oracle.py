"""What must be true of a node after every event, whatever happened before. Raises BrokenPromiseError.

- A sealed snapshot is held whole, in slots that no living process may write to: not by a copy under way, not by a
  grant that it has not answered, be it a zombie or not.
- No slot is in use twice.
- In a sealed snapshot, what ranks have found to be the same is the same.
- What was announced sealed in the live epoch is still there, or something newer is.
- What a Promise offered is there until the next Begin; the restore point until the first seal of its epoch.
- Durable means committed.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol import messages as m
from tests.protocol.node import Node
from tests.protocol.trainer import Memory, Trainer


class BrokenPromiseError(AssertionError):
    """A promise was broken."""


class Oracle:
    """Remembers what was announced, and checks it. `trainers`: every living process, fenced off or not."""

    def __init__(self) -> None:
        self.announced: dict[Epoch, int] = {}
        self.offered: set[SnapshotId] = set()
        self.point: SnapshotId | None = None
        self.seals: collections.Counter[Epoch] = collections.Counter()

    def forget(self) -> None:
        """The arena is lost: daemon and keeper were killed. What was announced went with it; that is no violation."""
        self.announced, self.offered, self.point = {}, set(), None

    def sent(self, node: Node, message: m.Message) -> None:
        """The daemon has put a message on a connection."""
        assert node.machine is not None
        state = node.machine.state
        match message:
            case m.Reached(step=step, level=Level.SEALED) if state.epoch is not None:
                if step > self.announced.get(state.epoch, -1):
                    self.seals[state.epoch] += 1
                    self.announced[state.epoch] = step
                self.point = None
            case m.Reached(step=step, level=Level.DURABLE) if state.epoch is not None:
                self._committed(node, SnapshotId(state.epoch, step), "announced durable")
            case m.Promise():
                self.offered = {SnapshotId(held.snapshot.epoch, held.step) for held in message.promise.held}
                self.point = None
            case m.Flushed(step=int(step)) | m.Drained(step=int(step)):
                everything = {s.step for store in node.stores.values() for s in store.committed}
                if step not in everything:
                    raise BrokenPromiseError(f"{message} although no store has step {step}")

    def check(self, node: Node, trainers: Iterable[Trainer]) -> None:
        """After every event."""
        if node.machine is None:
            return
        state = node.machine.state
        held = self._check_table(node)
        for trainer in trainers:
            self._check_writer(trainer, held)
        if state.epoch is None:
            return
        if not state.frozen and self.offered:
            point = state.cluster.restore_point
            self.point = point if point in self.offered else None
            self.offered = set()
        names = {sealed.snapshot for sealed in state.table.sealed}
        if not self.offered <= names:
            raise BrokenPromiseError(f"offered in a Promise and gone before Begin: {self.offered - names}")
        newest = max((s for s in names if s.epoch == state.epoch), default=None)
        if newest is None and self.point is not None and self.point not in names:
            raise BrokenPromiseError(f"the restore point is gone before the first seal: {self.point}")
        announced = self.announced.get(state.epoch)
        if announced is not None and (newest is None or newest.step < announced):
            raise BrokenPromiseError(f"step {announced} was announced sealed; the newest held is {newest}")
        if state.cluster.durable is not None:
            self._committed(node, state.cluster.durable, "believed durable")

    def _check_table(self, node: Node) -> dict[Memory, SnapshotId]:
        """Every sealed snapshot is whole; no slot is used twice. Returns what holds what."""
        assert node.machine is not None
        table = node.machine.state.table
        used: list[int] = []
        held: dict[Memory, SnapshotId] = {}
        for granted in table.granted:
            used += [granted.slots[r] for r in (granted.silent if granted.dead else granted.slots)]
        for sealed in table.sealed:
            found = {
                memory.common for number in sealed.slots.values() if (memory := node.slots.get(number)) is not None
            }
            if len(found - {None}) > 1:
                raise BrokenPromiseError(f"{sealed.snapshot} is sealed; what its ranks have in common differs: {found}")
            used += sealed.slots.values()
            for rank, number in sealed.slots.items():
                memory = node.slots.get(number)
                if memory is None or (memory.content, memory.rank) != (sealed.snapshot, rank):
                    raise BrokenPromiseError(
                        f"{sealed.snapshot} is sealed; slot {number} of rank {rank} holds {memory}"
                    )
                held[memory] = sealed.snapshot
        if len(used) != len(set(used)):
            raise BrokenPromiseError(f"a slot is in use twice: {sorted(used)}")
        return held

    def _check_writer(self, trainer: Trainer, held: dict[Memory, SnapshotId]) -> None:
        if trainer.copy is not None and trainer.copy.memory in held:
            raise BrokenPromiseError(f"{trainer.hello.instance} is copying into {held[trainer.copy.memory]}")
        for grant, message in trainer.grants.items():
            memory = trainer.slots.get(message.slot)
            if grant not in trainer.outcomes and memory in held:
                raise BrokenPromiseError(
                    f"{trainer.hello.instance} may write into {held[memory]} under its grant {grant}"
                )

    def _committed(self, node: Node, snapshot: SnapshotId, what: str) -> None:
        assert node.machine is not None
        store = node.machine.state.own_store
        if store is None or snapshot not in node.stores[store].committed:
            raise BrokenPromiseError(f"{snapshot} is {what}, and is not in {store}")
