"""The daemon's place among those of the job's other nodes: who it is in an epoch, whom it trusts, and what they say.

Owns the identity of this node in an epoch, the server that others pull from, the connections to them, and the messages
under way. What crosses the network, and how it is secured, is tiers/peers; what is said is decided in protocol/cluster.
What a later daemon needs to go on is in memory that the keeper holds: keys never touch a disk.

Invariants: a message that cannot be delivered is dropped, since everything is said again; to one node one message is
under way at a time, and of facts and decisions only the newest wait. A node to which messages have failed for a while
is not reached, until one arrives.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from ckptd.core.errors import CkptdError, ConfigError, DaemonError, DeadlineError, FormatError
from ckptd.core.types import Epoch, Job, SnapshotId
from ckptd.daemon.priority import PROTECTING, giving_way
from ckptd.protocol.cluster import messages as cluster
from ckptd.tiers.arena import Ledger
from ckptd.tiers.peers import (
    Announcement,
    Credentials,
    Identity,
    Listener,
    MemorySource,
    Peer,
    Peers,
    PeerServer,
    Sources,
    Throttle,
    check_reachable,
)
from ckptd.tiers.peers.address import split_address

log = logging.getLogger("ckptd.daemon")

MESSAGE_S = 5.0
"""How long a message may take; what is lost is said again."""

MEET_S = 20.0
"""How long another node may take to answer for the first time."""

MEET_AGAIN_S = 0.2

PULL_S = 30.0
"""How long each request of a pull may take."""

GREET_S = 5.0
"""A node that there was nothing to say to for so long is greeted, so that it is known whether it can be reached."""

AWAY_S = 3.0
"""How long messages to a node must have failed before it counts as not reached: nodes do not begin at one moment."""

SERVER_S = 1.0
"""How long calls of the others may take to end with the server."""

THREADS = 8
STREAMS = 2
"""Of each pull from one node: two were measured to fill a loopback connection."""

Question = Callable[[str, bytes], bytes]
"""kind, body -> answer to another node. Called on the loop's thread; raises CkptdError."""


class Directory(msgspec.Struct, frozen=True):
    """What rank 0 tells every node's daemon of an epoch, beside Begin: the secret of all who take part, and where each
    is to be found, members in the order of their numbers, then guests."""

    token: bytes
    members: list[Announcement]


class _Kept(msgspec.Struct, frozen=True):
    """What outlives the daemon."""

    epoch: Epoch
    name: str
    certificate: bytes
    key: bytes
    authority: bytes | None
    host: str
    port: int
    directory: Directory | None = None


