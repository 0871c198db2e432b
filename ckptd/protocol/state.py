"""The part of a node's state that outlives its daemon: plain data in the ledger of the arena."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol.messages import Policy
from ckptd.protocol.slots import Sealed, SlotTable, memory_bytes

MAX_RECORDS = 1000
"""Epochs remembered: a Promise that lists them fits a packet. The store has them all."""


class NodeState(msgspec.Struct):
    """See docs/protocol.md. `layouts` are per rank; `instances`: rank -> its process in this epoch;
    `left`: ranks whose process is dead or has left; `closed`: ranks that have finished; `processes`: instance ->
    (pid, start time) of every process that may be alive, of older epochs too; `granted_step`: the last grant of this
    epoch, so that no grant is numbered like another; `uncompared`: snapshots sealed since one in which the ranks
    compared what they have in common, None where none has been since the layout is known."""

    job: str
    promised: Epoch | None = None
    epoch: Epoch | None = None
    world: int = 0
    policy: Policy | None = None
    restore_point: SnapshotId | None = None
    granted_step: int = 0
    instances: dict[int, str] = {}
    left: set[int] = set()
    closed: set[int] = set()
    records: list[EpochRecord] = []
    table: SlotTable = msgspec.field(default_factory=SlotTable)
    layouts: dict[int, str] = {}
    generation: int = 0
    surveying: bool = False
    uncompared: int | None = None
    durable: SnapshotId | None = None
    processes: dict[str, tuple[int, int]] = {}
    counters: dict[str, int] = {}
    last_error: str | None = None

    @property
    def frozen(self) -> bool:
        """A newer epoch is promised and has not begun: nothing is sealed, granted or freed."""
        return self.epoch is None or (self.promised or self.epoch) > self.epoch

    @property
    def own_store(self) -> str | None:
        """The job's store."""
        return None if self.policy is None else self.policy.store

    def is_unheard_of(self, epoch: Epoch) -> bool:
        """An epoch whose ranks come although no Begin did: a daemon whose memory is lost heard it."""
        return self.promised is None or epoch > self.promised or (self.epoch is None and epoch == self.promised)

    def is_visible(self, rank: int) -> bool:
        """The rank's process is known by pid, so that its end will be noticed."""
        return self.instances.get(rank) in self.processes

    @property
    def has_living_ranks(self) -> bool:
        """Some rank's process is known to live and has not left: it comes back to a daemon that was killed."""
        return any(self.is_visible(rank) for rank in self.instances if rank not in self.left)

    def is_live(self, snapshot: SnapshotId) -> bool:
        """The live branch has it: of this epoch, or what this epoch started from."""
        return snapshot.epoch == self.epoch or snapshot == self.restore_point

    def newest(self) -> Sealed | None:
        """The newest sealed snapshot of the live branch: of this epoch, else the restore point if memory holds it."""
        point = self.restore_point
        return self.table.newest(self.epoch) or (None if point is None else self.table.holding(point))

    def begin(self, epoch: Epoch, world: int, point: SnapshotId | None, policy: Policy) -> list[int]:
        """A new epoch: its ranks are not here yet, and whatever older ones had under way is dead. Returns the slots
        that older ones were still making, which nobody waits for any more."""
        if self.durable is not None and (policy.store != self.own_store or point is None or self.durable > point):
            self.durable = None  # in another store, or on a branch that is left: it says nothing about this epoch
        self.promised = self.epoch = epoch
        self.world, self.policy, self.restore_point = world, policy, point
        self.records = [*self.records, EpochRecord(epoch, point)][-MAX_RECORDS:]
        self.layouts, self.granted_step = {}, 0
        self.instances, self.left, self.closed = {}, set(), set()
        for granted in self.table.granted:
            granted.dead = granted.told = True
        unfinished = [slot.slot for slot in self.table.slots if not slot.ready]
        self.table.slots = [slot for slot in self.table.slots if slot.ready]
        return unfinished


def recover(state: NodeState, held: Collection[int]) -> list[int]:
    """Makes the state of a daemon's predecessor true where only the slots `held` came over. Returns those of them that
    the state does not know as ready, which are to be dropped.

    A snapshot with a lost slot is gone. Slots in the making stay in the books: their trainers offer them again.
    """
    table = state.table
    lost = {slot.slot for slot in table.slots if slot.ready} - set(held)
    table.slots = [slot for slot in table.slots if slot.slot not in lost]
    table.sealed = [sealed for sealed in table.sealed if not lost & set(sealed.slots.values())]
    for granted in table.granted:
        granted.dead = granted.dead or bool(lost & set(granted.slots.values()))
    if lost:
        state.surveying = True
        state.generation += 1
    return sorted(set(held) - {slot.slot for slot in table.slots if slot.ready})


def describe(state: NodeState, connected: Mapping[int, int]) -> dict[str, Any]:
    """What can be told of a node; JSON-able. `connected`: ranks that are, and the last boundary each has reported."""
    busy = state.table.busy()
    held = {slot: s.snapshot.step for s in state.table.sealed for slot in s.slots.values()}

    def use(slot: int, ready: bool) -> str:
        return "held" if slot in held else "granted" if slot in busy else "free" if ready else "creating"

    newest = state.table.newest()
    sealed = None if newest is None else newest.snapshot.step
    boundaries = {rank: boundary if boundary >= 0 else None for rank, boundary in connected.items()}
    captured = [g.step for g in state.table.granted if g.step is not None]
    return {
        "job": state.job,
        "epoch": None if state.epoch is None else str(state.epoch),
        "promised": None if state.promised is None else str(state.promised),
        "store": state.policy.store if state.policy else None,
        "world": state.world,
        "ranks": [
            {
                "rank": rank,
                "pid": state.processes.get(instance, (0, 0))[0],
                "alive": instance in state.processes or rank in boundaries,
                "connected": rank in boundaries,
                "step": boundaries.get(rank),
            }
            for rank, instance in sorted(state.instances.items())
        ],
        "newest": {
            "captured": max(captured, default=sealed),
            "sealed": sealed,
            "protected": None,
            "durable": None if state.durable is None else state.durable.step,
        },
        "slots": [
            {"rank": s.rank, "slot": s.slot, "state": use(s.slot, s.ready), "step": held.get(s.slot), "bytes": s.size}
            for s in state.table.slots
        ],
        "memory_bytes": memory_bytes(state.table.slots),
        "counters": dict(state.counters),
        "last_error": state.last_error,
    }
