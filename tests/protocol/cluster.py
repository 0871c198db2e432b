"""A job of many members without faults: every message arrives, work is done at once."""

from __future__ import annotations

import collections

from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.facts import FAN_OUT, Membership, Shape
from ckptd.protocol.cluster.member import MemberMachine
from ckptd.protocol.cluster.standing import Standing
from ckptd.protocol.cluster.state import ClusterState
from ckptd.protocol.messages import Policy

POLICY = Policy("/store", 1, None, None, 3, 0.01, None, 100.0)
EPOCH = Epoch(1, "0" * 16)


def epoch(number: int) -> Epoch:
    """E1, E2 ..."""
    return Epoch(number, f"{number:016x}")


class Job:
    """Members in one epoch; `said`: what each asked its daemon to do, but for messages."""

    def __init__(self, count: int, group: int, parity: int, slots: int = 3, fan_out: int = FAN_OUT) -> None:
        groups = tuple(tuple(range(first, first + group)) for first in range(0, count, group))
        arenas = tuple(f"n{number}" for number in range(count))
        self.membership, self.slots = Membership(EPOCH, arenas, (), Shape(groups, parity)), slots
        self.machines = [MemberMachine(ClusterState(arena), POLICY, fan_out) for arena in arenas]
        self.said: list[list[m.MemberAction]] = [[] for _ in arenas]
        self.cannot_encode: set[int] = set()
        """Members whose encoding neither ends nor fails by itself."""
        self._queue: collections.deque[tuple[int, m.BetweenDaemons]] = collections.deque()
        begin = m.Begin(EPOCH, self.membership, None, 0, False, 0, {}, None)
        for machine in self.machines:
            machine.handle(m.Prepare(EPOCH), "launch")
            machine.handle(begin, "launch")
            machine.take()
        self.settle()

    def steps(self, step: int) -> None:
        """All nodes complete a step, and capture what was granted for it."""
        for number, machine in enumerate(self.machines):
            granted = [a.snapshot for a in self.said[number] if isinstance(a, m.Capture)]
            if SnapshotId(EPOCH, step) in granted:
                machine.captured(SnapshotId(EPOCH, step), step)
            self.stands(number, step)
            self._carry_out(number)
        self.settle()

    def stands(self, number: int, step: int) -> None:
        """A node's ranks have completed a step."""
        held = [h for h in self.machines[number].state.holdings if h.data]
        self.machines[number].stands(Standing(step, self.slots - len(held)))

    def settle(self) -> None:
        """Until nothing is under way."""
        while self._queue:
            number, message = self._queue.popleft()
            self.machines[number].handle(message)
            self._carry_out(number)

    def _carry_out(self, number: int) -> None:
        machine = self.machines[number]
        for action in machine.take():
            if not isinstance(action, m.Tell):
                self.said[number].append(action)
            if isinstance(action, m.Free):
                self.stands(number, machine._standing.boundary)
            if isinstance(action, m.Describe):
                machine.described(action.snapshot, b"record")
                self._carry_out(number)
            elif isinstance(action, m.Encode) and number not in self.cannot_encode:
                machine.encoded(action.snapshot)
                self._carry_out(number)
            elif isinstance(action, m.Tell) and action.arena != "launch":
                self._queue.append((int(action.arena[1:]), action.message))
