"""How much memory may be taken, and taking it without being killed.

A memory cgroup kills instead of returning ENOSPC, even inside posix_fallocate, and writing to an unbacked memfd page on
a full machine is a SIGBUS. So headroom is asked of every limit first, and memory is allocated in steps with a check
before each.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from pathlib import Path
from typing import NamedTuple

import psutil

from ckptd.core.errors import ConfigError
from ckptd.core.native import back_with_huge_pages

STEP_BYTES = 256 * 1024 * 1024
HUGE_PAGE = 2 * 1024 * 1024
SLOW_PAGES, URGENT_SLOW_PAGES = 16, 2
"""Huge pages that the kernel may take long to make before small ones are taken for the rest."""

RESERVE_BYTES = 64 * 1024 * 1024
"""Left free under every limit: the processes themselves need some."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Of memory that others read: who reads what cannot shrink never meets SIGBUS."""

KEPT_BYTES = 64 * 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_CGROUPS = Path("/sys/fs/cgroup")


class Headroom(NamedTuple):
    """Bytes that may still be taken, and the limit that says so."""

    available: int
    limit: str


def headroom() -> Headroom:
    """The tightest of MemAvailable and the limits of this process's memory cgroups, all ancestors included."""
    found = [Headroom(psutil.virtual_memory().available, "MemAvailable of the machine"), *_cgroup_headrooms()]
    tightest = min(found)
    return Headroom(max(0, tightest.available - RESERVE_BYTES), tightest.limit)


def _cgroup_headrooms() -> list[Headroom]:
    found = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, inactive = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit = _CGROUPS / "memory", "memory.limit_in_bytes"
            usage, inactive = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdigit() and used.isdigit() and int(most) < 2**60:
                reclaimable = _statistic(_read(folder / "memory.stat"), inactive)
                found.append(Headroom(int(most) - int(used) + reclaimable, f"{folder / limit} = {most}"))
            if folder == root:
                break
    return found


def _statistic(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name + " ")), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def allocate(descriptor: int, size: int, *, urgent: bool = False) -> None:
    """Backs `size` bytes of a memfd with memory, in huge pages where they are to be had: the kernel copies in and out
    of them about twice as fast. `urgent`: they are not worth waiting for. Raises ConfigError with needed, available
    and the limit."""
    huge, most_slow = True, URGENT_SLOW_PAGES if urgent else SLOW_PAGES
    for offset in range(0, size, STEP_BYTES):
        step = min(STEP_BYTES, size - offset)
        room = headroom()
        if room.available < step:
            raise ConfigError(
                f"snapshot memory: {size - offset} more bytes needed, {room.available} available ({room.limit})"
            )
        huge = huge and back_with_huge_pages(descriptor, offset, step, most_slow) >= step // HUGE_PAGE * HUGE_PAGE
        try:
            while True:
                try:
                    os.posix_fallocate(descriptor, offset, step)
                    break
                except InterruptedError:
                    continue
        except OSError as error:
            raise ConfigError(
                f"snapshot memory: allocating {step} bytes failed ({error.strerror}); {room.available} were available"
            ) from None


def sealed_memory(name: str, size: int, *, urgent: bool = False) -> int:
    """The descriptor of a new memfd of that size, allocated and sealed. Raises ConfigError where memory is short."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        allocate(descriptor, size, urgent=urgent)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed for what is allocated next: in the whole process, up to KEPT_BYTES an arena.

    Who receives megabytes at a time into memory that is new each time spends a quarter of its time on page faults.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def is_sealed(descriptor: int) -> bool:
    """True if the descriptor is a memfd that can neither shrink nor grow. Raises OSError where it is none."""
    return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
