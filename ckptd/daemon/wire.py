"""Packets with descriptors over SOCK_SEQPACKET: one message a packet (protocol/messages.py).

A message that is too long for a packet lies in memory whose descriptor is the first beside; the packet is LONG then.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ckptd.core.errors import DaemonError, DeadlineError, FormatError
from ckptd.protocol.messages import MAX_MESSAGE, Message, decode, encode

MAX_PACKET = 128 * 1024
LONG = b"\xc1"
"""No message begins with this byte."""

MAX_DESCRIPTORS = 250
"""The kernel passes at most 253 at a time; one is for a long message."""


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """One packet. Raises OSError as the socket does, FormatError for what is too long."""
    encoded = encode(message)
    if len(descriptors) > MAX_DESCRIPTORS:
        raise FormatError(f"{type(message).__name__}: {len(descriptors)} descriptors; at most {MAX_DESCRIPTORS}")
    if len(encoded) > MAX_PACKET:
        with in_memory(encoded) as descriptor:
            socket.send_fds(connection, [LONG], [descriptor, *descriptors])
    elif descriptors:
        socket.send_fds(connection, [encoded], descriptors)
    else:
        connection.send(encoded)


@contextlib.contextmanager
def in_memory(content: bytes) -> Iterator[int]:
    """The descriptor of memory with `content`, to send beside a message."""
    descriptor = os.memfd_create("ckptd-message", os.MFD_CLOEXEC)
    try:
        with memoryview(content) as rest:
            done = 0
            while done < len(rest):
                done += os.write(descriptor, rest[done:])
        yield descriptor
    finally:
        os.close(descriptor)


def receive(connection: socket.socket, direction: Literal["to", "from"]) -> tuple[Any, list[int]] | None:
    """The next message and its descriptors, None at the end. Raises FormatError (the descriptors are closed)."""
    try:
        packet, descriptors, flags, _ = _receive(connection)
    except ConnectionResetError:
        # The other end closed before it had read everything. The kernel says so once, ahead of what it had sent.
        packet, descriptors, flags, _ = _receive(connection)
    if not packet:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise FormatError(f"message truncated at {MAX_PACKET} bytes")
        if packet == LONG:
            packet = _long(descriptors)
        return decode(packet, direction), list(descriptors)
    except FormatError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _receive(connection: socket.socket) -> tuple[bytes, list[int], int, Any]:
    return socket.recv_fds(connection, MAX_PACKET, MAX_DESCRIPTORS + 1, socket.MSG_CMSG_CLOEXEC)


def _long(descriptors: list[int]) -> bytes:
    """The message that lies in the first of these, which is closed and taken out."""
    if not descriptors:
        raise FormatError("a long message without the memory that it lies in")
    descriptor = descriptors.pop(0)
    try:
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, min(size, MAX_MESSAGE + 1), 0)
    except OSError as error:
        raise FormatError(f"a long message that cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def readable(files: Sequence[socket.socket | int], timeout_s: float | None) -> list[int]:
    """Descriptors that can be read, or whose other end is gone. select() would fail from descriptor 1024 on."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    milliseconds = None if timeout_s is None else max(0, math.ceil(1000 * timeout_s))
    return [descriptor for descriptor, _ in poll.poll(milliseconds)]


def ask(
    connection: socket.socket, message: Message, deadline_s: float, descriptors: Sequence[int] = ()
) -> tuple[Any, list[int]]:
    """Sends a request and waits for the answer. Raises DeadlineError, DaemonError when the daemon goes away."""
    until = time.monotonic() + deadline_s
    name = type(message).__name__
    try:
        send(connection, message, descriptors)
        if not readable([connection], until - time.monotonic()):
            raise DeadlineError(f"the daemon did not answer {name} within {deadline_s:.0f} s")
        answer = receive(connection, "from")
    except OSError as error:
        if isinstance(error, DeadlineError):
            raise
        raise DaemonError(f"the daemon went away during {name}: {error.strerror}") from None
    if answer is None:
        raise DaemonError(f"the daemon closed the connection at {name}")
    return answer
