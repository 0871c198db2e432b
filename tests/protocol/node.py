"""The daemon's surroundings without processes: what daemon/server.py, keeper, sockets and store do for the machine.

A `Node` carries out the machine's actions in order, may be killed at any point between them, and starts again from what
it had persisted. The state is persisted after each event, before its actions are carried out.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import msgspec

from ckptd.core.lineage import EpochRecord
from ckptd.core.types import SnapshotId
from ckptd.protocol import actions
from ckptd.protocol import messages as m
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.cluster.standing import Flush
from ckptd.protocol.cluster.state import ClusterState
from ckptd.protocol.node import NodeMachine
from ckptd.protocol.slots import SlotTable
from ckptd.protocol.state import NodeState, recover
from tests.protocol.trainer import Memory

JOB = "job"
NUMBERS_APART = 1000
"""Between the slot numbers of one arena and of the next, which took its place: no trainer confuses them."""

Process = tuple[int, int]


@dataclasses.dataclass(eq=False)
class Connection:
    """A pair of queues. Lost: everything in flight is gone."""

    number: int
    process: Process | None
    up: collections.deque[tuple[m.Message, Memory | None]] = dataclasses.field(default_factory=collections.deque)
    down: collections.deque[tuple[m.Message, list[Memory]]] = dataclasses.field(default_factory=collections.deque)
    lost: bool = False

    def lose(self, *, spoken: bool = False) -> None:
        """Both ends will notice. `spoken`: what the daemon has said still arrives."""
        self.lost = True
        self.up.clear()
        if not spoken:
            self.down.clear()


@dataclasses.dataclass
class Store:
    """Committed snapshots, and epoch records."""

    committed: set[SnapshotId] = dataclasses.field(default_factory=set)
    records: list[EpochRecord] = dataclasses.field(default_factory=list)


class Node:
    """See the module docstring. `lived(process)` says whether a process is alive; `room` is what Layout is told."""

    def __init__(self, room: int, lived: Callable[[Process], bool], sent: Callable[[Connection, m.Message], None]):
        self.room, self.lived, self.sent = room, lived, sent
        self.machine: NodeMachine | None = None
        self.connections: dict[int, Connection] = {}
        self.slots: dict[int, Memory] = {}
        self.kept: dict[int, Memory] = {}
        self.ledger: bytes | None = None
        self.stores: dict[str, Store] = collections.defaultdict(Store)
        self.flush: cluster.Write | cluster.Commit | None = None
        self.records: list[actions.WriteRecord] = []
        self.exited: str | None = None
        self.budget: int | None = None
        """Actions that are still carried out before the daemon dies; None: all."""
        self.now_s = 0.0
        self._numbered = 0
        self._lives = 0

    # --- life and death

    def start(self) -> None:
        """A daemon, with what the keeper has kept."""
        if self.ledger is None:
            self._lives += 1
            table = SlotTable(numbered=NUMBERS_APART * self._lives)
            state = NodeState(JOB, ClusterState(f"arena {self._lives}"), table=table)
        else:
            state = msgspec.msgpack.decode(self.ledger, type=NodeState)
        self.slots = dict(self.kept)
        for number in recover(state, self.slots):
            del self.slots[number], self.kept[number]
        self.exited, self.budget = None, None
        self.machine = NodeMachine(state, self.now_s)
        for instance, process in list(state.processes.items()):
            if not self.lived(process):
                self.machine.dead(instance, self.now_s)
        self.carry_out()

    def kill(self, keeper: bool) -> None:
        """SIGKILL of the daemon; with the `keeper`, of the arena's owner too."""
        if self.machine is not None and self.budget is None:
            self.ledger = msgspec.msgpack.encode(self.machine.state)
        self.machine, self.flush, self.records = None, None, []
        self.budget = None
        for connection in self.connections.values():
            connection.lose(spoken=self.exited is not None)
        self.connections = {}
        if keeper:
            self.ledger, self.kept, self.slots = None, {}, {}

    def doom(self, budget: int) -> None:
        """The daemon will die after so many more actions, wherever among those of an event that is."""
        assert self.machine is not None
        self.ledger = msgspec.msgpack.encode(self.machine.state)
        self.budget = budget

    def connect(self, process: Process | None) -> Connection | None:
        """A connection, if a daemon runs."""
        if self.machine is None or self.exited is not None:
            return None
        self._numbered += 1
        connection = self.connections[self._numbered] = Connection(self._numbered, process)
        return connection

    # --- events

    def deliver(self, connection: Connection) -> None:
        """The next message of a connection is handled."""
        assert self.machine is not None
        message, memory = connection.up.popleft()
        if isinstance(message, m.Ready) and not self._takes(message.slot, memory):
            return
        if self.budget == 0:
            return self.kill(keeper=False)
        process = connection.process
        seen = process is not None and self.lived(process)
        self.machine.handle(
            connection.number,
            message,
            self.now_s,
            process=process if isinstance(message, m.Hello) and seen else None,
            available_bytes=self.room if isinstance(message, m.Layout) else 0,
        )
        if isinstance(message, m.Hello) and process is not None and not seen:
            self.machine.dead(message.instance, self.now_s)
        self.carry_out()

    def closed(self, connection: Connection) -> None:
        """The other end is gone."""
        connection.lose()
        if self.connections.pop(connection.number, None) is not None and self.machine is not None:
            self.machine.gone(connection.number, self.now_s)
            self.carry_out()

    def ended(self, instance: str) -> None:
        """The pidfd of a process fires."""
        assert self.machine is not None
        self.machine.dead(instance, self.now_s)
        self.carry_out()

    def ticks(self, now_s: float) -> None:
        """Time passes."""
        self.now_s = now_s
        if self.machine is not None:
            self.machine.tick(now_s)
            self.carry_out()

    def flush_ends(self, error: str | None) -> None:
        """What the flush under way waits for is done, or has failed."""
        assert self.machine is not None
        assert self.flush is not None
        action, self.flush = self.flush, None
        flush = action.flush
        if error is not None:
            self.machine.job.flush_failed(flush.number, error)
        elif isinstance(action, cluster.Write):
            self.machine.job.written(flush.number)
        else:
            self.stores[flush.store].committed.add(SnapshotId(flush.snapshot.epoch, flush.step))
            self.machine.job.committed(flush.number)
        self.carry_out()

    def record_ends(self, error: str | None) -> None:
        """An epoch record is written, or cannot be."""
        assert self.machine is not None
        action = self.records.pop(0)
        if error is None:
            self.stores[action.store].records.append(action.record)
        self.machine.recorded(action.peer, error, self.now_s)
        self.carry_out()

    # --- actions

    def carry_out(self) -> None:
        """Persists, then acts, until done or dead."""
        assert self.machine is not None
        taken = self.machine.take()
        if self.budget is not None:  # only then somebody will read it
            self.ledger = msgspec.msgpack.encode(self.machine.state)
        for action in taken:
            if self.budget is not None:
                if self.budget == 0:
                    return self.kill(keeper=False)
                self.budget -= 1
            self._act(action)
            if self.exited is not None:
                break

    def _act(self, action: actions.Action) -> None:
        assert self.machine is not None
        match action:
            case actions.Send():
                connection = self.connections.get(action.peer)
                if connection is not None:
                    found = [self.slots[n] for n in (*action.slots, *action.readable)]
                    connection.down.append((m.decode(m.encode(action.message), "from"), found))
                    self.sent(connection, action.message)
            case actions.Disconnect():
                connection = self.connections.pop(action.peer, None)
                if connection is not None:
                    connection.lose()
                    self.machine.gone(connection.number, self.now_s)
            case actions.Drop():
                self.slots.pop(action.slot, None)
                self.kept.pop(action.slot, None)
            case actions.WriteRecord():
                self.records.append(action)
            case cluster.Write() | cluster.Commit():
                self._check_readable(action.flush)
                self.flush = action
            case cluster.Free():
                if self.flush is not None and self.flush.flush.snapshot == action.snapshot:
                    self.flush = None
            case actions.Exit():
                self.exited = action.reason

    def _check_readable(self, flush: Flush) -> None:
        """What is written is held whole."""
        assert self.machine is not None
        sealed = self.machine.state.table.holding(flush.snapshot)
        assert sealed is not None, f"{flush} is to be written, and not held"
        assert sealed.snapshot == SnapshotId(flush.snapshot.epoch, flush.step)

    def _takes(self, number: int, memory: Memory | None) -> bool:
        assert self.machine is not None
        if memory is None:
            return number in self.slots
        slot = self.machine.state.table.get(number)
        if slot is None or number in self.slots or (memory.rank, memory.digest) != (slot.rank, slot.digest):
            return False
        self.slots[number] = self.kept[number] = memory
        return True
