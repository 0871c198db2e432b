"""One node of `benchmarks.protection`: a process that does one thing at a time when it is told to.

There are two kinds: `PlainNode` has bytes in memory and gives them by TCP and by plain Arrow Flight; `OurNode` has a
snapshot in a slot, and a server and a Protector. Both do everything with TLS and without, and pull from the others of
their kind what they are told. They are apart so that what our code changes of its process (malloc) helps no others.
"""

from __future__ import annotations

import mmap
import os
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow.flight as flight

from benchmarks.peers_transfer import EPOCH, HOST, SNAPSHOT, PlainServer, without_tls
from ckptd.core.catalog import Catalog
from ckptd.core.native import crc32c
from ckptd.core.types import Job
from ckptd.plan.stripe import PIECE_BYTES, Group
from ckptd.tiers.arena import Slot, layout
from ckptd.tiers.peers import Announcement, Credentials, Identity, Listener, Peer, Peers, PeerServer, Sources, Throttle
from ckptd.tiers.protection import Holders, ParityArea, Protector, SealedGroup, SealRecord
from ckptd.tiers.protection.work import ROW_BYTES

CHUNK_BYTES = 16 * 2**20
ROOM_BYTES = 2**20
"""A slot is that much larger at most than what is in it."""

_LENGTH = struct.Struct("<Q")

Pulls = list[tuple[int, int]]
"""(node, bytes) of each stream."""


class PlainNode:
    """TCP and plain Flight; see the module docstring."""

    def __init__(self, number: int, size: int, token: bytes) -> None:
        self.number = number
        self.data = np.random.default_rng(number).integers(0, 256, size + ROOM_BYTES, np.uint8)
        identity = Identity.ephemeral(f"n{number}", EPOCH)
        security = {"tls_certificates": [(identity.certificate, identity.key)]}
        self.servers = [
            PlainServer(f"grpc://{HOST}:0", self.data),
            PlainServer(f"grpc+tls://{HOST}:0", self.data, **security),
        ]
        with tempfile.NamedTemporaryFile() as pair:
            pair.write(identity.certificate + identity.key)
            pair.flush()
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(pair.name)
        announced = Credentials(Job("benchmark"), EPOCH, f"n{number}", token, identity).announce(HOST, 1)
        tcp = [serve_tcp(self.data, None), serve_tcp(self.data, context)]
        self.announced = tcp, [server.port for server in self.servers], announced

    def join(self, everyone: list[tuple[list[int], list[int], Announcement]], group: Group) -> None:
        """Connects to all others."""
        self.targets = [np.zeros(ROW_BYTES, np.uint8) for _ in everyone]
        self.sockets: dict[tuple[int, bool], socket.socket] = {}
        self.clients: dict[tuple[int, bool], Any] = {}
        for number, (tcp, ports, announced) in enumerate(everyone):
            for tls in (False, True):
                if number == self.number:
                    continue
                connection: socket.socket = socket.create_connection((HOST, tcp[tls]))
                options = {}
                if tls:
                    context = ssl.create_default_context(cadata=announced.certificate)
                    context.check_hostname = False
                    connection = context.wrap_socket(connection)
                    options = {"tls_root_certs": announced.certificate, "override_hostname": announced.server_name}
                self.sockets[number, tls] = connection
                scheme = "grpc+tls" if tls else "grpc"
                self.clients[number, tls] = flight.FlightClient(f"{scheme}://{HOST}:{ports[tls]}", **options)

    def tcp(self, pulls: Pulls, tls: bool) -> None:
        """Into a buffer as large as ours, again and again."""

        def one(number: int, size: int) -> None:
            connection = self.sockets[number, tls]
            connection.sendall(_LENGTH.pack(size))
            view, done = self.targets[number].data, 0
            while done < size:
                at = done % len(view)
                done += connection.recv_into(view[at : min(at + size - done, len(view))])

        together(one, pulls)

    def flight(self, pulls: Pulls, tls: bool) -> None:
        """Dropped on arrival."""

        def one(number: int, size: int) -> None:
            got = 0
            for chunk in self.clients[number, tls].do_get(flight.Ticket(b"0 %d" % size)):
                got += chunk.data.num_rows
            assert got == size

        together(one, pulls)


def serve_tcp(data: np.ndarray, context: ssl.SSLContext | None) -> int:
    """Sends as many bytes as it is asked for; the port."""
    listening = socket.create_server((HOST, 0))

    def serve() -> None:
        while True:
            connection, _ = listening.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        if context is not None:
            connection = context.wrap_socket(connection, server_side=True)
        while request := connection.recv(_LENGTH.size):
            (length,) = _LENGTH.unpack(request)
            for start in range(0, length, PIECE_BYTES):
                connection.sendall(data[start : min(start + PIECE_BYTES, length)].data)

    threading.Thread(target=serve, daemon=True).start()
    return int(listening.getsockname()[1])


