"""Packets with descriptors over SOCK_SEQPACKET: one message a packet (protocol/messages.py)."""

from __future__ import annotations

import math
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any, Literal

from ckptd.core.errors import DaemonError, DeadlineError, FormatError
from ckptd.protocol.messages import MAX_PACKET, Message, decode, encode

MAX_DESCRIPTORS = 250
"""The kernel passes at most 253 at a time."""


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """One packet. Raises OSError as the socket does."""
    packet = encode(message)
    if len(descriptors) > MAX_DESCRIPTORS:
        raise FormatError(f"{type(message).__name__}: {len(descriptors)} descriptors; at most {MAX_DESCRIPTORS}")
    if descriptors:
        socket.send_fds(connection, [packet], descriptors)
    else:
        connection.send(packet)


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
        return decode(packet, direction), list(descriptors)
    except FormatError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _receive(connection: socket.socket) -> tuple[bytes, list[int], int, Any]:
    return socket.recv_fds(connection, MAX_PACKET, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)


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
