"""Packets between processes: what was said before the end arrives."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from ckptd.core.errors import FormatError
from ckptd.core.types import Epoch, Job
from ckptd.daemon import wire
from ckptd.daemon.address import address_of
from ckptd.daemon.session import Session
from ckptd.protocol import messages as m

HELLO = m.Hello(
    m.PROTOCOL,
    "job",
    Epoch(1, "0" * 16),
    0,
    1,
    [0],
    "p",
    None,
    m.Policy(
        store=None,
        snapshot_steps=1,
        flush_steps=None,
        flush_s=None,
        keep=None,
        overhead_budget=0.01,
        memory_bytes=None,
        linger_s=1.0,
    ),
)


class Deaf:
    """A handler that has nothing to say of itself."""

    def received(self, message: m.Message, descriptors: list[int]) -> None:
        pass

    def repeat(self) -> list[m.Message]:
        return []

    @property
    def granted(self) -> int:
        return 0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_last_words_of_one_who_does_not_listen(pair: tuple[socket.socket, socket.socket]) -> None:
    """It closes with something unread: the kernel reports that first, and what it had said is there all the same."""
    ours, theirs = pair
    wire.send(ours, m.Survey(1))
    wire.send(theirs, m.Boundary(7, 1.0))
    wire.send(theirs, m.Leave())
    theirs.close()
    assert wire.receive(ours, "to") == (m.Boundary(7, 1.0), [])
    assert wire.receive(ours, "to") == (m.Leave(), [])
    assert wire.receive(ours, "to") is None


def test_a_session_says_its_last_word() -> None:
    """However its thread is woken meanwhile."""
    for _ in range(200):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        session = Session(address_of(Job("job")), theirs, HELLO, Deaf())
        speaker = threading.Thread(target=lambda speak=session.say: [speak(m.Boundary(n, 1.0)) for n in range(20)])
        speaker.start()
        session.say(m.Leave())
        session.end()
        speaker.join()
        said = []
        with ours:
            while (received := wire.receive(ours, "to")) is not None:
                said.append(received[0])
        assert m.Leave() in said


def open_descriptors() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("beside", [0, 1, wire.MAX_DESCRIPTORS])
def test_a_message_too_long_for_a_packet(pair: tuple[socket.socket, socket.socket], beside: int) -> None:
    """It arrives like any other, with what is beside it; how a job of ten thousand nodes begins is such a one."""
    ours, theirs = pair
    long = m.Invite(Epoch(1, "0" * 16), [f"{number:032x}" for number in range(10_000)], [])
    assert len(m.encode(long)) > wire.MAX_PACKET
    before = open_descriptors()
    reading, writing = os.pipe()
    wire.send(theirs, long, [writing] * beside)
    os.close(writing)
    message, descriptors = wire.receive(ours, "to") or (None, [])
    assert message == long
    assert len(descriptors) == beside
    for descriptor in descriptors:
        assert os.write(descriptor, b"x") == 1
        os.close(descriptor)
    assert os.read(reading, 1000) == b"x" * beside
    os.close(reading)
    assert open_descriptors() == before


def test_long_messages_that_are_none(pair: tuple[socket.socket, socket.socket]) -> None:
    """No memory, memory without end, memory that is none, garbage in it: refused, and all descriptors are closed."""
    ours, theirs = pair
    before = open_descriptors()
    reading, writing = os.pipe()
    with wire.in_memory(b"") as empty, wire.in_memory(b"\x93" * 1000) as garbage, wire.in_memory(b"") as endless:
        os.truncate(endless, 2**40)
        for beside in ([], [reading], [empty, writing], [garbage], [endless]):
            socket.send_fds(theirs, [wire.LONG], beside)
            with pytest.raises(FormatError):
                wire.receive(ours, "to")
    os.close(reading)
    os.close(writing)
    assert open_descriptors() == before