class Network:
    """See the module docstring. Methods are called on the loop's thread, unless said otherwise."""

    def __init__(self, job: Job, node: str, ledger: Ledger, answer: Question, lost: Callable[[], None]) -> None:
        """`lost`: a node is not reached any more."""
        self.sources = Sources()
        self.throttle = Throttle()
        self._job, self._node, self._ledger, self._answer, self._lost = job, node, ledger, answer, lost
        self._kept: _Kept | None = None
        self._directory: Directory | None = None
        """Of the epoch that has begun; what is kept may be of the next one."""
        self._listener: Listener | None = None
        self._serving_end: threading.Thread | None = None
        self._server: PeerServer | None = None
        self._offered: dict[str, tuple[SnapshotId, bytes]] = {}
        self._peers: dict[str, Peer] = {}
        self._outboxes: dict[str, _Outbox] = {}
        self._pulling = Peers({})
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="peers")
        self._loop = asyncio.get_running_loop()

    # --- epochs

    def prepare(self, epoch: Epoch, address: str, tls_directory: str) -> Announcement:
        """Who this node will be in an epoch, listening at `address`. Raises ConfigError."""
        if self._kept is None or self._kept.epoch != epoch:
            identity = Identity.load(Path(tls_directory)) if tls_directory else Identity.ephemeral(self._node, epoch)
            self._reserve(epoch, identity, *split_address(address))
        return self._announcement()

    def prepare_again(self, epoch: Epoch) -> Announcement:
        """The same for a node that has been a member before: at the address that it had. Raises ConfigError."""
        kept = self._kept
        if kept is None:
            raise ConfigError(f"node {self._node!r} has no other nodes that might know it")
        if kept.epoch != epoch:
            own = kept.authority is not None
            identity = self._credentials().identity if own else Identity.ephemeral(self._node, epoch)
            assert identity is not None
            self._reserve(epoch, identity, kept.host, 0)
        return self._announcement()

    def _reserve(self, epoch: Epoch, identity: Identity, host: str, port: int) -> None:
        if self._listener is not None:
            self._listener.release()
        self._listener = Listener.reserve(host, port)
        secrets = identity.name, identity.certificate, identity.key, identity.authority
        self._keep(_Kept(epoch, *secrets, host, self._listener.port))

    def begin(self, epoch: Epoch, directory: Directory, throttle: Throttle) -> None:
        """Serves the members of an epoch that was prepared. Raises ConfigError."""
        kept = self._kept
        if kept is None or kept.epoch != epoch:
            raise ConfigError(f"epoch {epoch} begins on node {self._node!r}, which has not announced itself for it")
        if self._server is not None and kept.directory == directory:
            return
        check_reachable(directory.members)
        self._keep(msgspec.structs.replace(kept, directory=directory))
        self.throttle = throttle
        self._serve()

    def leave(self) -> None:
        """There are no others any more."""
        self._close_connections()
        self._kept = self._directory = None

    def resume(self, epoch: Epoch, throttle: Throttle) -> None:
        """Goes on where the daemon before has left; ConfigError where its port is taken."""
        raw = self._ledger.read()
        if raw is None:
            return
        try:
            self._kept = msgspec.msgpack.decode(raw, type=_Kept)
        except msgspec.MsgspecError as error:
            log.error("who this node was among others cannot be read: %s", error)
            return
        if self._kept.directory is not None and self._kept.epoch == epoch:
            self.throttle = throttle
            self._serve()

    def _serve(self) -> None:
        kept = self._kept
        assert kept is not None
        assert kept.directory is not None
        self._close_connections()
        self._directory = kept.directory
        if self._listener is None or self._listener.port != kept.port:
            self._listener = Listener.reserve(kept.host, kept.port)
        credentials = self._credentials()
        self.sources = Sources()
        given = credentials, self._listener, kept.directory.members, self.sources, self._answered
        self._server, self._listener = giving_way(PROTECTING, lambda: PeerServer(*given)), None
        others = [member for member in kept.directory.members if member.node != self._node]
        self._peers = {
            member.node: Peer(credentials, member, throttle=self.throttle, streams=STREAMS, deadline_s=PULL_S)
            for member in others
        }
        self._pulling = Peers(self._peers, streams=THREADS)

    def _credentials(self) -> Credentials:
        kept = self._kept
        assert kept is not None
        token = b"\0" * 32 if kept.directory is None else kept.directory.token
        identity = Identity(kept.name, kept.certificate, kept.key, kept.authority)
        return Credentials(self._job, kept.epoch, self._node, token, identity)

    def _announcement(self) -> Announcement:
        kept = self._kept
        assert kept is not None
        return self._credentials().announce(kept.host, kept.port)

    def _keep(self, kept: _Kept) -> None:
        self._kept = kept
        self._ledger.write(msgspec.msgpack.encode(kept))

    # --- members

    @property
    def own(self) -> str:
        """The name of this node."""
        return self._node

    @property
    def names(self) -> list[str]:
        """Nodes of the members, in the order of their numbers, and of the guests; in a job on one node, that."""
        return [self._node] if self._directory is None else [member.node for member in self._directory.members]

    @property
    def peers(self) -> Peers:
        """To pull from; in threads."""
        return self._pulling

    def ask(self, node: str, kind: str, body: bytes, deadline_s: float = MESSAGE_S) -> bytes:
        """Another node's answer; in threads."""
        return self.peers[node].ask(kind, body, deadline_s)

    def meet(self, nodes: Sequence[str]) -> None:
        """Raises the error of the first of some nodes that cannot be talked to; in threads."""
        failures: dict[str, CkptdError] = {}

        def one(node: str) -> None:
            until = time.monotonic() + MEET_S
            while True:
                try:
                    self.ask(node, "meet", b"", MEET_S)
                    return
                except DaemonError as error:  # a connection that failed while that node began is not made anew at once
                    failures[node] = error
                except CkptdError as error:
                    failures[node] = error
                    return
                if time.monotonic() >= until:
                    return
                time.sleep(MEET_AGAIN_S)
                del failures[node]

        threads = [threading.Thread(target=one, args=(node,), daemon=True) for node in nodes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            node, error = min(failures.items())
            kind = type(error) if isinstance(error, ConfigError) else ConfigError
            raise kind(f"node {self._node!r} cannot work with node {node!r}: {error}") from error

    def tell(self, node: str, key: str, message: cluster.BetweenDaemons) -> None:
        """Sends a message when the ones before have arrived; one that waits under the same `key` gives way to it."""
        if node in self._peers:
            outbox = self._outboxes.setdefault(node, _Outbox(self._loop.time()))
            outbox.waiting[key] = "tell", cluster.encode(message)
            self._push(node, outbox)

    def greet(self, nodes: Sequence[str]) -> None:
        """Sees whether some nodes can be reached, where there was nothing to say to them for a while, or the last
        message failed."""
        for node in nodes:
            outbox = self._outboxes.setdefault(node, _Outbox(self._loop.time()))
            quiet = self._loop.time() - outbox.ended_s >= GREET_S
            if not outbox.busy and (quiet or outbox.failing_s is not None):
                outbox.waiting["meet"] = "meet", b""
                self._push(node, outbox)

    def unreached(self) -> list[dict[str, Any]]:
        """The nodes that are not reached: since how many seconds, and why."""
        now = self._loop.time()
        return [
            {"node": node, "for_s": now - box.failing_s, "why": box.why}
            for node, box in sorted(self._outboxes.items())
            if box.lost and box.failing_s is not None
        ]

    def _push(self, node: str, outbox: _Outbox) -> None:
        if outbox.busy or not outbox.waiting:
            return
        kind, body = outbox.waiting.pop(next(iter(outbox.waiting)))
        outbox.busy = True

        def sent(future: asyncio.Future[bytes]) -> None:
            outbox.busy = False
            if self._outboxes.get(node) is outbox and not future.cancelled():
                self._sent(node, outbox, future.exception())
                self._push(node, outbox)

        self._loop.run_in_executor(self._threads, self._peers[node].ask, kind, body, MESSAGE_S).add_done_callback(sent)

    def _sent(self, node: str, outbox: _Outbox, error: BaseException | None) -> None:
        """Keeps how a message has ended."""
        now, lost = self._loop.time(), outbox.lost
        outbox.ended_s = now
        if error is None:
            outbox.failing_s, outbox.lost = None, False
        else:
            first = outbox.failing_s is None
            outbox.failing_s, outbox.why = now if outbox.failing_s is None else outbox.failing_s, str(error)
            outbox.lost = not first and now - outbox.failing_s >= AWAY_S
        if outbox.lost and not lost:
            log.warning("node %s is not reached: %s", node, error)
            self._lost()
        elif lost and not outbox.lost:
            log.info("node %s is reached again", node)

    def offer(self, snapshot: SnapshotId, what: str, content: bytes) -> int:
        """Others may pull it, in the place of what was offered as the same before; its size. Who asks for what is
        offered already does not disturb those that pull it."""
        old = self._offered.get(what)
        if old != (snapshot, content):
            if old is not None:
                self.sources.withdraw(old[0], what)
            self.sources.register(snapshot, what, MemorySource(content))
            self._offered[what] = snapshot, content
        return len(content)

    # --- what others ask, on threads of the server

    def _answered(self, node: str, kind: str, body: bytes) -> bytes:
        if kind == "meet":
            return b""
        answer: asyncio.Future[bytes] = asyncio.run_coroutine_threadsafe(  # type: ignore[assignment]
            self._on_loop(kind, body), self._loop
        )
        try:
            return answer.result(MESSAGE_S)  # type: ignore[call-arg]
        except TimeoutError:
            raise DeadlineError(f"node {self._node!r} is too busy to answer {kind}") from None

    async def _on_loop(self, kind: str, body: bytes) -> bytes:
        return self._answer(kind, body)

    # --- the end

    async def finish(self, timeout_s: float) -> None:
        """Waits until everything has been said, though not for long."""
        until = self._loop.time() + timeout_s
        while self._loop.time() < until and any(box.busy or box.waiting for box in self._outboxes.values()):
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Ends serving. Blocks for a while where others do not let go."""
        self._close_connections()
        if self._serving_end is not None:
            self._serving_end.join(SERVER_S)
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._listener is not None:
            self._listener.release()

    def _close_connections(self) -> None:
        self._outboxes.clear()
        for peer in self._peers.values():
            peer.close()
        self._pulling.close()
        self._peers, self._pulling = {}, Peers({})
        if self._server is not None:
            server, self._server = self._server, None
            self._serving_end = threading.Thread(target=server.close, args=(SERVER_S,), daemon=True)
            self._serving_end.start()  # calls that are answered may go on; nobody waits for those that hang
        self.sources.close()
        self._offered.clear()


class _Outbox:
    """What is to be said to one node: key -> kind, body; and how the last message ended. `failing_s`: when the first of
    those in a row that failed did, `why` the last did."""

    def __init__(self, now_s: float) -> None:
        self.waiting: dict[str, tuple[str, bytes]] = {}
        self.busy = self.lost = False
        self.ended_s = now_s
        self.failing_s: float | None = None
        self.why = ""


def decode_directory(raw: bytes) -> Directory:
    """Raises FormatError."""
    try:
        found = msgspec.msgpack.decode(raw, type=Directory)
    except (msgspec.MsgspecError, ValueError) as error:
        raise FormatError(f"directory of members: {error}") from None
    for member in found.members:
        member.check()
    return found


def key_of(message: cluster.BetweenDaemons) -> str:
    """Messages of one key: only the newest of them counts."""
    match message:
        case cluster.SealRecord(snapshot=snapshot) | cluster.Recorded(snapshot=snapshot):
            return f"{type(message).__name__} {snapshot.epoch} {snapshot.step}"
        case _:
            return type(message).__name__
