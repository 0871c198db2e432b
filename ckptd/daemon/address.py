"""Where a job's daemon lives on this node: one private directory per job in the runtime directory.

    <runtime dir>/<job digest>/   0700
        job.json   the job's name                        socket   0600, SOCK_SEQPACKET
        lock       flocked by the daemon                 log      what daemon and keeper say
        keeper     flocked by the keeper                 start    flocked by who starts a keeper

A lock counts only while its file has its name: the directory goes with the daemon that leaves.

Socket paths go through /proc/self/fd, so that a long runtime directory does not meet the 107-byte limit of AF_UNIX.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ckptd.core.config import runtime_dir
from ckptd.core.errors import ConfigError, DaemonError
from ckptd.core.types import Job

CREATE_ATTEMPTS = 10


class Address(NamedTuple):
    """A job's directory on this node."""

    job: Job
    directory: Path

    @property
    def socket(self) -> Path:
        return self.directory / "socket"

    @property
    def lock(self) -> Path:
        return self.directory / "lock"

    @property
    def keeper(self) -> Path:
        return self.directory / "keeper"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def create(self) -> None:
        """Makes the directory and writes the job's name. Raises ConfigError where others could get in."""
        for attempt in range(CREATE_ATTEMPTS):
            try:
                self._create()
                return
            except FileNotFoundError:  # a daemon that leaves has removed it meanwhile
                if attempt == CREATE_ATTEMPTS - 1:
                    raise

    def _create(self) -> None:
        for folder in (self.directory.parent, self.directory):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700, parents=folder is not self.directory)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise ConfigError(
                    f"runtime directory {folder}: must be a directory of uid {os.getuid()} with mode 0700; "
                    "choose another with CKPTD_RUNTIME_DIR"
                )
        name = self.directory / "job.json"
        temporary = self.directory / f"job.json.{os.getpid()}"
        temporary.write_text(json.dumps({"job": self.job.name}))
        temporary.replace(name)

    def remove(self) -> None:
        """Removes the directory; the runtime directory too if it is empty."""
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.parent.rmdir()


def address_of(job: Job) -> Address:
    """The address of a job on this node."""
    return Address(job, runtime_dir() / job.digest)


def addresses() -> list[Address]:
    """Every job that has a directory on this node."""
    found = []
    with contextlib.suppress(OSError):
        for folder in sorted(runtime_dir().iterdir()):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                job = Job(json.loads((folder / "job.json").read_text())["job"])
                if job.digest == folder.name:
                    found.append(Address(job, folder))
    return found


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def listen(address: Address) -> socket.socket:
    """The daemon's listening socket. The caller holds the lock, so whatever lies there is a leftover."""
    with contextlib.suppress(FileNotFoundError):
        address.socket.unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with _short(address.socket) as path:
        listening.bind(path)
    address.socket.chmod(0o600)
    listening.listen(1024)
    listening.setblocking(False)
    return listening


def connect(address: Address) -> socket.socket:
    """A connection to the daemon. Raises DaemonError if nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(address.socket) as path:
            connection.connect(path)
    except OSError as error:
        connection.close()
        raise DaemonError(f"no daemon of job {address.job.name!r} on this node: {error.strerror}") from None
    return connection


def take_lock(path: Path) -> int | None:
    """The descriptor of an exclusively locked file, or None where another process holds it or its directory is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    os.close(descriptor)
    return None


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock of a file."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def take_over(address: Address, kept: bool, patience_s: float) -> int | None:
    """The job's lock on this node, for a daemon; None where another one serves it, or is about to: one without a keeper
    (not `kept`) gives way to a keeper's, which has the arena. One that is leaving is waited for."""
    until = time.monotonic() + patience_s
    while True:
        address.create()
        lock = take_lock(address.lock)
        if lock is not None and not kept and is_locked(address.keeper):
            os.close(lock)
            lock = None
        if lock is not None or time.monotonic() > until:
            return lock
        try:
            connect(address).close()
            return None
        except DaemonError:
            time.sleep(0.05)
