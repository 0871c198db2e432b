"""The daemon's work for protection: carries out Describe, Encode, Rebuild and Verify of the member machine, in threads.

Owns the parity areas, what others may pull of each snapshot, and what runs. Bytes are tiers/protection's to move.

Invariants: work of an older epoch ends without a word to the machine; memory is given to others only while the machine
holds it, and an area is written anew only when nobody reads it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from ckptd.core.errors import CkptdError, CorruptionError, DaemonError, DeadlineError, UnrecoverableError
from ckptd.core.types import SnapshotId
from ckptd.daemon.network import Network
from ckptd.daemon.priority import PROTECTING, give_way, protecting_cores
from ckptd.observe.trace import Trace
from ckptd.plan.stripe import Group
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.cluster.state import ClusterState, Holding
from ckptd.protocol.messages import MAX_TEXT, Borrow, SlotInfo
from ckptd.protocol.node import NodeMachine
from ckptd.tiers.arena import Slot
from ckptd.tiers.peers import Cancellation
from ckptd.tiers.protection import Holders, ParityArea, Protector, SealedGroup, SealRecord
from ckptd.tiers.throttle import Bucket

log = logging.getLogger("ckptd.daemon")

THREADS = 4
"""A kind of work each."""

PATIENCE_S = 60.0
"""While ranks wait: how long other nodes may take to be reached again, and nodes that have left the job to read what
they hold before others may copy it."""

AGAIN_S = 0.2

SETTLE_S = 2.0
"""How long after all others have begun a failure may be what is left of trying too early."""

Work = cluster.Describe | cluster.Encode | cluster.Rebuild | cluster.Verify


class Memory(Protocol):
    """The arena, as far as protection needs it."""

    def slots_of(self, snapshot: SnapshotId) -> list[Slot]:
        """Of a grant that is held here, by rank."""

    def take_over(self, number: int, slot: Slot) -> None:
        """Keeps a slot that was made here."""

    @property
    def areas(self) -> dict[int, ParityArea]:
        """Parity areas by number."""

    def keep_area(self, number: int, area: ParityArea) -> None:
        """Keeps a parity area in the place of another."""


class Protection:
    """See the module docstring. `acted`: something was said to the machine."""

    def __init__(
        self,
        machine: NodeMachine,
        network: Network,
        memory: Memory,
        acted: Callable[[], None],
        trace: Trace,
    ) -> None:
        self._machine, self._network, self._memory, self._acted = machine, network, memory, acted
        self._trace = trace
        self._protector: Protector | None = None
        self._running: dict[tuple[SnapshotId, str], Cancellation] = {}
        self._names: dict[SnapshotId, SnapshotId] = {}
        """Grant -> name of what others may pull."""
        self._threads = ThreadPoolExecutor(THREADS, "ckptd-protect", give_way, (PROTECTING,))
        self._cpu = Bucket(protecting_cores(), time.monotonic())
        self._tasks: set[asyncio.Future[None]] = set()
        self._withdrawing: set[asyncio.Future[None]] = set()
        self._lent: dict[tuple[SnapshotId, tuple[int, ...]], asyncio.Future[list[Slot]]] = {}
        self._settled_s = math.inf
        self._failing: dict[str, str] = {}
        """Kind of work -> how it has failed last, until it succeeds."""

    @property
    def failing(self) -> list[str]:
        """What cannot be done at the moment, and why."""
        return list(self._failing.values())

    @property
    def _state(self) -> ClusterState:
        return self._machine.state.cluster

    def begin(self) -> None:
        """An epoch has begun, or this daemon has taken it over: what is held here is given to others."""
        self._stop(lambda snapshot, kind: True)
        self._give_back()
        self._settled_s = math.inf
        self._failing.clear()
        if self._protector is not None:
            self._protector.close()
            self._protector = None
        membership, names = self._state.membership, self._network.names
        if membership is None or len(names) < len(membership.everybody):
            return  # cut off from the others until the next epoch
        self._protector = Protector(
            self._network.own,
            dict(enumerate(names)),
            self._network.peers,
            self._network.sources,
            self._network.throttle,
        )
        for holding in self._state.holdings:
            self._give(holding)

    def met(self) -> None:
        """The others have begun as well: what cannot be had from them from now on is not there. In a thread."""
        self._settled_s = time.monotonic() + SETTLE_S

    def _give(self, holding: Holding) -> None:
        assert self._protector is not None
        name = holding.name
        if name is None:
            return
        self._names[holding.snapshot] = name
        own = holding.records.get(holding.string)
        if holding.data and own is not None:
            self._protector.give_string(name, self._memory.slots_of(holding.snapshot), SealRecord.decode(own))
        area = None if holding.area is None else self._memory.areas.get(holding.area)
        if holding.encoded and area is not None:
            group = Group(holding.shape.group_of(holding.string), holding.shape.parity)
            records = {number: SealRecord.decode(raw) for number, raw in holding.records.items()}
            try:
                self._protector.give_parity(area)
                if holding.string == self._state.number and self._state.is_current(holding.snapshot):
                    self._protector.give_shares(SealedGroup(name, group, records), holding.string)
            except CkptdError as error:
                log.error("parities of %s: %s", name, error)

    async def lend(self, wanted: Borrow) -> list[Slot]:
        """Strings of another membership, made anew from what its members hold; for every rank that asks, once. Raises
        CkptdError."""
        key = (wanted.snapshot, tuple(wanted.strings))
        if key not in self._lent:
            self._machine.state.count("lent")
            self._lent[key] = asyncio.ensure_future(asyncio.to_thread(self._make, wanted))
        return await asyncio.shield(self._lent[key])

    def _make(self, wanted: Borrow) -> list[Slot]:
        membership = self._state.membership
        if self._protector is None or membership is None:
            raise DaemonError("no epoch with other nodes has begun here")
        name = SnapshotId(wanted.snapshot.epoch, wanted.step)
        nodes = dict(zip(membership.everybody, self._network.names, strict=True))
        made: list[Slot] = []
        for string in wanted.strings:
            group = Group(wanted.shape.group_of(string), wanted.shape.parity)
            strings: dict[int, list[str]] = {number: [] for number in group.nodes}
            parities: dict[int, list[str]] = {number: [] for number in group.nodes}
            for arena, (number, data, parity) in wanted.held.items():
                if arena in nodes and number in strings:
                    strings[number] += [nodes[arena]] if data else []
                    parities[number] += [nodes[arena]] if parity else []
            made += self._make_one(name, group, string, Holders(strings, parities), bool(membership.guests))
        return made

    def _make_one(self, name: SnapshotId, group: Group, string: int, held: Holders, guests: bool) -> list[Slot]:
        """A string, from nodes that can be reached again in time; `guests` may only just be making their records."""
        protector, until = self._protector, time.monotonic() + PATIENCE_S
        asked = sorted({node for nodes in (*held.strings.values(), *held.parities.values()) for node in nodes})
        while protector is not None:
            late = time.monotonic() >= until
            try:
                records = seal_records(self._network, name, group, asked, self._records_of(name))
                if late or not guests or records.keys() >= set(group.nodes):
                    with self._network.throttle.urgent():
                        return protector.rebuild(SealedGroup(name, group, records), string, held)
            except DaemonError as error:
                log.warning("string %d of %s: %s", string, name, error)
                if late or self._protector is not protector:
                    raise
            time.sleep(AGAIN_S)
        raise DaemonError("no epoch with other nodes has begun here")

    def _records_of(self, name: SnapshotId) -> dict[int, bytes]:
        return next((dict(h.records) for h in self._state.holdings if h.name == name), {})

    def _give_back(self) -> None:
        """What was lent to an older epoch is needed no more."""
        for future in self._lent.values():
            future.add_done_callback(_close_lent)
        self._lent.clear()

    def freed(self, action: cluster.Free) -> None:
        """Whatever works on it ends, and others get it no longer."""
        kinds = ("Encode",) if action.part == "parity" else ("Describe", "Rebuild", "Verify")
        self._stop(lambda snapshot, kind: snapshot == action.snapshot and kind in kinds)
        name = self._names.get(action.snapshot)
        if self._protector is not None and name is not None:
            task = asyncio.ensure_future(asyncio.to_thread(self._protector.withdraw, name, action.part))
            self._withdrawing.add(task)
            task.add_done_callback(self._withdrawing.discard)
        if self._state.find(action.snapshot) is None:
            self._names.pop(action.snapshot, None)

    def close(self) -> None:
        """Everything ends; areas go with the arena."""
        self._stop(lambda snapshot, kind: True)
        self._give_back()
        if self._protector is not None:
            self._protector.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _stop(self, wanted: Callable[[SnapshotId, str], bool]) -> None:
        for key in [key for key in self._running if wanted(*key)]:
            self._running.pop(key).cancel()

    # --- work

    def carry_out(self, action: Work) -> None:
        """Begins some work; the machine hears how it ends."""
        holding, protector = self._state.find(action.snapshot), self._protector
        if holding is None or holding.name is None or protector is None:
            self._failed(action, DaemonError("no epoch with other nodes has begun here"))
            return
        self._names[action.snapshot] = holding.name
        task = _Task(action, holding, protector, self._network, self._state, self._memory.areas, Cancellation())
        if not isinstance(action, cluster.Rebuild):
            task.slots = [slot.duplicate() for slot in self._memory.slots_of(action.snapshot)]
        self._running[action.snapshot, type(action).__name__] = task.cancellation
        running = asyncio.ensure_future(self._run(task))
        self._tasks.add(running)
        running.add_done_callback(self._tasks.discard)

    async def _run(self, task: _Task) -> None:
        action, epoch, kind = task.action, self._state.epoch, type(task.action).__name__
        failure: Exception | None = None
        try:
            if self._withdrawing:
                await asyncio.wait(self._withdrawing)
            await asyncio.get_running_loop().run_in_executor(self._threads, self._traced, task)
        except (CkptdError, OSError) as error:
            failure = error
        except Exception as error:
            log.exception("%s of %s", kind, task.name)
            failure = error
        finally:
            for slot in task.slots:
                slot.close()
        key = (action.snapshot, kind)
        if self._running.get(key) is task.cancellation:
            del self._running[key]
        if self._state.epoch != epoch or task.cancellation.cancelled:
            task.discard()
        elif failure is not None:
            log.warning("%s of %s: %s", kind, task.name, failure)
            self._machine.state.count("protection_errors")
            self._failing[kind] = f"{kind} of {task.name}: {failure}"[:MAX_TEXT]
            self._failed(action, failure, task.began_s)
        else:
            self._failing.pop(kind, None)
            self._done(task)
        self._acted()

    def rests(self, now_s: float) -> bool:
        """Nothing more is to be encoded for now: the job goes first."""
        return self._cpu.delay(now_s) > 0

    def _traced(self, task: _Task) -> None:
        """What an encoding takes is what the whole process takes meanwhile: half of it goes to threads of Flight's,
        much of that for other nodes. A flush beside it counts as well."""
        before = time.process_time()
        with self._trace.spanning(type(task.action).__name__.lower(), step=task.name.step):
            try:
                task.run()
            finally:
                if isinstance(task.action, cluster.Encode):
                    self._cpu.charge(time.process_time() - before, time.monotonic())

    def _failed(self, action: Work, error: Exception, began_s: float = -math.inf) -> None:
        """What was begun before the others had begun is no sign of anything."""
        job, damaged = self._machine.job, isinstance(error, CorruptionError)
        match action:
            case cluster.Describe():
                job.describing_failed(action.snapshot, damaged)
            case cluster.Encode():
                job.encoding_failed(action.snapshot)
            case cluster.Rebuild():
                patience_s = 0.0 if isinstance(error, UnrecoverableError) else PATIENCE_S
                if began_s >= self._settled_s + patience_s:
                    kind = type(error) if isinstance(error, CkptdError) else DaemonError
                    self._machine.not_rebuilt(action.snapshot, kind.__name__, str(error))
                job.rebuilding_failed(action.snapshot)
            case cluster.Verify():
                job.verified(action.snapshot, action.part, not damaged)

    def _done(self, task: _Task) -> None:
        job = self._machine.job
        match task.action:
            case cluster.Describe(snapshot=snapshot):
                assert task.record is not None
                job.described(snapshot, task.record.encode())
            case cluster.Encode(snapshot=snapshot, area=number):
                assert task.area is not None
                if self._memory.areas.get(number) is not task.area:
                    self._memory.keep_area(number, task.area)
                job.encoded(snapshot)
            case cluster.Rebuild(snapshot=snapshot):
                assert task.record is not None
                numbers = self._machine.rebuilt(
                    snapshot, [slot_info(0, slot) for slot in task.made], task.record.encode()
                )
                for number, slot in zip(numbers, task.made, strict=False):
                    self._memory.take_over(number, slot)
                if not numbers:
                    task.discard()
                elif self._protector is not None:
                    self._protector.give_string(task.name, task.made, task.record)
            case cluster.Verify(snapshot=snapshot, part=part):
                job.verified(snapshot, part, True)


def slot_info(number: int, slot: Slot) -> SlotInfo:
    """A slot as messages name it."""
    geometry = slot.geometry
    return SlotInfo(number, geometry.rank, geometry.digest, geometry.size, slot.frozen_bytes)


class _Task:
    """One piece of work; `run` is called in a thread."""

    def __init__(
        self,
        action: Work,
        holding: Holding,
        protector: Protector,
        network: Network,
        state: ClusterState,
        areas: Mapping[int, ParityArea],
        cancellation: Cancellation,
    ) -> None:
        assert holding.name is not None
        assert state.membership is not None
        self.action, self.name, self.cancellation = action, holding.name, cancellation
        self.began_s = time.monotonic()
        self.slots: list[Slot] = []
        self.made: list[Slot] = []
        self.record: SealRecord | None = None
        self.area: ParityArea | None = None
        self._protector, self._network = protector, network
        self._group = Group(holding.shape.group_of(holding.string), holding.shape.parity)
        self._number, self._names = holding.string, network.names
        nodes = dict(zip(state.membership.everybody, network.names, strict=False))
        self._guests = [(string, nodes[arena]) for arena, string in state.holders.items() if arena in nodes]
        self._records = dict(holding.records)
        self._encoded = holding.encoded
        wanted = action.area if isinstance(action, cluster.Encode) else holding.area
        self._held = None if wanted is None else areas.get(wanted)

    def run(self) -> None:
        """Raises CkptdError."""
        match self.action:
            case cluster.Describe():
                self.record = self._protector.describe(self.name, self.slots, self.cancellation)
                self._protector.give_string(self.name, self.slots, self.record)
            case cluster.Encode():
                self._encode()
            case cluster.Rebuild():
                with self._network.throttle.urgent():  # training waits for it
                    self._rebuild()
            case cluster.Verify(part="parity"):
                if self._held is not None:
                    self._protector.verify_parity(self._held, self.cancellation)
            case cluster.Verify():
                self._verify_string()

    def discard(self) -> None:
        """Nobody wants what was made."""
        for slot in self.made:
            slot.close()
        if self.area is not None and self.area is not self._held:
            self.area.close()

    def _sealed(self) -> SealedGroup:
        records = {number: SealRecord.decode(raw) for number, raw in self._records.items()}
        return SealedGroup(self.name, self._group, records)

    def _encode(self) -> None:
        sealed = self._sealed()
        self.area = self._held
        if self.area is None or self.area.parity_bytes < sealed.striping.parity_bytes:
            self.area = ParityArea.create(sealed.striping.parity_bytes)
        self._protector.encode(sealed, self._number, self.area, self.cancellation)

    def _rebuild(self) -> None:
        held = {number: [self._names[number]] for number in self._group.nodes}
        held[self._number] = []
        for string, guest in self._guests:
            if string in held:
                held[string].append(guest)
        others = [node for nodes in held.values() for node in nodes]
        records = seal_records(self._network, self.name, self._group, others, self._records)
        sealed = SealedGroup(self.name, self._group, records)
        own = [self._network.own] if self._encoded else []
        holders = Holders(held, {**held, self._number: [*held[self._number], *own]})
        self.record = sealed.records[self._number]
        self.made = self._protector.rebuild(sealed, self._number, holders, self.cancellation)

    def _verify_string(self) -> None:
        raw = self._records.get(self._number)
        if raw is None:
            self._protector.describe(self.name, self.slots, self.cancellation)
        else:
            self._protector.verify_string(self.name, self.slots, SealRecord.decode(raw), self.cancellation)


def seal_records(
    network: Network, name: SnapshotId, group: Group, nodes: Sequence[str], known: Mapping[int, bytes]
) -> dict[int, SealRecord]:
    """Of all members of a group, as far as they are `known` or one of the nodes has them: each has those of all. Raises
    DaemonError where some are missing and not all nodes could be asked."""
    found, unreached = dict(known), None
    for node in nodes:
        if found.keys() >= set(group.nodes):
            break
        try:
            raw = network.ask(node, "records", msgspec.msgpack.encode(name))
            found = msgspec.msgpack.decode(raw, type=dict[int, bytes]) | found
        except (CkptdError, msgspec.MsgspecError) as error:
            log.warning("seal records of %s from node %s: %s", name, node, error)
            unreached = error if isinstance(error, DaemonError | DeadlineError) else unreached
    if unreached is not None and not found.keys() >= set(group.nodes):
        raise DaemonError(f"seal records of {name} are missing: {unreached}")
    return {number: SealRecord.decode(raw) for number, raw in found.items() if number in group.nodes}


def _close_lent(future: asyncio.Future[list[Slot]]) -> None:
    if not future.cancelled() and future.exception() is None:
        for slot in future.result():
            slot.close()
