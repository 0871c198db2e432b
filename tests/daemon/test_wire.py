"""Packets between processes: what was said before the end arrives."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

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
