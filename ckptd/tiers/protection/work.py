"""What encoding and reading have in common: threads that stop together, and buffers that are counted.

Invariants: `together` returns when all of its threads have ended; the first failure stops the others and is what is
raised. At most as many buffers exist as were in use at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ckptd.core.errors import DaemonError
from ckptd.plan.stripe import PIECE_BYTES, ROW_PIECES
from ckptd.tiers.peers import Cancellation, Throttle

ROW_BYTES = ROW_PIECES * PIECE_BYTES
WORKERS = 2
"""Rows in work at once: while one is computed the next is on its way."""

Bytes = npt.NDArray[np.uint8]


def stop_if(cancellation: Cancellation | None, what: str) -> None:
    """Raises DaemonError if it is cancelled."""
    if cancellation is not None and cancellation.cancelled:
        raise DaemonError(f"{what}: cancelled")


def turns(throttle: Throttle, cancellation: Cancellation | None, what: str) -> Callable[[], None]:
    """What work in this thread calls again and again to yield to the job: it accounts for the CPU time since, and waits
    as pulls do. Raises DaemonError if it is cancelled."""
    stop = cancellation or Cancellation()
    since = time.thread_time()

    def turn() -> None:
        nonlocal since
        throttle.spent(time.thread_time() - since)
        with stop.stopping(throttle.wake):
            throttle.admit(0, lambda: stop.cancelled)
        stop_if(stop, what)
        since = time.thread_time()

    return turn


def pause(cancellation: Cancellation, seconds: float) -> None:
    """Waits, at most until it is cancelled."""
    cancelled = threading.Event()
    with cancellation.stopping(cancelled.set):
        cancelled.wait(seconds)


def together(calls: Sequence[Callable[[Cancellation], None]], cancellation: Cancellation | None) -> None:
    """Runs the calls in a thread each; see the invariants. All are given what stops them."""
    stop = Cancellation()
    failures: list[BaseException] = []

    def run(call: Callable[[Cancellation], None]) -> None:
        try:
            call(stop)
        except BaseException as error:
            failures.append(error)
            stop.cancel()

    threads = [threading.Thread(target=run, args=(call,), name="protection", daemon=True) for call in calls]
    with contextlib.nullcontext() if cancellation is None else cancellation.stopping(stop.cancel):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


class Buffers:
    """Memory for rows, kept for reuse: fresh pages cost more than what is done with them. Counts what is in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Bytes] = []
        self._used = 0
        self.most_used = 0

    def take(self) -> Bytes:
        """ROW_BYTES with anything in them."""
        with self._lock:
            self._used += 1
            self.most_used = max(self.most_used, self._used)
            if self._idle:
                return self._idle.pop()
        return np.empty(ROW_BYTES, np.uint8)

    def give(self, buffers: Sequence[Bytes]) -> None:
        """Back, when nothing refers to them."""
        with self._lock:
            self._used -= len(buffers)
            self._idle.extend(buffers)

    @contextlib.contextmanager
    def some(self, count: int) -> Iterator[list[Bytes]]:
        """So many while it lasts."""
        taken = [self.take() for _ in range(count)]
        try:
            yield taken
        finally:
            self.give(taken)

    def trim(self) -> None:
        """Frees what is not in use."""
        with self._lock:
            self._idle.clear()
