"""A rank's session with its daemon: one thread that sends, receives, and comes back after a lost connection.

The training thread never touches the socket: it puts messages into a queue. After a reconnection both sides repeat
what they last said (docs/protocol.md), so a killed daemon costs at most the snapshot in flight.
"""

from __future__ import annotations

import collections
import logging
import os
import socket
import threading
import time
from typing import Protocol

import msgspec

from ckptd.core.errors import CkptdError, FormatError
from ckptd.daemon.address import Address
from ckptd.daemon.launch import reach
from ckptd.daemon.wire import readable, receive, send
from ckptd.protocol import messages as m

log = logging.getLogger("ckptd.session")

PATIENCE_S = 5.0
"""How long to wait for a killed daemon to be started again by its keeper before starting one."""

RETRY_S = 1.0


class Handler(Protocol):
    """The trainer's side of the conversation; called on the session's thread."""

    def received(self, message: m.Message, descriptors: list[int]) -> None:
        """A message came; the descriptors are the handler's to close."""

    def repeat(self) -> list[m.Message]:
        """What to say again after a reconnection (after Hello)."""

    @property
    def granted(self) -> int:
        """The newest grant heard of."""


class Session:
    """See the module docstring. Thread-safe."""

    def __init__(self, address: Address, connection: socket.socket, hello: m.Hello, handler: Handler) -> None:
        """`hello` was said on `connection` and welcomed; it is said again on later connections."""
        self._address = address
        self._connection = connection
        self._hello = hello
        self._handler = handler
        self._queue: collections.deque[tuple[m.Message, list[int]]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waking = threading.Lock()
        self._ended = False
        self.lost = 0
        self._thread = threading.Thread(target=self._run, name="ckptd-session", daemon=True)
        self._thread.start()

    def say(self, message: m.Message, descriptors: list[int] | None = None) -> None:
        """Queues a message; `descriptors` are closed once sent."""
        self._queue.append((message, descriptors or []))
        self._poke()

    def end(self, timeout_s: float = 5.0) -> None:
        """Sends what is queued and closes the connection."""
        self._ended = True
        self._poke()
        self._thread.join(timeout_s)

    def _poke(self) -> None:
        """Wakes the thread; once that has ended, nobody sends what is queued."""
        with self._waking:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
            else:
                self._forget()

    def _run(self) -> None:
        while True:
            try:
                self._converse()
            except (OSError, FormatError) as error:
                log.debug("connection lost: %s", error)
            self._connection.close()
            if self._ended:
                break
            self.lost += 1
            self._come_back()
            if self._connection.fileno() < 0:
                break  # the session ended before it found a daemon
        with self._waking:
            os.close(self._wake)
            self._wake = -1
            self._forget()

    def _converse(self) -> None:
        """Until the connection is lost (returns or raises) or the session has ended and all is sent."""
        while True:
            ready = readable([self._connection, self._wake], None)
            ended = False
            if self._wake in ready:
                os.eventfd_read(self._wake)
                ended = self._ended  # between the two: no wake is missed, and what was said before the end is sent
                while self._queue:
                    message, descriptors = self._queue[0]
                    send(self._connection, message, descriptors)
                    self._queue.popleft()
                    for descriptor in descriptors:
                        os.close(descriptor)
            if ended:
                return
            if self._connection.fileno() in ready:
                received = receive(self._connection, "from")
                if received is None:
                    return
                self._handle(*received)

    def _handle(self, message: m.Message, descriptors: list[int]) -> None:
        if isinstance(message, m.Closed):
            self._ended = True  # the daemon leaves: the end of its connection is no reason to start another
        try:
            self._handler.received(message, descriptors)
        except Exception:
            log.exception("%s could not be handled", type(message).__name__)

    def _come_back(self) -> None:
        while not self._ended:
            try:
                self._connection = reach(self._address, patience_s=PATIENCE_S, given_up=lambda: self._ended)
                send(self._connection, msgspec.structs.replace(self._hello, granted=self._handler.granted))
                break
            except (CkptdError, OSError) as error:
                if not self._ended:
                    log.warning("no daemon: %s", error)
                    time.sleep(RETRY_S)
        self._forget()  # before repeating: what is said from now on comes after Hello, and at worst twice
        for message in self._handler.repeat():
            self.say(message)

    def _forget(self) -> None:
        """Drops what is queued."""
        while self._queue:
            _, descriptors = self._queue.popleft()
            for descriptor in descriptors:
                os.close(descriptor)
