"""The daemon and those of the job's other nodes: what the member machine wants said, fetched and protected.

Owns network and protection of one daemon, as long as its job has several nodes. Everything here is told to the machine,
or asked by it; nothing is decided.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec

from ckptd.core.errors import CkptdError, ConfigError, FormatError, NotFoundError
from ckptd.core.types import Job, SnapshotId
from ckptd.daemon.arena import Arena
from ckptd.daemon.network import Directory, Network, decode_directory, key_of
from ckptd.daemon.protecting import Protection
from ckptd.observe.trace import Trace
from ckptd.protocol import messages as m
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.cluster.facts import children_of, parent_of
from ckptd.protocol.node import NodeMachine
from ckptd.tiers.arena import Slot
from ckptd.tiers.peers import Announcement, Throttle

log = logging.getLogger("ckptd.daemon")

REPEAT_S = 1.0
"""How often is said again what may not have arrived."""

SCRUB_S = 300.0
"""How often one thing that is held is compared with its checksums."""

GATHER_S = 1.0
"""After a failure to fetch what other nodes' ranks have said."""

PIECES_S = 60.0

LEAVE_S = 2.0
"""How long the last messages may take."""


class Others:
    """See the module docstring. `pieces`: what this node's ranks have said of their states; `acted`: something was said
    to the machine."""

    def __init__(
        self,
        machine: NodeMachine,
        arena: Arena,
        job: Job,
        node: str,
        pieces: Callable[[], Mapping[int, bytes]],
        acted: Callable[[], None],
        trace: Trace,
    ) -> None:
        self._machine, self._arena, self._pieces, self._acted = machine, arena, pieces, acted
        self._network = Network(job, node, arena.network, self._answer)
        self._protection = Protection(machine, self._network, arena, acted, trace)
        self._node = node
        self._said: dict[int, bytes] = {}
        self._said_at = self._scrubbed_at = 0.0
        self._tasks: set[asyncio.Future[None]] = set()

    # --- epochs

    def resume(self) -> None:
        """Goes on where the daemon before has left."""
        membership = self._machine.state.cluster.membership
        if membership is None:
            return
        if len(membership.arenas) > 1:
            try:
                self._network.resume(membership.epoch, self._throttle(self._machine.state.policy))
            except ConfigError as error:
                log.error("this node is cut off from the others until the next epoch: %s", error)
                return
        self._protection.begin()

    def contact(self, message: m.Prepare) -> bytes:
        """How others will find this node in an epoch that is promised. Raises ConfigError."""
        if not message.address:
            return b""
        return msgspec.msgpack.encode(self._network.prepare(message.epoch, message.address, message.tls_dir))

    def begin(self, message: m.Begin, raw: bytes) -> None:
        """The members of an epoch that is about to begin. Raises ConfigError, FormatError."""
        if len(message.begin.membership.arenas) == 1:
            self._network.leave()
            return
        directory = decode_directory(raw)
        if len(directory.members) != len(message.begin.membership.arenas):
            raise FormatError(f"{len(directory.members)} of {len(message.begin.membership.arenas)} members are named")
        self._network.begin(message.begin.epoch, directory, self._throttle(message.policy))

    def begun(self) -> None:
        """It has."""
        self._said.clear()
        self._protection.begin()

    def meet(self) -> None:
        """Raises ConfigError for a node that this one works with and cannot talk to. In a thread."""
        state, names = self._machine.state.cluster, self._network.names
        if state.number is None or state.membership is None:
            return
        parent = parent_of(state.number)
        wanted = {*state.membership.shape.group_of(state.number), *children_of(state.number, len(names))}
        wanted |= set() if parent is None else {parent}
        self._network.meet([names[number] for number in sorted(wanted - {state.number})])

    async def lend(self, message: m.Borrow) -> list[Slot]:
        """Strings that a rank wants to restore from. Raises CkptdError."""
        return await self._protection.lend(message)

    async def leave(self) -> None:
        """Everything ends, once what is under way has been said."""
        await self._network.finish(LEAVE_S)
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._protection.close()
        self._network.close()

    @staticmethod
    def _throttle(policy: m.Policy | None) -> Throttle:
        return Throttle(None if policy is None else policy.protection_bandwidth)

    # --- what the machine wants

    def carry_out(self, action: cluster.MemberAction) -> None:
        """One of its actions that reach beyond this node."""
        match action:
            case cluster.Tell(arena=arena, message=message):
                membership = self._machine.state.cluster.membership
                if membership is not None and arena in membership.arenas:
                    node = self._network.names[membership.arenas.index(arena)]
                    self._network.tell(node, key_of(message), message)
            case cluster.Describe() | cluster.Encode() | cluster.Rebuild() | cluster.Verify():
                self._protection.carry_out(action)
            case cluster.Free():
                self._protection.freed(action)
            case cluster.Gather(generation=generation):
                self._in_background(self._gather(generation))
            case _:
                pass

    def tick(self, now_s: float) -> None:
        """Time passes."""
        if len(self._network.names) == 1:
            return
        if now_s - self._said_at >= REPEAT_S:
            self._said_at = now_s
            self._machine.job.repeat()
        if now_s - self._scrubbed_at >= SCRUB_S:
            if self._scrubbed_at:
                self._machine.job.scrub()
            self._scrubbed_at = now_s

    def said(self) -> dict[int, bytes]:
        """What ranks of other nodes have said of their states."""
        return self._said

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _gather(self, generation: int) -> None:
        """Fetches what other nodes' ranks have said, as often as it takes."""
        state = self._machine.state
        epoch = state.epoch
        assert epoch is not None
        while state.epoch == epoch and state.generation == generation and state.surveying:
            name = SnapshotId(epoch, generation)
            others = [node for node in self._network.names if node != self._node]
            try:
                found = await asyncio.gather(*(asyncio.to_thread(self._fetch, node, name) for node in others))
            except CkptdError as error:
                log.warning("what other nodes' ranks have said: %s", error)
                await asyncio.sleep(GATHER_S)
                continue
            self._said = {rank: said for part in found for rank, said in part.items()}
            self._machine.gathered(generation)
            self._acted()
            return

    def _fetch(self, node: str, name: SnapshotId) -> dict[int, bytes]:
        """In a thread."""
        raw = self._network.ask(node, "pieces", msgspec.msgpack.encode(name), PIECES_S)
        packed = bytearray(int.from_bytes(raw, "little"))
        self._network.peers[node].pull(name, "pieces", 0, memoryview(packed))
        try:
            return msgspec.msgpack.decode(packed, type=dict[int, bytes])
        except msgspec.MsgspecError as error:
            raise FormatError(f"node {node}: what its ranks have said: {error}") from None

    # --- what others ask

    def _answer(self, kind: str, body: bytes) -> bytes:
        match kind:
            case "tell":
                self._machine.job.handle(cluster.decode(body))
                self._acted()
                return b""
            case "pieces":
                name = _name(body)
                if (self._machine.state.epoch, self._machine.state.generation) != (name.epoch, name.step):
                    raise NotFoundError(f"generation {name.step} of {name.epoch} is not that of node {self._node!r}")
                packed = msgspec.msgpack.encode(dict(self._pieces()))
                return self._network.offer(name, "pieces", packed).to_bytes(8, "little")
            case "records":
                name = _name(body)
                found = [h.records for h in self._machine.state.cluster.holdings if h.name == name]
                return msgspec.msgpack.encode(found[0] if found else {})
            case _:
                raise FormatError(f"message {kind!r} between daemons: not one of this version's")


def packed_directory(token: bytes, contacts: list[bytes]) -> bytes:
    """What goes beside Begin, from what the daemons of the members have said of themselves, in their order."""
    members = [msgspec.msgpack.decode(contact, type=Announcement).check() for contact in contacts]
    return msgspec.msgpack.encode(Directory(token, members))


def _name(body: bytes) -> SnapshotId:
    with contextlib.suppress(msgspec.MsgspecError):
        found = msgspec.msgpack.decode(body, type=SnapshotId)
        found.epoch.check()
        return found
    raise FormatError("a question of another daemon: expected the name of a snapshot")
