"""The keeper: a tiny process that holds the arena's descriptors and starts the daemon again when it is killed.

Standard library only, run as a script by path, so that it stays small. It speaks with its daemon over one
SOCK_SEQPACKET pair. Packets: `K<name>` + descriptor (keep), `D<name>` (drop), `X` (the daemon leaves for good);
a daemon that starts gets a `K` for everything kept, then `.`.

    keeper.py --directory DIRECTORY [--adopt FD] -- DAEMON COMMAND...

Without --adopt it detaches and starts the daemon; with it, it serves the daemon at the other end of FD, whose former
keeper was killed. It ends when the daemon has left for good, or when daemons die faster than is worth restarting. A job
has one keeper on a node: it holds the lock `keeper` in the job's directory, and a second one ends at once (BUSY).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

RESTARTS, WITHIN_S = 5, 30.0
PACKET = 4096
BUSY = 3
"""Exit status where there is a keeper already."""


def main(arguments: list[str]) -> int:
    """See the module docstring; returns the exit status."""
    split = arguments.index("--")
    options = dict(zip(arguments[:split:2], arguments[1:split:2], strict=True))
    command = arguments[split + 1 :]
    directory = options["--directory"]
    adopted = options.get("--adopt")
    channel = None if adopted is None else socket.socket(fileno=int(adopted))
    if not take_lock(os.path.join(directory, "keeper"), wait=channel is not None):
        return BUSY
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if channel is None:
        detach()
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    kept: dict[bytes, int] = {}
    started: list[float] = []
    while True:
        if channel is None:
            now = time.monotonic()
            started = [t for t in started if now - t < WITHIN_S] + [now]
            if len(started) > RESTARTS:
                return 1
            channel = start(command, os.path.join(directory, "log"), kept)
        if serve(channel, kept):
            return 0
        channel.close()
        channel = None


def detach() -> None:
    """A second fork, so that nobody who kills the trainer's process tree or session takes us along."""
    if os.fork() > 0:
        os._exit(0)
    os.setsid()
    os.chdir("/")


def take_lock(path: str, wait: bool) -> bool:
    """Locks a file until this process ends: the descriptor stays open. `wait`: its last holder is dying."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def start(command: list[str], log: str, kept: dict[bytes, int]) -> socket.socket:
    """Starts a daemon and hands it everything kept."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    subprocess.Popen(
        [*command, "--keeper", str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    os.close(output)
    theirs.close()
    try:
        for name, descriptor in kept.items():
            socket.send_fds(ours, [b"K" + name], [descriptor])
        ours.send(b".")
    except OSError:
        pass  # it died already: serve() sees the end of the channel
    return ours


def serve(channel: socket.socket, kept: dict[bytes, int]) -> bool:
    """Keeps and drops as the daemon says, until it leaves for good (True) or dies (False)."""
    while True:
        try:
            packet, descriptors, _, _ = socket.recv_fds(channel, PACKET, 1)
        except OSError:
            return False
        operation, name = packet[:1], packet[1:]
        if operation == b"":
            return False
        if operation == b"X":
            return True
        if operation == b"K" and descriptors:
            old = kept.pop(name, None)
            kept[name] = descriptors[0]
            if old is not None:
                os.close(old)
        elif operation == b"D" and name in kept:
            os.close(kept.pop(name))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