def together(one: Callable[[int, int], None], pulls: Pulls) -> None:
    """All pulls at once."""
    threads = [threading.Thread(target=one, args=pull) for pull in pulls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class OurNode:
    """What is measured; see the module docstring."""

    def __init__(self, number: int, size: int, token: bytes) -> None:
        self.number = number
        self.slot = make_slot(number, size)
        name = f"n{number}"
        own = Credentials(Job("benchmark"), EPOCH, name, token, Identity.ephemeral(name, EPOCH))
        self.credentials = (without_tls(own), own)
        self.listeners = [Listener.reserve(HOST) for _ in range(2)]
        self.announced = [c.announce(HOST, at.port) for c, at in zip(self.credentials, self.listeners, strict=True)]

    def join(self, everyone: list[list[Announcement]], group: Group) -> SealRecord:
        """Starts the servers, connects to all others."""
        self.group = group
        self.servers: list[PeerServer] = []
        self.protectors = [self._protector([announced[tls] for announced in everyone], tls) for tls in (False, True)]
        record = self.protectors[0].describe(SNAPSHOT, [self.slot])
        for protector in self.protectors:
            protector.give_string(SNAPSHOT, [self.slot], record)
        return record

    def _protector(self, members: list[Announcement], tls: bool) -> Protector:
        sources, throttle = Sources(), Throttle()
        self.servers.append(PeerServer(self.credentials[tls], self.listeners[tls], members, sources))
        others = [member for member in members if member.node != f"n{self.number}"]
        peers = Peers({member.node: Peer(self.credentials[tls], member, throttle=throttle) for member in others})
        names = {number: member.node for number, member in enumerate(members)}
        return Protector(f"n{self.number}", names, peers, sources, throttle)

    def seal(self, records: dict[int, SealRecord]) -> None:
        """What the others' strings are."""
        self.sealed = SealedGroup(SNAPSHOT, self.group, records)
        self.area = ParityArea.create(self.sealed.striping.parity_bytes)

    def prepare(self, what: str, tls: bool) -> None:
        """Of an earlier encoding nothing is left, for rebuilding all."""
        for protector in self.protectors:
            protector.withdraw(SNAPSHOT, "parity")
        if what == "rebuild":
            self.protectors[tls].give_parity(self.area)

    def encode(self, pulls: Pulls, tls: bool) -> None:
        self.protectors[tls].encode(self.sealed, self.number, self.area)

    def rebuild(self, pulls: Pulls, tls: bool) -> None:
        self._rebuilt(tls).close()

    def describe(self, pulls: Pulls, tls: bool) -> None:
        self.protectors[tls].describe(SNAPSHOT, [self.slot])

    def check(self) -> None:
        """What was measured has done what it should."""
        self.area.check()
        found = self._rebuilt(False)
        images = [
            np.frombuffer(mmap.mmap(slot.descriptor, slot.geometry.size, prot=mmap.PROT_READ), np.uint8)
            for slot in (found, self.slot)
        ]
        assert np.array_equal(*images)
        found.close()

    def _rebuilt(self, tls: bool) -> Slot:
        names = {number: [f"n{number}"] for number in self.group.nodes if number != self.number}
        (slot,) = self.protectors[tls].rebuild(self.sealed, self.number, Holders(names, names))
        return slot


def make_slot(number: int, size: int) -> Slot:
    """A slot with a snapshot of random bytes."""
    starts = list(range(0, size, CHUNK_BYTES))
    sizes = [[min(CHUNK_BYTES, size - start)] for start in starts]
    offsets = [[start] for start in starts]
    catalog = Catalog.build([("weight", "uint8", (size,))], [0] * len(starts), offsets, sizes, file_offset=starts)
    slot = Slot.create(*layout(number, catalog, 0))
    data = np.random.default_rng(number).integers(0, 256, size, np.uint8)
    for start, (part,) in zip(starts, sizes, strict=True):
        os.pwrite(slot.descriptor, data[start : start + part].data, slot.geometry.data_offset + start)
    crc = [crc32c(data[start : start + part]) for start, (part,) in zip(starts, sizes, strict=True)]
    slot.commit(SNAPSHOT, np.array(crc, np.uint32), b"")
    return slot


def run(kind: str, number: int, size: int, token: bytes, pipe: Connection) -> None:
    """The process: does what comes through the pipe, until that closes."""
    node = {"plain": PlainNode, "ours": OurNode}[kind](number, size, token)
    pipe.send(node.announced)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(node, name)(*arguments))
