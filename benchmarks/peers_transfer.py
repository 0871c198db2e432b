"""`python -m benchmarks.peers_transfer`: pulls between two daemons' processes, beside plain Flight and plain TCP.

All move the same bytes from a memfd, or memory, of one process into the memory of another on this machine, over
loopback. Contenders take turns within each round, so that a noisy minute hits all of them alike; ratios are medians of
those of neighbours in time. CPU seconds are those of both processes.

- TCP: one connection, `sendall` from memory, `recv_into` the target. TLS beside it is Python's ssl module.
- plain Flight: `do_get` of a table in memory, in batches of 4 MiB that the client drops; nothing is verified or copied.
- ours: copied out of a memfd, checksum taken, sent; copied into the target, checksum compared; headers and throttle.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from ckptd.core.config import parse_size
from ckptd.core.types import Epoch, Job, SnapshotId
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.tiers.peers import (
    Announcement,
    Credentials,
    DescriptorSource,
    Extent,
    Identity,
    Listener,
    Peer,
    Peers,
    PeerServer,
    Pull,
    Sources,
    new_token,
)
from ckptd.tiers.peers.wire import SCHEMA

EPOCH = Epoch(1, "0" * 16)
SNAPSHOT = SnapshotId(EPOCH, 1)
HOST = "127.0.0.1"


class PlainServer(flight.FlightServerBase):  # type: ignore[misc]
    """Gives one table, from memory; the ticket is the range."""

    def __init__(self, location: str, data: np.ndarray, **security: Any) -> None:
        super().__init__(location, **security)
        self.array = pa.array(data)

    def do_get(self, context: Any, ticket: Any) -> Any:
        start, stop = map(int, ticket.ticket.split())
        cuts = range(start, stop, PIECE_BYTES)
        batches = [pa.record_batch([self.array[at : min(at + PIECE_BYTES, stop)]], schema=SCHEMA) for at in cuts]
        return flight.RecordBatchStream(pa.Table.from_batches(batches))


def serve_tcp(data: np.ndarray, context: ssl.SSLContext | None) -> int:
    """Sends all of `data` for each byte that comes; the port."""
    listening = socket.create_server((HOST, 0))

    def serve() -> None:
        while True:
            connection, _ = listening.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        while connection.recv(1):
            for start in range(0, len(data), PIECE_BYTES):
                connection.sendall(data[start : start + PIECE_BYTES].data)

    threading.Thread(target=serve, daemon=True).start()
    return int(listening.getsockname()[1])


def serve(size: int, own: Credentials, other: Announcement, pipe: Connection) -> None:
    """The process that gives: everything with TLS and without, until the pipe closes."""
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    descriptor = os.memfd_create("benchmark")
    for start in range(0, size, 2**28):
        os.pwrite(descriptor, data[start : start + 2**28].data, start)
    assert own.identity is not None
    security = {"tls_certificates": [(own.identity.certificate, own.identity.key)]}
    plain = [PlainServer(f"grpc://{HOST}:0", data), PlainServer(f"grpc+tls://{HOST}:0", data, **security)]
    with tempfile.NamedTemporaryFile() as pair:
        pair.write(own.identity.certificate + own.identity.key)
        pair.flush()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pair.name)
    ours = []
    for credentials in (without_tls(own), own):
        listener = Listener.reserve(HOST)
        announced = credentials.announce(HOST, listener.port)
        sources = Sources()
        sources.register(SNAPSHOT, "string", DescriptorSource([Extent(descriptor, 0, size)]))
        ours.append((announced, PeerServer(credentials, listener, [announced, other], sources)))
    tcp = [serve_tcp(data, None), serve_tcp(data, context)]
    pipe.send(([server.port for server in plain], tcp, [announced for announced, _ in ours]))
    while True:
        try:
            pipe.recv()
        except EOFError:
            return


def without_tls(credentials: Credentials) -> Credentials:
    return Credentials(credentials.job, credentials.epoch, credentials.node, credentials.token, None)


class Contenders:
    """The process that gets: one callable for each way, each fills (or drops) `size` bytes."""

    def __init__(self, size: int, here: Credentials, ports: Any, streams: int) -> None:
        plain, tcp, ours = ports
        self.target = np.zeros(size, np.uint8)
        self.ways: dict[str, Callable[[], None]] = {}
        for tls in (False, True):
            suffix = " TLS" if tls else ""
            certificate = ours[1].certificate
            self.ways["TCP" + suffix] = self._tcp(tcp[tls], certificate if tls else None)
            self.ways["plain Flight" + suffix] = self._plain(plain[tls], ours[1] if tls else None)
            peer = Peer(here if tls else without_tls(here), ours[tls], streams=streams)
            self.ways["ours, 1 stream" + suffix] = self._ours(peer)
            self.ways[f"ours, {streams} streams" + suffix] = self._streams(peer, streams, None)
            self.ways[f"ours, {streams} streams, a call a piece" + suffix] = self._streams(peer, streams, PIECE_BYTES)

    def _tcp(self, port: int, certificate: str | None) -> Callable[[], None]:
        connection = socket.create_connection((HOST, port))
        if certificate is not None:
            context = ssl.create_default_context(cadata=certificate)
            context.check_hostname = False
            connection = context.wrap_socket(connection)

        def run() -> None:
            connection.sendall(b"!")
            view, at = self.target.data, 0
            while at < len(view):
                at += connection.recv_into(view[at : at + 2**20])

        return run

    def _plain(self, port: int, announced: Announcement | None) -> Callable[[], None]:
        if announced is None:
            client = flight.FlightClient(f"grpc://{HOST}:{port}")
        else:
            client = flight.FlightClient(
                f"grpc+tls://{HOST}:{port}",
                tls_root_certs=announced.certificate,
                override_hostname=announced.server_name,
            )

        def run() -> None:
            reader, got = client.do_get(flight.Ticket(b"0 %d" % len(self.target))), 0
            for chunk in reader:
                got += chunk.data.num_rows
            assert got == len(self.target)

        return run

    def _ours(self, peer: Peer) -> Callable[[], None]:
        return lambda: peer.pull(SNAPSHOT, "string", 0, self.target.data)

    def _streams(self, peer: Peer, streams: int, call_bytes: int | None) -> Callable[[], None]:
        peers = Peers({peer.node: peer}, streams=streams)
        step = call_bytes or len(self.target)
        pulls = [
            Pull(peer.node, SNAPSHOT, "string", start, self.target.data[start : start + step])
            for start in range(0, len(self.target), step)
        ]
        return lambda: peers.pull(pulls)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(contenders: Contenders, pid: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """name -> (seconds, CPU seconds of both processes) of each round, all in turn."""
    expected = np.random.default_rng(0).integers(0, 256, len(contenders.target), np.uint8)
    for name, run in contenders.ways.items():
        contenders.target[:] = 0
        run()
        if "plain" not in name and not np.array_equal(contenders.target, expected):
            raise SystemExit(f"{name}: other bytes arrived")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders.ways}
    for _ in range(rounds):
        for name, run in contenders.ways.items():
            cpu, started = cpu_s(pid) + time.process_time(), time.perf_counter()
            run()
            found[name].append((time.perf_counter() - started, cpu_s(pid) + time.process_time() - cpu))
    return found


def report(found: dict[str, list[tuple[float, float]]], size: int) -> None:
    """A line for each way: GB/s, its ratio to plain Flight and TCP of the same kind, CPU seconds per GB."""
    for name, times in found.items():
        suffix = " TLS" if name.endswith(" TLS") else ""
        cells = []
        for other in ("plain Flight", "TCP"):
            pairs = zip(found[other + suffix], times, strict=True)
            cells.append(f"{statistics.median(base[0] / own[0] for base, own in pairs):>5.0%} of {other}{suffix}")
        rates = sorted(size / seconds / 1e9 for seconds, _ in times)
        cpu = statistics.median(spent for _, spent in times) / size * 1e9
        print(
            f"{name:38} {statistics.median(rates):5.2f} GB/s ({rates[0]:.2f} to {rates[-1]:.2f})  "
            f"{cpu:5.2f} CPU s/GB  {'  '.join(cells)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers_transfer", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=2**28, help="bytes that each way moves (default 256 MiB)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=2)
    options = parser.parse_args()
    job, token = Job("benchmark"), new_token()
    here, there = (Credentials(job, EPOCH, name, token, Identity.ephemeral(name, EPOCH)) for name in ("here", "there"))
    context = multiprocessing.get_context("spawn")
    pipe, far_end = context.Pipe()
    process = context.Process(target=serve, args=(options.size, there, here.announce(HOST, 1), far_end), daemon=True)
    process.start()
    far_end.close()
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} before; {options.size / 1e9:.2f} GB, {options.rounds} rounds")
    try:
        assert process.pid is not None
        contenders = Contenders(options.size, here, pipe.recv(), options.streams)
        report(measure(contenders, process.pid, options.rounds), options.size)
    finally:
        process.kill()
        process.join()
    print(f"load {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
