"""Nodes for the tests of peers: daemons' servers in this process, and one in a process that may be killed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from ckptd.core.native import crc32c
from ckptd.core.types import Epoch, Job, SnapshotId
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.tiers.peers import Announcement, Credentials, Identity, Listener, MemorySource, Peer, PeerServer, Sources

JOB = Job("tests of peers")
EPOCH = Epoch(7, "0123456789abcdef")
SNAPSHOT = SnapshotId(Epoch(6, "fedcba9876543210"), 40)
TOKEN = bytes(range(32))
WAIT_S = 20.0
"""For what comes in milliseconds; reached only when a test fails."""


def credentials(node: str, *, tls: bool = True, **other: Any) -> Credentials:
    identity = Identity.ephemeral(node, EPOCH) if tls else None
    return dataclasses.replace(Credentials(JOB, EPOCH, node, TOKEN, identity), **other)


def random_bytes(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


class Scripted:
    """A source whose reads the test watches and bends. `wrong` says how often a read gives a wrong checksum."""

    def __init__(self, data: np.ndarray, *, wrong: int = 0, hold_at: int | None = None) -> None:
        self.size = len(data)
        self.data, self.wrong, self.hold_at = data, wrong, hold_at
        self.reads: list[tuple[int, int]] = []
        self.held, self.go_on = threading.Event(), threading.Event()
        self.closed = False
        self.running = self.most_running = 0
        self._lock = threading.Lock()

    def read(self, offset: int, into: memoryview) -> int:
        with self._lock:
            self.reads.append((offset, len(into)))
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        if self.hold_at is not None and offset >= self.hold_at:
            self.held.set()
            self.go_on.wait(WAIT_S)
        into[:] = self.data[offset : offset + len(into)].data
        with self._lock:
            self.running -= 1
            if self.wrong:
                self.wrong -= 1
                return crc32c(into) ^ 1
        return crc32c(into)

    def close(self) -> None:
        self.closed = True


class Node:
    """A node that serves in this process; members are itself and the given ones."""

    def __init__(self, name: str, others: Sequence[Credentials] = (), *, tls: bool = True, **options: Any) -> None:
        self.credentials = credentials(name, tls=tls, **options.pop("credentials", {}))
        host = options.pop("host", "127.0.0.1")
        listener = Listener.reserve(host)
        self.announcement = self.credentials.announce(host, listener.port)
        self.sources = Sources()
        members = [self.announcement, *(other.announce(host, 1) for other in others)]
        self.server = PeerServer(self.credentials, listener, members, self.sources, **options)

    def give(self, data: np.ndarray, what: str = "string") -> None:
        self.sources.register(SNAPSHOT, what, MemorySource(data.data))

    def __enter__(self) -> Node:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.server.close()
        self.sources.close()


@contextlib.contextmanager
def pair(*, tls: bool = True, peer: dict[str, Any] | None = None, **options: Any) -> Iterator[tuple[Node, Peer]]:
    """A serving node, and its peer `here` that asks it."""
    here = credentials("here", tls=tls)
    with Node("there", [here], tls=tls, **options) as node:
        client = Peer(here, node.announcement, **({"deadline_s": WAIT_S} | (peer or {})))
        try:
            yield node, client
        finally:
            client.close()


def in_thread(call: Callable[[], object]) -> Callable[[], BaseException | None]:
    """Runs it beside the test; what is returned waits for its end and gives the error."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def end() -> BaseException | None:
        thread.join(WAIT_S)
        assert outcome, "the call did not end"
        return outcome[0]

    return end


class Child:
    """A node `child` in a process of its own, serving random bytes as `string`; holds reads from `hold_at` on."""

    def __init__(self, here: Credentials, size: int, hold_at: int | None = None) -> None:
        words = [sys.executable, "-m", "tests.peers.nodes", str(size), str(-1 if hold_at is None else hold_at)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.announcement = msgspec.json.decode(self._line(), type=Announcement)
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(here.announce("127.0.0.1", 1)) + b"\n")
        self.process.stdin.flush()
        assert self._line() == b"serving\n"

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the child has died"
        return line

    def wait_held(self) -> None:
        """Until a read is held."""
        assert self._line() == b"held\n"

    def leave(self) -> str:
        """Lets it close its server and end; whether all calls had ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        found = self._line().decode().strip()
        assert self.process.wait(WAIT_S) == 0
        return found

    def stop(self) -> None:
        """SIGSTOP, and until it stands."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def main(size: int, hold_at: int) -> None:
    """The child's side."""
    own = credentials("child")
    listener = Listener.reserve("127.0.0.1")
    announcement = own.announce("127.0.0.1", listener.port)
    print(msgspec.json.encode(announcement).decode(), flush=True)
    other = msgspec.json.decode(sys.stdin.readline(), type=Announcement)
    source = Scripted(random_bytes(size), hold_at=None if hold_at < 0 else hold_at)
    sources = Sources()
    sources.register(SNAPSHOT, "string", source)
    server = PeerServer(own, listener, [announcement, other], sources)
    print("serving", flush=True)
    if hold_at >= 0:
        source.held.wait()
        print("held", flush=True)
    sys.stdin.read()
    print("closed" if server.close(0.3) else "left", flush=True)


PIECES = 3
SIZE = PIECES * PIECE_BYTES + 12345

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
