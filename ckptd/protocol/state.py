"""The part of a node's state that outlives its daemon: plain data in the ledger of the arena."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol.cluster import state as cluster
from ckptd.protocol.messages import Policy
from ckptd.protocol.slots import Sealed, SlotTable, memory_bytes


class NodeState(msgspec.Struct):
    """See docs/protocol.md. `cluster`: epochs, snapshots, and what the nodes of the job agree on; `world`: ranks of the
    job, `ranks`: those of this node; `layouts` are per rank; `instances`: rank -> its process in this epoch; `left`:
    ranks whose process is dead or has left; `closed`: ranks that have finished; `processes`: instance -> (pid, start
    time) of every process that may be alive, of older epochs too."""

    job: str
    cluster: cluster.ClusterState
    world: int = 0
    ranks: list[int] = []
    policy: Policy | None = None
    instances: dict[int, str] = {}
    left: set[int] = set()
    closed: set[int] = set()
    table: SlotTable = msgspec.field(default_factory=SlotTable)
    layouts: dict[int, str] = {}
    generation: int = 0
    surveying: bool = False
    processes: dict[str, tuple[int, int]] = {}
    counters: dict[str, int] = {}
    last_error: str | None = None

    @property
    def epoch(self) -> Epoch | None:
        """The epoch that has begun here."""
        return self.cluster.epoch

    @property
    def promised(self) -> Epoch | None:
        """The highest epoch promised; nothing below it is served."""
        return self.cluster.promised

    @property
    def frozen(self) -> bool:
        """A newer epoch is promised and has not begun: nothing is sealed, granted or freed."""
        return self.cluster.frozen

    @property
    def parity(self) -> int:
        """Losses in a group that snapshots are protected against."""
        membership = self.cluster.membership
        return 0 if membership is None else membership.shape.parity

    @property
    def own_store(self) -> str | None:
        """The job's store."""
        return None if self.policy is None else self.policy.store

    def count(self, name: str) -> None:
        """One more of something that is counted for `ckptd status`."""
        self.counters[name] = self.counters.get(name, 0) + 1

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

    def begin(self, world: int, ranks: list[int], policy: Policy) -> list[int]:
        """A new epoch: its ranks are not here yet, and whatever older ones had under way is dead. Returns the slots
        that older ones were still making, which nobody waits for any more."""
        if policy.store != self.own_store:
            self.cluster.durable = None  # in another store: it says nothing about this epoch
        self.world, self.ranks, self.policy = world, ranks, policy
        self.layouts = {}
        self.instances, self.left, self.closed = {}, set(), set()
        for granted in self.table.granted:
            granted.dead = granted.told = True
        unfinished = [slot.slot for slot in self.table.slots if not slot.ready]
        self.table.slots = [slot for slot in self.table.slots if slot.ready]
        return unfinished

    def newest(self) -> Sealed | None:
        """The newest snapshot of the live branch that is sealed by all, as far as it is held here."""
        found = self.cluster.newest
        return None if found is None else self.table.holding(found.snapshot)


def recover(state: NodeState, held: Collection[int], areas: Mapping[int, SnapshotId | None] | None = None) -> list[int]:
    """Makes the state of a daemon's predecessor true where only the slots `held` came over, and parity `areas` with
    what they hold. Returns those of the slots that the state does not know as ready, which are to be dropped.

    A snapshot with a lost slot is gone. Slots in the making stay in the books: their trainers offer them again.
    """
    table = state.table
    lost = {slot.slot for slot in table.slots if slot.ready} - set(held)
    table.slots = [slot for slot in table.slots if slot.slot not in lost]
    table.sealed = [sealed for sealed in table.sealed if not lost & set(sealed.slots.values())]
    for granted in table.granted:
        granted.dead = granted.dead or bool(lost & set(granted.slots.values()))
    encoded = [
        holding.snapshot
        for holding in state.cluster.holdings
        if holding.area is not None and holding.name is not None and (areas or {}).get(holding.area) == holding.name
    ]
    for grant, part in cluster.recover(state.cluster, [sealed.grant for sealed in table.sealed], encoded):
        if part == "data":
            table.free(grant)
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

    newest, durable = state.cluster.newest, state.cluster.durable
    sealed = None if newest is None else newest.step
    boundaries = {rank: boundary if boundary >= 0 else None for rank, boundary in connected.items()}
    captured = [g.step for g in state.table.granted if g.step is not None]
    return {
        "job": state.job,
        "epoch": None if state.epoch is None else str(state.epoch),
        "promised": None if state.promised is None else str(state.promised),
        "store": state.policy.store if state.policy else None,
        "world": state.world,
        "nodes": 0 if state.cluster.membership is None else len(state.cluster.membership.arenas),
        "parity": state.parity,
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
            "protected": state.cluster.protected_step,
            "durable": None if durable is None else durable.step,
        },
        "slots": [
            {"rank": s.rank, "slot": s.slot, "state": use(s.slot, s.ready), "step": held.get(s.slot), "bytes": s.size}
            for s in state.table.slots
        ],
        "memory_bytes": memory_bytes(state.table.slots),
        "counters": dict(state.counters),
        "last_error": state.last_error,
    }
