"""Whoever else talks to a daemon: second daemons, other versions, garbage, floods, other users. Refused, in bounded
memory, and the daemon serves on."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from ckptd.core.errors import ConfigError, DaemonError
from ckptd.core.types import Epoch
from ckptd.daemon import server, wire
from ckptd.daemon.address import connect, take_lock
from ckptd.daemon.launch import reach
from ckptd.daemon.wire import ask, send
from ckptd.protocol import messages as m
from tests.faults.lab import Fault, Lab, until

EPOCH = Epoch(1, "0" * 16)


@pytest.fixture
def served(storeless: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A job with a daemon and no trainer yet."""
    storeless.plan({})
    for name, value in storeless.environment().items():
        monkeypatch.setenv(name, value)
    reach(storeless.address).close()
    return storeless


def answers(lab: Lab) -> int:
    """The pid of the daemon that answers."""
    pid: int = lab.reaches(lambda s: True, "an answer")["pid"]
    return pid


def test_second_daemon(served: Lab) -> None:
    """By hand it exits and says why; from a keeper there is no second one at all. The first one is not disturbed."""
    pid = answers(served)
    command = [sys.executable, "-m", "ckptd.cli.main", "daemon", "--job", served.job]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert b"another daemon serves job 'a job'" in done.stderr
    keeper = [sys.executable, "-I", "-S", server.__file__.replace("server", "keeper")]
    options = ["--directory", str(served.address.directory), "--", sys.executable, "-c", "raise SystemExit"]
    assert subprocess.run([*keeper, *options], timeout=60, check=False).returncode == 3
    assert answers(served) == pid
    assert len(served.pids("daemon")) == len(served.pids("keeper")) == 1


def test_daemon_by_hand(storeless: Lab, expected: Callable[..., str]) -> None:
    """A daemon started by hand serves like any other: its keeper is replaced, and so is it, with what it has."""
    storeless.plan({})
    command = [sys.executable, "-m", "ckptd.cli.main", "daemon", "--job", storeless.job]
    with subprocess.Popen(command, env=storeless.environment(), stderr=subprocess.DEVNULL) as by_hand:
        assert answers(storeless) == by_hand.pid
        run = storeless.start(faults={"hold": Fault("step", "hold", call=15)})
        storeless.holds("hold")
        before = storeless.reaches(lambda s: s["newest"]["sealed"] is not None, "a sealed snapshot")
        (old,) = storeless.kill("keeper")
        until(lambda: storeless.pids("keeper") not in ([], [old]), "another keeper")
        until(lambda: len(storeless.kept()) == len(before["slots"]) + 2, "the keeper to hold slots and ledgers")
        by_hand.kill()
    after = storeless.reaches(lambda s: s["pid"] != before["pid"], "another daemon")
    assert after["newest"]["sealed"] >= before["newest"]["sealed"]
    storeless.release("hold")
    assert run.finishes()["hash"] == expected()
    storeless.daemons_end()


def test_many_at_once(served: Lab) -> None:
    """Many processes that need a daemon at once, while there is none, get the same one."""
    served.kill("daemon", "keeper")
    script = "\n".join(
        (
            "from ckptd.daemon.launch import reach",
            "from ckptd.daemon.address import address_of",
            "from ckptd.daemon.client import request",
            "from ckptd.core.types import Job",
            "from ckptd.protocol import messages as m",
            "print(request(reach(address_of(Job('a job'))), m.Status()).report['pid'])",
        )
    )
    pipe = subprocess.PIPE
    started = [subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe) for _ in range(4)]
    said = {process.communicate(timeout=60) for process in started}
    assert said == {(f"{answers(served)}\n".encode(), b"")}
    assert len(served.pids("daemon")) == len(served.pids("keeper")) == 1


def test_other_version(served: Lab) -> None:
    """Another version of the protocol, and another job, are refused by name."""
    for message, error, words in (
        (m.Prepare(m.PROTOCOL + 1, served.job, EPOCH), "VersionError", f"speaks {m.PROTOCOL}"),
        (m.Prepare(m.PROTOCOL, "another job", EPOCH), "DaemonError", "another job"),
        (m.Boundary(1, 0.1), "DaemonError", "no rank"),
    ):
        with connect(served.address) as connection:
            answer, _ = ask(connection, message, 10)
        assert isinstance(answer, m.Refuse)
        assert answer.error == error
        assert words in answer.message


def garbage() -> Iterator[bytes]:
    """Packets that are no messages, or messages out of place."""
    draw = random.Random(1)
    yield from (draw.randbytes(size) for size in (1, 2, 100, 4096, wire.MAX_PACKET))
    good = m.encode(m.Prepare(m.PROTOCOL, "a job", EPOCH))
    yield from (good[:cut] for cut in range(1, len(good), 7))
    yield b"\x93" * 1000
    yield wire.LONG
    yield m.encode(m.Status()) * 2
    yield m.encode(m.Begun())


def test_garbage(served: Lab) -> None:
    """Garbage ends its connection; nothing else."""
    pid = answers(served)
    for packet in garbage():
        with connect(served.address) as connection:
            connection.settimeout(30)
            connection.send(packet)
            assert connection.recv(1) == b""
    assert answers(served) == pid


