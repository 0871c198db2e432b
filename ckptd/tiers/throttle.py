"""How fast a node may pull from others, or write to a store: bytes a second, a share of CPU, and a pause. The job goes
first.

`Bucket` is pure arithmetic on times that it is given; `Throttle` is the lock and the waiting around two of them.

Invariants: within any t seconds at most rate x t + burst is admitted, and one request more, since a request is admitted
whole once the bucket is not in debt and paid back afterwards. A paused throttle admits nothing; what was admitted
before ends by itself, and is bounded (wire.CALL_BYTES). Waiting happens between requests: no deadline runs meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

BURST_S = 0.1
"""Of the rate: what an idle bucket saves up."""

_RESOLUTION_S = 1e-6
"""Shorter waits are none: added to a clock they may not move it."""


class Bucket:
    """A token bucket that may go into debt. `rate` is per second; None: no limit."""

    def __init__(self, rate: float | None, now: float, burst_s: float = BURST_S) -> None:
        if rate is not None and not rate > 0:
            raise ValueError(f"a rate of {rate}: expected a positive number, or None")
        self.rate = rate
        self._most = 0.0 if rate is None else rate * burst_s
        self._level = self._most
        self._then = now

    def delay(self, now: float) -> float:
        """Seconds until the next request may go."""
        if self.rate is None:
            return 0.0
        self._refill(now, self.rate)
        needed = -self._level / self.rate
        return needed if needed > _RESOLUTION_S else 0.0

    def charge(self, amount: float, now: float) -> None:
        """Takes what a request costs."""
        if self.rate is not None:
            self._refill(now, self.rate)
            self._level -= amount

    def _refill(self, now: float, rate: float) -> None:
        self._level = min(self._level + max(now - self._then, 0.0) * rate, self._most)
        self._then = max(now, self._then)


class Throttle:
    """What all pulls of a daemon share, or all its flushes. `bandwidth`: bytes a second; `cpu_share`: CPU seconds a
    second of the working threads (1.0: one core); None: no limit."""

    def __init__(
        self,
        bandwidth: float | None = None,
        cpu_share: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._bytes, self._cpu = Bucket(bandwidth, clock()), Bucket(cpu_share, clock())
        self._changed = threading.Condition()
        self._paused = False
        self._urgent = 0
        self.admitted_bytes = 0

    def admit(self, size: int, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Waits until `size` bytes may go; False if `cancelled` says so meanwhile (see `wake`)."""
        with self._changed:
            while not cancelled():
                if self._urgent:
                    self.admitted_bytes += size
                    return True
                now = self._clock()
                delay = max(self._bytes.delay(now), self._cpu.delay(now))
                if not self._paused and delay <= 0:
                    self._bytes.charge(size, now)
                    self.admitted_bytes += size
                    return True
                self._wait(None if self._paused else delay)
            return False

    def spent(self, cpu_s: float) -> None:
        """Accounts for CPU time that pulling has taken."""
        with self._changed:
            if not self._urgent:
                self._cpu.charge(cpu_s, self._clock())

    def limit(self, bandwidth: float | None) -> None:
        """Another bandwidth from now on."""
        with self._changed:
            if bandwidth != self._bytes.rate:
                self._bytes = Bucket(bandwidth, self._clock())
                self._changed.notify_all()

    @contextlib.contextmanager
    def urgent(self) -> Iterator[None]:
        """Somebody waits for what runs meanwhile: nothing is held back, and nothing is counted."""
        with self._changed:
            self._urgent += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._urgent -= 1

    def pause(self) -> None:
        """Admits nothing until `resume`."""
        with self._changed:
            self._paused = True

    def resume(self) -> None:
        """Undoes `pause`."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def wake(self) -> None:
        """Makes all that wait ask again whether they are cancelled."""
        with self._changed:
            self._changed.notify_all()

    def _wait(self, seconds: float | None) -> None:
        self._changed.wait(seconds)
