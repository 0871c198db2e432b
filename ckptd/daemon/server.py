"""The daemon process: carries out what the node machine (protocol/node.py) decides.

Owns the sockets, the descriptors of the arena, the ledger, the watch over trainers' processes and the flush thread.
One asyncio loop; the store is touched only in worker threads. Whatever the machine decides is in the ledger before it
is carried out, so that the next daemon, started by the keeper, goes on from there.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any

import msgspec

from ckptd.core.config import node_name
from ckptd.core.errors import CkptdError, FormatError
from ckptd.core.types import Job, SnapshotId
from ckptd.daemon.address import Address, address_of, listen, take_over
from ckptd.daemon.arena import Arena, close_all
from ckptd.daemon.flush import Stores
from ckptd.daemon.others import Others
from ckptd.daemon.pieces import Pieces
from ckptd.daemon.processes import Watch, identify
from ckptd.daemon.protecting import slot_info
from ckptd.daemon.wire import readable, receive, send
from ckptd.daemon.writing import Writing
from ckptd.observe.logging import to_stderr
from ckptd.observe.trace import Trace
from ckptd.protocol import messages as m
from ckptd.protocol.actions import Action, Disconnect, Drop, Exit, Send, WriteRecord
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.node import NodeMachine
from ckptd.protocol.slots import memory_bytes
from ckptd.tiers.arena import Slot
from ckptd.tiers.memory import Headroom, headroom

log = logging.getLogger("ckptd.daemon")

TICK_S = 0.25
MAX_BACKLOG = 10_000
"""Messages that may wait for a connection that does not read; beyond it is cut."""

MAX_STRANGERS = 512
"""Connections that are no ranks: tools, ranks before their Hello. Where there are more, the oldest are cut."""

LEAVE_S = 10.0
"""How long a cancelled flush may take to notice."""

TAKE_S = 5.0
"""How long a daemon that leaves may take for all else, and one that starts to listen."""


class Peer:
    """One connection."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        self.number = number
        self.connection = connection
        self.backlog: collections.deque[tuple[m.Message, list[int]]] = collections.deque()
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self.pid, self.uid = pid, uid


