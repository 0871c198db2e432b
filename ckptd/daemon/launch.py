"""Starting the daemon of a job, and connecting to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ckptd
from ckptd.core.errors import DaemonError
from ckptd.daemon import keeper
from ckptd.daemon.address import Address, connect, is_locked, take_lock

START_S = 30.0
"""How long a daemon may take to listen."""

_RETRY_S = 0.02


def command(address: Address) -> list[str]:
    """The daemon's command line."""
    return [sys.executable, "-m", "ckptd.daemon", "--job", address.job.name]


def environment(address: Address) -> dict[str, str]:
    """The daemon's environment: it finds the same package and the same runtime directory."""
    package = str(Path(ckptd.__file__).resolve().parent.parent)
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "CKPTD_RUNTIME_DIR": str(address.directory.parent),
    }


def start_keeper(address: Address, adopt: socket.socket | None = None) -> subprocess.Popen[bytes]:
    """A keeper: detached with a daemon of its own, or serving the daemon (the caller) at the other end of `adopt`."""
    options = ["--directory", str(address.directory)]
    descriptors: tuple[int, ...] = ()
    if adopt is not None:
        options += ["--adopt", str(adopt.fileno())]
        descriptors = (adopt.fileno(),)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", keeper.__file__, *options, "--", *command(address)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(address),
        pass_fds=descriptors,
        start_new_session=adopt is not None,
    )


def reach(address: Address, *, patience_s: float = 0.0, given_up: Callable[[], bool] = lambda: False) -> socket.socket:
    """A connection to the job's daemon, started if it is not running; waits `patience_s` for one that may be coming up
    by itself. Raises DaemonError with the end of its log, or at once when `given_up()`."""
    deadline = time.monotonic() + START_S
    start_at = time.monotonic() + patience_s
    starting: int | None = None
    try:
        while True:
            try:
                return connect(address)
            except DaemonError as error:
                now = time.monotonic()
                if given_up():
                    raise
                if now >= deadline:
                    text = f"{error}; it did not start within {START_S:.0f} s. {_tail(address.log)}"
                    raise DaemonError(text) from None
                if now >= start_at and starting is None:
                    starting = _start_one(address)
            time.sleep(_RETRY_S)
    finally:
        if starting is not None:
            os.close(starting)


def _start_one(address: Address) -> int | None:
    """Starts a keeper with its daemon; the lock to hold until that listens. None where another process is doing so, or
    a keeper lives: its daemon has just been killed and comes again, or leaves and makes room."""
    address.create()
    lock = take_lock(address.directory / "start")
    if lock is not None and (is_locked(address.keeper) or start_keeper(address).wait(timeout=START_S) != 0):
        os.close(lock)
        return None
    return lock


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()[-5:]
    except OSError:
        return f"It left no log at {log}."
    return f"The end of {log}: " + " | ".join(lines)
