"""Which threads of the daemon give way to training, and how much: CPU and I/O priorities of threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

FLUSHING = 19
"""The least weight there is, about a hundredth of a training thread's. Not SCHED_IDLE, which gets nothing at all while
training threads spin on all cores, as those of collectives and of OpenMP do: a flush must end some day."""

PROTECTING = 10
"""A tenth of a training thread's: other nodes wait for it, and messages take the same way."""

CPU_SHARE = 0.05
"""Of the node's cores: what encoding may take in the long run; making anew what training waits for may take all."""

_IOPRIO_SET = 251 if os.uname().machine == "x86_64" else 30
_IOPRIO_BEST_EFFORT_LOWEST = (2 << 13) | 7


def give_way(nice: int) -> None:
    """Lowers CPU and I/O priority of the calling thread for ever; the threads that it starts inherit both."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, nice)
    ctypes.CDLL(None).syscall(_IOPRIO_SET, 1, thread, _IOPRIO_BEST_EFFORT_LOWEST)


def giving_way(nice: int, start: Callable[[], T]) -> T:
    """Calls `start` so that the threads it starts give way; raises what it raises."""
    found: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        give_way(nice)
        try:
            found.append(start())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="ckptd-start")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return found[0]


def protecting_cores() -> float:
    """CPU seconds a second that protecting may take here."""
    return CPU_SHARE * len(os.sched_getaffinity(0))