class Daemon:
    """See the module docstring."""

    def __init__(self, address: Address, keeper: int | None) -> None:
        self._address = address
        self._arena = Arena(address, keeper)
        self._slots = self._arena.slots
        self._machine = NodeMachine(self._arena.recover(address.job.name), time.monotonic())
        self._peers: dict[int, Peer] = {}
        self._numbered = 0
        self._pieces = Pieces()
        self._processes = Watch(self._ended)
        self._trace = Trace(f"daemon-{node_name()}")
        self._stores = Stores(address.job.name, trace=self._trace)
        self._tasks: set[asyncio.Future[None]] = set()
        self._writing = Writing(self._machine, self._stores, self._slots, self._in_thread)
        self._prepared: dict[int, m.Prepare] = {}
        self._others: Others
        self._leaving: asyncio.Future[str]
        self._listening: socket.socket

    # --- the loop

    async def serve(self) -> str:
        """Until the machine says to leave; returns why."""
        loop = asyncio.get_running_loop()
        self._leaving = loop.create_future()
        self._others = Others(
            self._machine, self._arena, self._address.job, node_name(), self._said_here, self._carry_out, self._trace
        )
        self._others.resume()
        self._take_options()
        for instance, process in list(self._machine.state.processes.items()):
            self._watch(instance, process)
        self._listening = listen(self._address)
        loop.add_reader(self._listening.fileno(), self._accept)
        loop.add_reader(self._arena.keeper.fileno(), self._keeper_speaks)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_end)
        self._tick()
        try:
            return await self._leaving
        finally:
            await self._leave()

    def _asked_to_end(self) -> None:
        self._machine.drain(time.monotonic())
        self._carry_out()

    def _tick(self) -> None:
        asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self._machine.tick(time.monotonic())
        self._others.tick(time.monotonic())
        self._carry_out()

    def _keeper_speaks(self) -> None:
        """A keeper only speaks at the start: anything now is the end of its channel."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._arena.keeper.fileno())
        self._arena.keeper.replace()
        loop.add_reader(self._arena.keeper.fileno(), self._keeper_speaks)

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError as error:  # the other end is gone again, or descriptors have run out
            log.warning("a connection could not be accepted: %s", error)
            self._make_room(0 if error.errno in (errno.EMFILE, errno.ENFILE) else MAX_STRANGERS)
            return
        connection.setblocking(False)
        self._numbered += 1
        peer = Peer(self._numbered, connection)
        if peer.uid != os.getuid():
            log.warning("refused a connection of uid %d", peer.uid)
            connection.close()
            return
        self._make_room(MAX_STRANGERS - 1)
        self._peers[peer.number] = peer
        asyncio.get_running_loop().add_reader(connection.fileno(), self._readable, peer)

    def _make_room(self, most: int) -> None:
        """Cuts the oldest connections that are no ranks where there are more than `most`."""
        ranks = {member.peer for member in self._machine.members.values()}
        strangers = [peer for number, peer in self._peers.items() if number not in ranks]
        for peer in strangers[: len(strangers) - most] if len(strangers) > most else ():
            self._close(peer)

    def _readable(self, peer: Peer) -> None:
        try:
            received = receive(peer.connection, "to")
        except (BlockingIOError, InterruptedError):
            return
        except FormatError as error:
            log.warning("connection %d (pid %d): %s", peer.number, peer.pid, error)
            received = None
        except OSError:
            received = None
        try:
            if received is None:
                self._close(peer)
            else:
                self._handle(peer, *received)
            self._carry_out()
        except Exception:
            log.exception("connection %d (pid %d): its message could not be handled; cut", peer.number, peer.pid)
            self._close(peer)

    def _handle(self, peer: Peer, message: m.Message, descriptors: list[int]) -> None:
        now = time.monotonic()
        process, available, limit = None, 0, ""
        known, rank = True, self._machine.members.of(peer.number)
        match message:
            case m.Hello():
                process = identify(peer.pid)
            case m.Prepare():
                self._prepared[peer.number] = message
            case m.Begin():
                known = self._meets_members(peer, message, descriptors)
            case m.Meet():
                self._meet(peer)
                known = False
            case m.Invite():
                self._answer_later(peer, self._others.invite(message))
                known = False
            case m.Usher():
                self._answer_later(peer, self._usher(message, _content(descriptors)))
                known = False
            case m.Borrow():
                self._lend(peer, message)
                known = False
            case m.Pieces() if descriptors:
                self._take_pieces(peer, descriptors.pop())
            case m.Layout():
                available, limit = self._available()
            case m.Ready() if rank is not None:
                taken = not descriptors or self._take_slot(message.slot, descriptors)
                known = taken and message.slot in self._slots
            case m.Captured() if rank is not None and not self._holds(message):
                log.error("pid %d: step %d is not in slot %d", peer.pid, message.step, message.slot)
                message = m.Missed(message.grant, "failed")
            case _:
                pass
        close_all(descriptors)
        if known:
            epoch = self._machine.state.epoch
            self._machine.handle(peer.number, message, now, process=process, available_bytes=available, limit=limit)
            if self._machine.state.epoch != epoch:
                self._others.begun()
                self._take_options()
        if isinstance(message, m.Hello) and process is not None:
            self._watch(message.instance, process)

    def _take_options(self) -> None:
        """Those of the job that this process, and not the machine, goes by."""
        policy = self._machine.state.policy
        if policy is not None:
            self._trace.begin(policy.trace)
            self._stores.limit(policy.flush_bandwidth)

    def _carry_out(self) -> None:
        """Persists what was decided, then acts."""
        actions = self._machine.take()
        self._arena.ledger.write(msgspec.msgpack.encode(self._machine.state))
        for action in actions:
            self._act(action)

    def _act(self, action: Action) -> None:
        match action:
            case Send():
                self._send(action)
            case Disconnect():
                if (peer := self._peers.get(action.peer)) is not None:
                    self._close(peer)
            case Drop():
                self._arena.drop(action.slot)
            case WriteRecord():
                self._writing.record(action)
            case cluster.Write() | cluster.Commit():
                self._writing.flush(action)
            case cluster.Free():
                self._writing.freed(action)
                self._others.carry_out(action)
            case Exit():
                if not self._leaving.done():
                    self._leaving.set_result(action.reason)
            case _:
                self._others.carry_out(action)

    # --- connections

    def _send(self, action: Send) -> None:
        peer = self._peers.get(action.peer)
        if peer is None:
            return
        message = action.message
        if isinstance(message, m.Welcome):
            message = msgspec.structs.replace(message, pid=os.getpid())
        if isinstance(message, m.Promise):
            message = self._with_contact(peer, message)
        if isinstance(message, m.Report):
            message = m.Report({**message.report, **self._report()})
        held = [os.dup(held) for n in action.slots if n in self._slots for held in self._slots[n].descriptors]
        held += [held for n in action.readable if n in self._slots for held in self._readable_slot(n)]
        if isinstance(message, m.Plan):
            said = self._others.said() | self._said_here()
            held.append(_read_only(self._pieces.book(message.generation, said)))
        peer.backlog.append((message, held))
        self._drain(peer)

    def _drain(self, peer: Peer) -> None:
        """Sends what waits; the rest when the connection takes it."""
        loop = asyncio.get_running_loop()
        while peer.backlog:
            message, descriptors = peer.backlog[0]
            try:
                send(peer.connection, message, descriptors)
            except BlockingIOError:
                if len(peer.backlog) > MAX_BACKLOG:
                    log.warning("connection %d (pid %d) does not read; cut", peer.number, peer.pid)
                    break
                loop.add_writer(peer.connection.fileno(), self._drain, peer)
                return
            except (OSError, FormatError) as error:
                log.warning("connection %d (pid %d): %s", peer.number, peer.pid, error)
                break
            peer.backlog.popleft()
            close_all(descriptors)
        if peer.connection.fileno() >= 0:
            loop.remove_writer(peer.connection.fileno())
        if peer.backlog:
            loop.call_soon(self._close_and_act, peer)

    def _close_and_act(self, peer: Peer) -> None:
        """Nothing can be said to it any more; what it has said counts, above all its Leave."""
        self._hear_out(peer)
        self._close(peer)
        self._carry_out()

    def _close(self, peer: Peer) -> None:
        if self._peers.pop(peer.number, None) is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(peer.connection.fileno())
        loop.remove_writer(peer.connection.fileno())
        peer.connection.close()
        for _, descriptors in peer.backlog:
            close_all(descriptors)
        self._machine.gone(peer.number, time.monotonic())

    # --- other nodes

    def _with_contact(self, peer: Peer, message: m.Promise) -> m.Message:
        """A promise, and how others find this node; or why they cannot."""
        prepared = self._prepared.pop(peer.number, None)
        try:
            return message if prepared is None else m.Promise(message.promise, self._others.contact(prepared))
        except CkptdError as error:
            return m.Refuse(type(error).__name__, str(error)[: m.MAX_TEXT])

    def _meets_members(self, peer: Peer, message: m.Begin, descriptors: list[int]) -> bool:
        """Whether an epoch may begin here: its members are known, and this node serves them."""
        state = self._machine.state
        if message.begin.epoch != state.promised or message.begin.epoch == state.epoch:
            return True
        try:
            self._others.begin(message, _content(descriptors))
        except CkptdError as error:
            self._send(Send(peer.number, m.Refuse(type(error).__name__, str(error)[: m.MAX_TEXT])))
            return False
        return True

    async def _usher(self, message: m.Usher, raw: bytes) -> m.Message:
        await self._others.usher(message, raw)
        return m.Met()

    def _answer_later(self, peer: Peer, work: Coroutine[Any, Any, m.Message]) -> None:
        """What takes its time, or an error."""

        async def answer() -> None:
            try:
                said = await work
            except CkptdError as error:
                said = m.Refuse(type(error).__name__, str(error)[: m.MAX_TEXT])
            self._send(Send(peer.number, said))

        task = asyncio.ensure_future(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _lend(self, peer: Peer, message: m.Borrow) -> None:
        async def lend() -> None:
            try:
                slots = await self._others.lend(message)
            except CkptdError as error:
                refusal = m.Refuse(type(error).__name__, str(error)[: m.MAX_TEXT])
                self._send(Send(peer.number, refusal))
                return
            infos = [slot_info(0, slot) for slot in slots]
            descriptors = [_read_only(descriptor) for slot in slots for descriptor in slot.descriptors]
            if peer.number in self._peers:
                peer.backlog.append((m.Lent(infos), descriptors))
                self._drain(peer)
            else:
                close_all(descriptors)

        task = asyncio.ensure_future(lend())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _meet(self, peer: Peer) -> None:
        def met(error: str | None) -> None:
            answer = m.Met() if error is None else m.Refuse("ConfigError", error[: m.MAX_TEXT])
            self._send(Send(peer.number, answer))

        self._in_thread(self._others.meet, met)

    # --- processes

    def _watch(self, instance: str, process: tuple[int, int]) -> None:
        if not self._processes.add(instance, process):
            self._machine.dead(instance, time.monotonic())

    def _ended(self, instance: str) -> None:
        """What a process said before its end counts: its last Captured may lie unread behind the news of its death."""
        pid = self._machine.state.processes.get(instance, (0, 0))[0]
        for peer in [peer for peer in self._peers.values() if peer.pid == pid]:
            self._hear_out(peer)
        self._machine.dead(instance, time.monotonic())
        self._carry_out()

    def _hear_out(self, peer: Peer) -> None:
        """Reads what lies unread on a connection."""
        while peer.number in self._peers and readable([peer.connection], 0):
            self._readable(peer)

    # --- memory

    def _take_pieces(self, peer: Peer, descriptor: int) -> None:
        rank = next((r for r, x in self._machine.members.items() if x.peer == peer.number), None)
        if rank is None:
            os.close(descriptor)
        else:
            self._pieces.take(rank, descriptor)

    def _said_here(self) -> dict[int, bytes]:
        """What the ranks of this node have said of their states."""
        return self._pieces.of(self._machine.state.ranks)

    def _take_slot(self, number: int, descriptors: list[int]) -> bool:
        """Keeps a slot that a trainer made as it was told to, and then its `descriptors`; refuses any other."""
        expected = self._machine.state.table.get(number)
        try:
            slot = Slot.open(*descriptors[:2])
            if number in self._slots and os.path.sameopenfile(slot.descriptor, self._slots[number].descriptor):
                return True
            if expected is None or number in self._slots:
                raise FormatError(f"slot {number} is not expected")
            found = (slot.geometry.rank, slot.geometry.digest, slot.geometry.size, slot.frozen_bytes)
            if found != (expected.rank, expected.digest, expected.size, expected.frozen_bytes):
                raise FormatError(f"slot {number}: is {found}, should be another")
        except FormatError as error:
            log.warning("%s", error)
            return False
        self._arena.take_over(number, slot)
        del descriptors[: len(slot.descriptors)]
        return True

    def _holds(self, message: m.Captured) -> bool:
        """Whether a slot holds what a rank says it has put there: nothing is sealed on its word alone. What answers no
        grant, or another slot's, is the machine's to pass over."""
        state, slot = self._machine.state, self._slots.get(message.slot)
        epoch = state.epoch
        granted = None if epoch is None else state.table.find(epoch, message.grant)
        if epoch is None or granted is None or message.slot not in granted.slots.values():
            return True
        if slot is None:
            return False
        try:
            return slot.state().snapshot == SnapshotId(epoch, message.step)
        except FormatError:
            return False

    def _available(self) -> Headroom:
        """Bytes that new slots may take: the machine's and the cgroups' headroom, and what the job allowed itself."""
        room, policy = headroom(), self._machine.state.policy
        room = room._replace(available=room.available + self._arena.parity_bytes)  # they are counted with what is made
        if policy is not None and policy.memory_bytes is not None:
            left = policy.memory_bytes - memory_bytes(self._machine.state.table.slots)
            room = min(room, Headroom(left, f"the job's option memory={policy.memory_bytes}"))
        return Headroom(max(0, room.available), room.limit)

    def _readable_slot(self, number: int) -> list[int]:
        """Read-only descriptors of a slot that describes itself, and of its frozen region."""
        slot = self._slots[number]
        if slot.mend():
            log.error("slot %d: its geometry was damaged and is written anew", number)
        return [_read_only(descriptor) for descriptor in slot.descriptors]

    # --- threads

    def _in_thread(
        self, work: Callable[[], Any], done: Callable[[str | None], None], threads: Executor | None = None
    ) -> None:
        """`done` hears of the error, if there is one. `threads`: others than those of all work."""

        async def run() -> None:
            error = None
            try:
                await asyncio.get_running_loop().run_in_executor(threads, work)
            except CkptdError as caught:
                error = str(caught)
            except Exception as caught:
                log.exception("work failed")
                error = f"{type(caught).__name__}: {caught}"
            done(error)
            self._carry_out()

        task = asyncio.ensure_future(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the end

    def _report(self) -> dict[str, Any]:
        progress = self._stores.progress
        return {
            "digest": self._address.job.digest,
            "node": node_name(),
            "pid": os.getpid(),
            "parity_bytes": self._arena.parity_bytes,
            **self._others.report(),
            "flush": None if progress is None else progress.report(),
        }

    async def _leave(self) -> None:
        """Frees everything: connections, memory, keeper, files. Who comes from now on waits for the next daemon, which
        waits for the lock that this process holds to its end."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listening.fileno())
        self._listening.close()
        self._stores.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LEAVE_S)
        await self._others.leave()
        self._trace.close()
        loop.remove_reader(self._arena.keeper.fileno())
        self._address.remove()
        self._arena.keeper.leave()
        for peer in list(self._peers.values()):
            await self._last_words(peer)
            self._close(peer)

    async def _last_words(self, peer: Peer) -> None:
        for _ in range(100):
            if not peer.backlog or peer.number not in self._peers:
                return
            await asyncio.sleep(0.01)


def run(job: str, keeper: int | None = None) -> int:
    """The daemon of `job` on this node, until the job closes; returns the exit status. `keeper`: its channel."""
    to_stderr("ckptd-daemon")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    address = address_of(Job(job))
    lock = take_over(address, keeper is not None, LEAVE_S + TAKE_S)
    if lock is None:
        log.error("another daemon serves job %r on this node (%s)", job, address.directory)
        if keeper is not None:
            with contextlib.suppress(OSError):
                socket.socket(fileno=keeper).send(b"X")
        return 1
    asyncio.run(_serve(Daemon(address, keeper)))
    return 0


async def _serve(daemon: Daemon) -> None:
    """Threads that hang, above all in calls to other nodes, do not keep a process that has freed everything."""
    log.info("leaving: %s", await daemon.serve())
    timer = threading.Timer(LEAVE_S, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _content(descriptors: list[int]) -> bytes:
    """Of the memory that came beside a message; nothing if none did."""
    return b"" if not descriptors else os.pread(descriptors[0], os.fstat(descriptors[0]).st_size, 0)


def _read_only(descriptor: int) -> int:
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