def test_oversize_packet_and_descriptors(served: Lab) -> None:
    """A packet larger than any message ends its connection; descriptors that nobody asked for are closed."""
    pid = answers(served)
    with connect(served.address) as connection:
        connection.settimeout(30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * wire.MAX_PACKET)
        connection.send(bytes(wire.MAX_PACKET + 1))
        assert connection.recv(1) == b""
    before = len(os.listdir(f"/proc/{pid}/fd"))
    read, write = os.pipe()
    for packet in (m.encode(m.Status()), m.encode(m.Ready(1)), m.encode(m.Pieces(1)), b"garbage", wire.LONG):
        with connect(served.address) as connection:
            connection.settimeout(30)
            socket.send_fds(connection, [packet], [write] * 200)
            connection.recv(wire.MAX_PACKET)
    os.close(write)
    assert os.read(read, 1) == b"", "nobody holds the other end"
    os.close(read)
    until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before, "the daemon to close what it was given")


def test_flood(served: Lab) -> None:
    """Connections that say nothing: the oldest are cut where there are too many, and who asks is served."""
    pid = answers(served)
    idle = [connect(served.address) for _ in range(server.MAX_STRANGERS + 200)]
    assert answers(served) == pid
    assert len(os.listdir(f"/proc/{pid}/fd")) < server.MAX_STRANGERS + 100
    idle[0].settimeout(30)
    assert idle[0].recv(1) == b""
    for connection in idle:
        connection.close()
    assert answers(served) == pid


def asks_in_vain(connection: socket.socket) -> bool:
    """Asks as often as the connection takes it; whether it has been cut."""
    try:
        while True:
            send(connection, m.Flush())
    except BlockingIOError:
        return False
    except (BrokenPipeError, ConnectionResetError):
        return True


def test_who_does_not_read(served: Lab) -> None:
    """A connection that asks and asks and never reads is cut, and takes no memory without bound."""
    pid = answers(served)
    with connect(served.address) as connection:
        connection.setblocking(False)
        until(lambda: asks_in_vain(connection), "the connection to be cut")
    assert answers(served) == pid


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="takes another uid")
def test_another_user(served: Lab) -> None:
    """Another uid does not reach the socket; where a directory lets it, it is refused."""
    script = "\n".join(
        (
            "import os, socket, sys",
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)",
            "connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
            "os.chdir(sys.argv[1])",
            "connection.connect('socket')",
            "print(connection.recv(1))",
        )
    )
    directory = served.address.directory
    command = [sys.executable, "-S", "-c", script, str(directory)]
    assert b"PermissionError" in subprocess.run(command, capture_output=True, check=False).stderr
    private = [path for path in (directory, *directory.parents) if path.stat().st_mode & 0o5 != 0o5]
    modes = {path: path.stat().st_mode & 0o7777 for path in private}
    try:
        for path in modes:
            path.chmod(0o755)
        (directory / "socket").chmod(0o666)
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.stdout == b"b''\n", done.stderr
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def test_directory_that_others_own(served: Lab) -> None:
    """A runtime directory that others could get into is refused, not used."""
    served.address.directory.chmod(0o755)
    with pytest.raises(ConfigError, match="0700"):
        served.address.create()
    served.address.directory.chmod(0o700)


def test_daemon_that_leaves_is_waited_for(served: Lab) -> None:
    """A daemon started while another still holds the job's lock and listens no more waits until it is gone."""
    served.kill("daemon", "keeper")
    lock = until(lambda: take_lock(served.address.lock), "the lock of the killed daemon")
    assert lock is not None
    tries = Fault("ckptd.daemon.address:take_lock", "note", process="daemon", lasting=True)
    served.plan({"tries": tries})
    command = [sys.executable, "-m", "ckptd.daemon", "--job", served.job]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as waiting:
        until(lambda: len(served.notes("tries")) > 1, "the daemon to try the lock again")
        with pytest.raises(DaemonError):
            connect(served.address)
        os.close(lock)
        assert answers(served) == waiting.pid
        served.kill("daemon", "keeper")


def test_descriptors_beyond_1024(storeless: Lab, expected: Callable[..., str]) -> None:
    """A trainer whose descriptors are numbered from 1024 on has a session like any other."""
    ended = storeless.start("--open-files", "1100").finishes()
    assert ended["hash"] == expected()
    assert ended["statistics"]["snapshots_sealed"] > 0
    storeless.daemons_end()


def test_ledger_of_another_build(served: Lab, expected: Callable[..., str]) -> None:
    """A ledger that the next daemon cannot read costs the snapshots in memory, and nothing else."""
    run = served.start(faults={"hold": Fault("step", "hold", call=12)})
    served.holds("hold")
    (daemon,) = served.pids("daemon")
    os.kill(daemon, 19)
    served.spoil_ledger(b"\x81\xa3job\x01")
    served.kill("daemon")
    served.reaches(lambda s: s["pid"] != daemon and s["ranks"], "another daemon, with the rank")
    served.release("hold")
    assert run.finishes()["hash"] == expected()
    served.daemons_end()
