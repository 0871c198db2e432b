"""A job of many members on a network without faults: how much a member sends and receives, in messages and bytes.

Time goes in ticks: a daemon handles what has come since the last one, then says once what is new, as daemons may that
hold Facts and Decided back for a moment. What it takes to begin an epoch is not counted.
"""

from __future__ import annotations

import collections
import dataclasses

from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.facts import Membership, Shape
from ckptd.protocol.cluster.member import MemberMachine
from ckptd.protocol.cluster.standing import Standing
from ckptd.protocol.cluster.state import ClusterState
from tests.simulate.node import POLICY

EPOCH = Epoch(1, "0" * 16)
TICKS_A_STEP = 8
MOST_TICKS = 400
RECORD = bytes(200)


@dataclasses.dataclass
class Traffic:
    """Of one member in one tick."""

    messages: int = 0
    size: int = 0


@dataclasses.dataclass
class Peak:
    """The most that any member had in one tick, and `ticks` for so many protected snapshots at all members."""

    sent: Traffic = dataclasses.field(default_factory=Traffic)
    received: Traffic = dataclasses.field(default_factory=Traffic)
    ticks: int = 0

    def note(self, sent: Traffic, received: Traffic) -> None:
        """One member in one tick."""
        for most, seen in ((self.sent, sent), (self.received, received)):
            most.messages, most.size = max(most.messages, seen.messages), max(most.size, seen.size)


class Quiet:
    """See the module docstring. Groups of four, one parity."""

    def __init__(self, count: int, slots: int = 3) -> None:
        self.arenas = {f"n{number}": number for number in range(count)}
        self.slots, self.step, self.peak = slots, 0, Peak()
        shape = Shape(tuple(tuple(range(first, first + 4)) for first in range(0, count, 4)), 1)
        membership = Membership(EPOCH, tuple(self.arenas), (), shape)
        self.machines = [MemberMachine(ClusterState(arena), POLICY) for arena in self.arenas]
        self.protected: list[set[SnapshotId]] = [set() for _ in self.arenas]
        self._captures: list[list[m.Capture]] = [[] for _ in self.arenas]
        self._tasks: list[list[m.MemberAction]] = [[] for _ in self.arenas]
        self._under_way: dict[int, list[tuple[m.BetweenDaemons, int]]] = {}
        for machine in self.machines:
            machine.prepare(EPOCH)
            machine.begin(m.Begin(EPOCH, membership, None, 0, False, 0, {}, None))

    def run(self, protections: int) -> Peak:
        """Until every member knows of so many protected snapshots."""
        while min(map(len, self.protected)) < protections:
            if self.peak.ticks == MOST_TICKS:
                raise AssertionError(f"{MOST_TICKS} ticks, and not {protections} snapshots protected")
            self._tick()
        return self.peak

    def _tick(self) -> None:
        self.step = self.peak.ticks // TICKS_A_STEP
        self.peak.ticks += 1
        arrived, self._under_way = self._under_way, collections.defaultdict(list)
        for number, machine in enumerate(self.machines):
            received = Traffic()
            for message, size in arrived.get(number, ()):
                machine.handle(message)
                received.messages, received.size = received.messages + 1, received.size + size
            self._work(number, machine)
            self.peak.note(self._carry_out(number, machine.take()), received)

    def _work(self, number: int, machine: MemberMachine) -> None:
        """What was begun in the last tick is done; ranks capture what is granted for their step."""
        tasks, self._tasks[number] = self._tasks[number], []
        for task in tasks:
            if isinstance(task, m.Describe):
                machine.described(task.snapshot, RECORD)
            elif isinstance(task, m.Encode):
                machine.encoded(task.snapshot)
        for capture in [c for c in self._captures[number] if c.step <= self.step]:
            self._captures[number].remove(capture)
            machine.captured(capture.snapshot, self.step)
        held = sum(holding.data or holding.capturing for holding in machine.state.holdings)
        machine.stands(Standing(self.step, max(0, self.slots - held)))

    def _carry_out(self, number: int, actions: list[m.MemberAction]) -> Traffic:
        sent = Traffic()
        sizes: dict[int, int] = {}
        for action in actions:
            match action:
                case m.Tell(arena=arena, message=message):
                    size = sizes.setdefault(id(message), 0) or len(m.encode(message))
                    sizes[id(message)] = size
                    sent.messages, sent.size = sent.messages + 1, sent.size + size
                    self._under_way[self.arenas[arena]].append((message, size))
                case m.Capture():
                    self._captures[number].append(action)
                case m.Describe() | m.Encode():
                    self._tasks[number].append(action)
                case m.Announce(snapshot=snapshot, level=Level.PROTECTED):
                    self.protected[number].add(snapshot)
        return sent
