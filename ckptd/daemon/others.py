"""The daemon and those of the job's other nodes: what the member machine wants said, fetched and protected.

Owns network and protection of one daemon, as long as its job has several nodes. Everything here is told to the machine,
or asked by it; nothing is decided.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
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
from ckptd.protocol.cluster.facts import Membership, children_of, parent_of
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

GUEST_S = 3.0
"""How long an earlier member may take to answer; then it counts as lost."""

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
        self._network = Network(job, node, arena.network, self._answer, lambda: machine.state.count("not_reached"))
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
        if len(membership.everybody) > 1:
            try:
                self._network.resume(membership.epoch, self._throttle(self._machine.state.policy))
            except ConfigError as error:
                log.error("this node is cut off from the others until the next epoch: %s", error)
                return
        self._protection.begin()
        self._protection.met()

    def contact(self, message: m.Prepare) -> bytes:
        """How others will find this node in an epoch that is promised. Raises ConfigError."""
        if not message.address:
            return b""
        return msgspec.msgpack.encode(self._network.prepare(message.epoch, message.address, message.tls_dir))

    def begin(self, message: m.Begin, raw: bytes) -> None:
        """The members of an epoch that is about to begin. Raises ConfigError, FormatError."""
        expected = len(message.begin.membership.everybody)
        if expected == 1:
            self._network.leave()
            return
        directory = decode_directory(raw)
        if len(directory.members) != expected:
            raise FormatError(f"{len(directory.members)} of {expected} members and guests are named")
        self._network.begin(message.begin.epoch, directory, self._throttle(message.policy))

    def begun(self) -> None:
        """It has."""
        self._said.clear()
        self._protection.begin()

    def meet(self) -> None:
        """Raises ConfigError for a node that this one works with and cannot talk to. In a thread."""
        self._network.meet(self._neighbours())
        self._protection.met()

    def _neighbours(self) -> list[str]:
        """The nodes that this one works with: its group, and those above and below it."""
        state, names = self._machine.state.cluster, self._network.names
        if state.number is None or state.membership is None or len(names) < len(state.membership.arenas):
            return []
        parent = parent_of(state.number)
        children = children_of(state.number, len(state.membership.arenas))
        wanted = {*state.membership.shape.group_of(state.number), *children}
        wanted |= set() if parent is None else {parent}
        return [names[number] for number in sorted(wanted - {state.number})]

    async def invite(self, message: m.Invite) -> m.Invited:
        """What other members of the epoch that has begun here promise for the next one, as far as they answer. Raises
        ConfigError."""
        membership = self._machine.state.cluster.membership
        known = {} if membership is None else self._nodes(membership)
        asked = [n for arena, n in known.items() if arena not in message.arenas and n not in message.nodes]
        contact = msgspec.msgpack.encode(self._network.prepare_again(message.epoch))
        found = await self._ask_all(asked, "prepare", cluster.encode(cluster.Prepare(message.epoch)))
        guests = [guest for answer in found.values() if (guest := _invited(answer)) is not None]
        return m.Invited([promise for promise, _ in guests], [contact for _, contact in guests], contact)

    async def usher(self, message: m.Usher, raw: bytes) -> None:
        """Tells guests how the epoch begins. Who does not answer is lost."""
        membership = self._machine.state.cluster.membership
        known = {} if membership is None else self._nodes(membership)
        guests = [known[arena] for arena in message.begin.membership.guests if arena in known]
        await self._ask_all(guests, "begin", msgspec.msgpack.encode((cluster.encode(message.begin), raw)))

    async def _ask_all(self, nodes: Sequence[str], kind: str, body: bytes) -> dict[str, bytes]:
        """Their answers, as far as they come."""
        asked = (asyncio.to_thread(self._network.ask, node, kind, body, GUEST_S) for node in nodes)
        answers = dict(zip(nodes, await asyncio.gather(*asked, return_exceptions=True), strict=True))
        for node, answer in answers.items():
            if isinstance(answer, BaseException):
                log.warning("node %s, which is no node of the job any more, counts as lost: %s", node, answer)
        return {node: answer for node, answer in answers.items() if isinstance(answer, bytes)}

    def _nodes(self, membership: Membership) -> dict[str, str]:
        """Arena -> node, of all who take part in the epoch."""
        return dict(zip(membership.everybody, self._network.names, strict=False))

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
                node = None if membership is None else self._nodes(membership).get(arena)
                if node is not None:
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
        self._machine.resting = self._protection.rests(now_s)
        if now_s - self._said_at >= REPEAT_S:
            self._said_at = now_s
            self._machine.job.repeat()
            self._network.greet(self._neighbours())
        if now_s - self._scrubbed_at >= SCRUB_S:
            if self._scrubbed_at:
                self._machine.job.scrub()
            self._scrubbed_at = now_s

    def report(self) -> dict[str, Any]:
        """What keeps snapshots from being protected; JSON-able."""
        neighbours = self._neighbours()
        unreached = [found for found in self._network.unreached() if found["node"] in neighbours]
        return {"not_reached": unreached, "failing": self._protection.failing}

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
            members = self._network.names[: len(state.cluster.membership.arenas) if state.cluster.membership else 0]
            others = [node for node in members if node != self._node]
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
            case "prepare":
                return self._promise(body)
            case "begin":
                self._join(body)
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

    def _promise(self, body: bytes) -> bytes:
        """A job begins an epoch without this node, which may hold something that it needs."""
        asked = cluster.decode(body)
        answer = self._machine.prepare(asked.epoch)
        refused = isinstance(answer, cluster.Refuse)
        contact = b"" if refused else msgspec.msgpack.encode(self._network.prepare_again(asked.epoch))
        self._acted()
        return msgspec.msgpack.encode((cluster.encode(answer), contact))

    def _join(self, body: bytes) -> None:
        """The epoch begins, with this node as a guest: from when whoever has said so has his answer."""
        try:
            packed, raw = msgspec.msgpack.decode(body, type=tuple[bytes, bytes])
        except msgspec.MsgspecError as error:
            raise FormatError(f"how an epoch begins for guests: {error}") from None
        begin, directory = cluster.decode(packed), decode_directory(raw)
        state = self._machine.state.cluster
        if not isinstance(begin, cluster.Begin) or state.arena not in begin.membership.guests:
            raise FormatError(f"how an epoch begins for guests: {type(begin).__name__}, not for this arena")

        def join() -> None:
            if begin.epoch != state.promised or begin.epoch == state.epoch:
                return
            try:
                self._network.begin(begin.epoch, directory, self._throttle(self._machine.state.policy))
            except ConfigError as error:
                log.error("this node cannot be a guest of epoch %s: %s", begin.epoch, error)
                return
            self._machine.join(begin)
            self.begun()
            self._acted()

        asyncio.get_running_loop().call_soon(join)


def _invited(raw: bytes) -> tuple[cluster.Promise, bytes] | None:
    """What a guest has promised, and how it is found; None if it did not promise."""
    try:
        answer, contact = msgspec.msgpack.decode(raw, type=tuple[bytes, bytes])
        promise = cluster.decode(answer)
    except (msgspec.MsgspecError, FormatError) as error:
        log.warning("a node that is no node of the job any more: its promise: %s", error)
        return None
    return (promise, contact) if isinstance(promise, cluster.Promise) else None


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
