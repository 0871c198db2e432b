"""A simulated node: memory that the keeper holds, a daemon that may die between any two actions, its ranks as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec

from ckptd.core.errors import UnrecoverableError
from ckptd.core.types import SnapshotId
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.member import MemberMachine
from ckptd.protocol.cluster.standing import Standing, Wish
from ckptd.protocol.cluster.state import ClusterState, Holding, recover
from ckptd.protocol.messages import Policy
from tests.simulate.strings import (
    Bytes,
    UnavailableError,
    agrees,
    content,
    encode_stripe,
    parity_area,
    read_string,
    record_of,
    striping_of,
)

POLICY = Policy("/store", 1, None, None, 3, 0.01, None, 100.0)
Task = m.Describe | m.Encode | m.Rebuild | m.Verify | m.Write | m.Commit


def subject(task: Task) -> SnapshotId:
    """The snapshot that is worked on."""
    return task.flush.snapshot if isinstance(task, m.Write | m.Commit) else task.snapshot


def nothing(machine: MemberMachine) -> None:
    """An event that only makes the daemon look where its ranks stand."""


@dataclasses.dataclass
class Trainer:
    """The ranks of a node: `step` is complete. `grants`: to be captured; `copying`: snapshot -> step of the copy."""

    launch: int
    step: int
    grants: list[SnapshotId] = dataclasses.field(default_factory=list)
    copying: dict[SnapshotId, int] = dataclasses.field(default_factory=dict)


class Node:
    """See the module docstring. `world`: gives peers, carries messages, and is told what is announced."""

    def __init__(self, arena: str, world: Any) -> None:
        self.arena, self.world = arena, world
        self.alive, self.stopped, self.slow = True, False, False
        self.data: dict[SnapshotId, Bytes] = {}
        self.parity: dict[SnapshotId, Bytes] = {}
        self.parity_records: dict[SnapshotId, bytes] = {}
        self.damaged: set[tuple[SnapshotId, str]] = set()
        self.ledger = msgspec.msgpack.encode(ClusterState(arena))
        """What the keeper holds, as of the daemon's end: what it knows changes in events only, each of which is written
        before what follows from it."""
        self.machine: MemberMachine | None = None
        self.budget: int | None = None
        """Actions that the daemon still carries out before it is killed."""
        self.tasks: list[Task] = []
        self.trainer: Trainer | None = None
        self._declared: SnapshotId | None = None
        self.wish: Wish | None = None
        self.start()

    def __repr__(self) -> str:
        return self.arena

    @property
    def up(self) -> bool:
        """Something answers here."""
        return self.alive and not self.stopped and self.machine is not None

    @property
    def state(self) -> ClusterState:
        """What the daemon knows, or its successor will."""
        return self.machine.state if self.machine else msgspec.msgpack.decode(self.ledger, type=ClusterState)

    # --- the daemon

    def start(self) -> None:
        """The keeper starts a daemon."""
        state = msgspec.msgpack.decode(self.ledger, type=ClusterState)
        for snapshot, part in recover(state, list(self.data), list(self.parity)):
            (self.data if part == "data" else self.parity).pop(snapshot)
            self.damaged.discard((snapshot, part))
        self.machine = MemberMachine(state, POLICY, self.world.fan_out)
        self.tasks.clear()
        for holding in self.machine.state.holdings:
            if holding.capturing and (self.trainer is None or not self._knows(holding.snapshot)):
                self.machine.missed(holding.snapshot)
        self.world.oracle.check(self)
        self.event(nothing)

    def kill(self) -> None:
        """The daemon only."""
        if self.machine is not None:
            self.ledger = msgspec.msgpack.encode(self.machine.state)
        self.machine, self.budget = None, None
        self.tasks.clear()

    def lose(self) -> None:
        """Everything on the node."""
        if self.alive:
            self.world.lost(self)
        self.kill()
        self.alive, self.trainer = False, None
        self.data.clear()
        self.parity.clear()

    def event(self, handler: Callable[..., None], *arguments: object) -> None:
        """Something happens to the daemon: the state is written, then the actions are carried out."""
        if self.machine is None:
            return
        machine, epoch = self.machine, self.machine.state.epoch
        handler(machine, *arguments)
        if machine.state.epoch != epoch:
            self.tasks.clear()  # a Begin stops all work
            self.world.oracle.epochs.add(machine.state.epoch)
            self.wish = None
        machine.stands(self._standing())
        actions = machine.take()
        if machine.state.durable is not None:
            self.world.oracle.durable(machine.state.durable)
        declared = machine.state.protected if machine.state.confirmed else None
        if declared != self._declared:
            self._declared = declared
            if declared is not None:
                self.world.oracle.declared(self, declared)
                self.world.declares(self)
        for action in actions:
            if self.budget is not None:
                self.budget -= 1
                if self.budget < 0:
                    self.world.dies(self)
                    return
            self._carry_out(action)

    def _carry_out(self, action: m.MemberAction) -> None:
        match action:
            case m.Tell(arena=target, message=message):
                self.world.send(self.arena, target, message)
            case m.Capture(snapshot=snapshot):
                if self.trainer is not None:
                    self.trainer.grants.append(snapshot)
            case m.Announce():
                self.world.announced(self, action)
            case m.Free(snapshot=snapshot, part=part):
                kept = self.data if part == "data" else self.parity
                kept.pop(snapshot, None)
                self.damaged.discard((snapshot, part))
                self.world.oracle.check(self)
                stopped = (m.Describe, m.Rebuild, m.Write) if part == "data" else (m.Encode,)
                self.tasks = [t for t in self.tasks if not (subject(t) == snapshot and isinstance(t, stopped))]
            case m.Describe() | m.Encode() | m.Rebuild() | m.Verify() | m.Write() | m.Commit():
                self.tasks.append(action)
            case m.FlushEnded(outcome=outcome):
                if outcome.error is None:
                    self.world.say(f"    {self.arena}: {outcome.flush.snapshot} is durable")
                if self.wish is not None and outcome.flush.snapshot >= self.wish.snapshot:
                    self.wish = None
            case m.Leave():
                self.lose()
            case _:  # what is dead the ranks answer as they would anyway; layouts and the end are not simulated
                pass

    # --- the ranks

    def begin_training(self, launch: int, step: int) -> None:
        """Ranks have restored and go on."""
        self.trainer = Trainer(launch, step)
        self.event(nothing)

    def end_training(self) -> None:
        """The ranks are dead; what they had not answered is missed."""
        trainer, self.trainer = self.trainer, None
        if trainer is not None:
            for snapshot in [*trainer.grants, *trainer.copying]:
                self.event(MemberMachine.missed, snapshot)
            self.event(nothing)

    def step(self) -> None:
        """One more step is complete; a grant that is due begins to be copied, now or a step later."""
        assert self.trainer is not None
        self.trainer.step += 1
        for snapshot in [s for s in self.trainer.grants if s.step <= self.trainer.step]:
            if not self.world.drifts():
                self.trainer.grants.remove(snapshot)
                self.trainer.copying[snapshot] = self.trainer.step
        self.event(nothing)

    def copied(self, snapshot: SnapshotId, missed: bool = False) -> None:
        """A copy is complete, or was spoilt."""
        assert self.trainer is not None
        if self.machine is None:
            return  # said again when the daemon is back
        step = self.trainer.copying.pop(snapshot)
        holding = self.state.find(snapshot)
        if missed or holding is None or not holding.capturing or self.state.frozen:
            self.event(MemberMachine.missed, snapshot)
            return
        data = content(self.world.seed, snapshot, holding.string, step)
        self.data[snapshot] = data
        if (
            len([h for h in self.state.holdings if h.snapshot in self.data and h.shape == holding.shape])
            > self.world.slots
        ):
            raise AssertionError(f"{self.arena} holds more than {self.world.slots} snapshots")
        self.world.oracle.captured(snapshot, holding.string, step, data)
        self.event(MemberMachine.captured, snapshot, step)

    def _knows(self, snapshot: SnapshotId) -> bool:
        assert self.trainer is not None
        return snapshot in self.trainer.grants or snapshot in self.trainer.copying

    def _standing(self) -> Standing:
        """Where the ranks are. Slots hold strings, one to be rebuilt, and copies that nobody waits for any more."""
        trainer, state = self.trainer, self.state
        wishes = () if self.wish is None else (self.wish,)
        if trainer is None or state.membership is None:
            return Standing(wishes=wishes)
        open_ones = {holding.snapshot for holding in state.holdings if holding.capturing}
        own = [h.snapshot for h in state.holdings if h.shape == state.membership.shape]
        held = [snapshot for snapshot in own if snapshot in self.data or snapshot == state.point]
        stale = [s for s in (*trainer.grants, *trainer.copying) if s not in open_ones]
        return Standing(trainer.step, max(0, self.world.slots - len(held) - len(stale)), wishes=wishes)

    def wants_flush(self) -> None:
        """Somebody asks for the newest sealed snapshot to be durable."""
        newest = self.state.newest
        if newest is not None:
            assert POLICY.store is not None
            self.wish = Wish(POLICY.store, newest.snapshot, self.state.ended)
            self.event(nothing)

    # --- work

    def work(self, task: Task) -> None:
        """A task comes to its end."""
        self.tasks.remove(task)
        holding = self.state.find(subject(task))
        if holding is None:
            return
        try:
            if self.world.fails():
                raise UnavailableError("a fault")
            self._work(task, holding)
        except (UnavailableError, UnrecoverableError):
            self._failed(task)

    def _failed(self, task: Task) -> None:
        match task:
            case m.Describe(snapshot=snapshot):
                self.event(MemberMachine.describing_failed, snapshot, (snapshot, "data") in self.damaged)
            case m.Encode(snapshot=snapshot):
                self.event(MemberMachine.encoding_failed, snapshot)
            case m.Rebuild(snapshot=snapshot):
                self.event(MemberMachine.rebuilding_failed, snapshot)
            case m.Write(flush=flush) | m.Commit(flush=flush):
                self.event(MemberMachine.flush_failed, flush.number, "a fault")

    def _work(self, task: Task, holding: Holding) -> None:
        snapshot = subject(task)
        match task:
            case m.Describe():
                if (snapshot, "data") in self.damaged:
                    raise UnavailableError("damaged")
                self.event(MemberMachine.described, snapshot, record_of(self.data[snapshot]))
            case m.Encode():
                self._overwrite(holding)
                self.parity[snapshot] = self._encoded(snapshot, holding)
                self.parity_records[snapshot] = record_of(self.parity[snapshot])
                self._repaired(snapshot, "parity")
                self.event(MemberMachine.encoded, snapshot)
            case m.Rebuild():
                data, record = self._rebuilt(snapshot, holding)
                self.data[snapshot] = data
                self._repaired(snapshot, "data")
                self.event(MemberMachine.rebuilt, snapshot, record)
            case m.Verify(part=part):
                intact = self._intact(snapshot, part, holding)
                self.event(MemberMachine.verified, snapshot, part, intact)
            case m.Write(flush=flush):
                if (snapshot, "data") in self.damaged:
                    raise UnavailableError("damaged")
                name = SnapshotId(snapshot.epoch, flush.step)
                self.world.store.write(name, holding.string, holding.shape.count, self.data[snapshot])
                self.event(MemberMachine.written, flush.number)
            case m.Commit(flush=flush):
                self.world.store.commit(SnapshotId(snapshot.epoch, flush.step))
                self.event(MemberMachine.committed, flush.number)

    def _repaired(self, snapshot: SnapshotId, part: str) -> None:
        """It is whole again. Once a newer epoch is promised that comes too late: the promise says that it is not."""
        if not self.state.frozen:
            self.damaged.discard((snapshot, part))
        self.world.oracle.check(self)

    def _overwrite(self, holding: Holding) -> None:
        """What else lies in the parity set is gone."""
        for other in self.state.holdings:
            if other is not holding and (other.shape, other.area) == (holding.shape, holding.area):
                self.parity.pop(other.snapshot, None)

    def _intact(self, snapshot: SnapshotId, part: str, holding: Holding) -> bool:
        if part == "data":
            record = holding.records.get(holding.string)
            if record is None:  # its checksums are those of its chunks
                return snapshot in self.data and (snapshot, "data") not in self.damaged
            return snapshot in self.data and agrees(self.data[snapshot], record)
        return snapshot in self.parity and agrees(self.parity[snapshot], self.parity_records[snapshot])

    def peers(self, number: int) -> list[Node]:
        """Whoever may hold a string of that number and answers: the member, and guests."""
        state = self.state
        assert state.membership is not None
        arenas = [state.membership.arenas[number], *(a for a, string in state.holders.items() if string == number)]
        return [found for arena in arenas if (found := self.world.reach(self.arena, arena)) is not None]

    def piece(self, number: int, snapshot: SnapshotId, part: str, offset: int, size: int) -> Bytes:
        """Verified bytes of another member; what is damaged there is not given."""
        for peer in self.peers(number):
            holding = peer.state.find(snapshot)
            whole = holding is not None and (holding.data if part == "data" else holding.encoded)
            if holding is not None and whole and holding.string == number and peer._intact(snapshot, part, holding):
                found = peer.data[snapshot] if part == "data" else peer.parity[snapshot]
                return found[offset : offset + size].copy()
        raise UnavailableError(f"{part} of {number}")

    def _encoded(self, snapshot: SnapshotId, holding: Holding) -> Bytes:
        """This member's parities: of its own stripe, and its shares of others, from their encoders."""
        striping = striping_of(holding.shape, holding.string, self._records(snapshot, holding))
        area = parity_area(striping)
        encoders = {row.encoder for row in striping.shares(holding.string)} | {holding.string}
        for encoder in sorted(encoders):
            if encoder != holding.string and not self.peers(encoder):
                raise UnavailableError(f"encoder {encoder}")
            asked = self if encoder == holding.string else self.peers(encoder)[0]

            def fetch(number: int, offset: int, size: int, asked: Node = asked) -> Bytes:
                return asked.piece(number, snapshot, "data", offset, size)

            encode_stripe(striping, encoder, fetch, {holding.string: area})
        return area

    def _records(self, snapshot: SnapshotId, holding: Holding) -> dict[int, bytes]:
        """Seal records of the group: own ones, and those of members that can be reached."""
        found = dict(holding.records)
        for number in holding.shape.group_of(holding.string):
            for peer in self.peers(number):
                theirs = peer.state.find(snapshot)
                found |= {} if theirs is None else theirs.records
        return found

    def _rebuilt(self, snapshot: SnapshotId, holding: Holding) -> tuple[Bytes, bytes]:
        for peer in self.peers(holding.string):  # a guest has it: copied, not decoded
            theirs = peer.state.find(snapshot)
            record = theirs.records.get(holding.string) if theirs is not None and theirs.data else None
            if theirs is not None and record is not None and peer._intact(snapshot, "data", theirs):
                return peer.data[snapshot].copy(), record
        records = self._records(snapshot, holding)
        striping = striping_of(holding.shape, holding.string, records)
        lost = {number for number in striping.group.nodes if not self._has_both(number, snapshot)} | {holding.string}
        data = read_string(
            striping,
            holding.string,
            lost,
            lambda number, offset, size: self.piece(number, snapshot, "data", offset, size),
            lambda number, offset, size: self.piece(number, snapshot, "parity", offset, size),
        )
        if not agrees(data, records[holding.string]):
            raise AssertionError(f"{snapshot}: string {holding.string} is rebuilt wrongly")
        return data, records[holding.string]

    def _has_both(self, number: int, snapshot: SnapshotId) -> bool:
        """Some holder of that string has it with its parities: reading it costs no position of a stripe."""
        found = [h for peer in self.peers(number) if (h := peer.state.find(snapshot)) and h.string == number]
        return any(h.data for h in found) and any(h.encoded or h.shape.parity == 0 for h in found)
