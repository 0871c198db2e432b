"""What the training loop pays for snapshots, and what it gets: one account, kept where the time is spent.

Owns `Statistics`, and the events of a rank's trace. Time is counted where the training thread stands in ckptd: at the
boundary of a step, and before an optimizer step that must wait for the rest of a copy. What a capture takes beside
training shows as steps that are slower than others, and as CPU time.

The training thread writes, but for `settled`, which is called by whoever ends a capture.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from ckptd.core.native import helpers_cpu_s
from ckptd.core.types import Level
from ckptd.observe.trace import Trace
from ckptd.protocol import messages as m
from ckptd.trainer.estimates import Estimates


class Statistics(msgspec.Struct):
    """What the loop has paid and got since it was restored.

    `steps` were completed in `elapsed_s` seconds; one takes `step_s` (recent ones, without what follows). The training
    thread stood in ckptd for `stall_s_total` seconds: `boundary_s` at the ends of steps, where the state is looked at
    and copied, and `before_update_s` before optimizer steps, until the rest of a copy was done; `stall_s_last` for the
    last snapshot. Steps beside captures took `slowdown_s` longer than others would have, as far as that can be told
    (estimates.py). `overhead` is all of that as a fraction of `elapsed_s`. `cpu_s`: CPU seconds of captures on all
    threads of this process.

    `bytes_captured` were copied into slots, `bytes_eager` at boundaries, `bytes_lazy` while the next step ran.
    Snapshots were captured here, sealed by the whole job, protected against losses of nodes, or skipped, for
    `skip_reasons` (docs/protocol.md, section 2).
    """

    steps: int = 0
    elapsed_s: float = 0.0
    step_s: float = 0.0
    overhead: float = 0.0
    stall_s_total: float = 0.0
    stall_s_last: float = 0.0
    boundary_s: float = 0.0
    before_update_s: float = 0.0
    slowdown_s: float = 0.0
    cpu_s: float = 0.0
    bytes_captured: int = 0
    bytes_eager: int = 0
    bytes_lazy: int = 0
    snapshots_captured: int = 0
    snapshots_sealed: int = 0
    snapshots_protected: int = 0
    snapshots_skipped: int = 0
    skip_reasons: dict[str, int] = {}


class _Window(NamedTuple):
    """A copy beside a step, of so many bytes."""

    size: int
    began: float


class Costs:
    """See the module docstring."""

    def __init__(self, trace: Trace) -> None:
        """The loop begins now."""
        self.trace = trace
        self._counted = Statistics()
        self._began = self._boundary_at = time.perf_counter()
        self._waited_s = self._window_cpu_s = 0.0
        self._captured_s: float | None = None
        self._at_boundary = False
        self._helpers_cpu_s = helpers_cpu_s()
        self._estimates = Estimates()
        self._windows: dict[int, _Window] = {}

    def statistics(self) -> Statistics:
        """As of now."""
        found = msgspec.structs.replace(self._counted, skip_reasons=dict(self._counted.skip_reasons))
        found.stall_s_total = found.boundary_s + found.before_update_s
        lost_s = found.stall_s_total + found.slowdown_s
        found.overhead = lost_s / found.elapsed_s if found.elapsed_s else 0.0
        found.bytes_captured = found.bytes_eager + found.bytes_lazy
        found.step_s = self._estimates.step_s
        found.cpu_s += self._window_cpu_s + helpers_cpu_s() - self._helpers_cpu_s
        return found

    def boundary_message(self, step: int) -> m.Boundary:
        """What the daemon is told at the end of `step`."""
        return m.Boundary(step, self._estimates.step_s, self._estimates.cost_s)

    # --- the training thread

    @contextlib.contextmanager
    def boundary(self, step: int) -> Iterator[None]:
        """What is done at the end of `step`."""
        began, cpu_began = time.perf_counter(), time.thread_time()
        self._step_ended(max(began - self._boundary_at - self._waited_s, 0.0))
        self._at_boundary = True
        try:
            yield
        finally:
            now, counted = time.perf_counter(), self._counted
            counted.steps += 1
            counted.boundary_s += now - began
            counted.cpu_s += time.thread_time() - cpu_began
            counted.elapsed_s = now - self._began
            self._boundary_at, self._waited_s, self._at_boundary = now, 0.0, False
            self.trace.span("boundary", began, now, step=step)

    def _step_ended(self, seconds: float) -> None:
        captured_s, self._captured_s = self._captured_s, None
        self._estimates.step(seconds, beside=captured_s is not None)
        if captured_s is not None:
            self._estimates.stall(captured_s + self._waited_s)
            self._counted.slowdown_s += self._estimates.slowdown_s

    @contextlib.contextmanager
    def capturing(self, step: int) -> Iterator[None]:
        """The part of a capture that the training thread does: at a boundary, or when it is asked for one."""
        counted = self._counted
        began, cpu_began, eager = time.perf_counter(), time.thread_time(), counted.bytes_eager
        try:
            yield
        finally:
            now = time.perf_counter()
            counted.stall_s_last = now - began
            if self._at_boundary:  # which counts it
                self._captured_s = now - began
            else:
                counted.boundary_s += now - began
                counted.cpu_s += time.thread_time() - cpu_began
            self.trace.span("capture", began, now, step=step, bytes=counted.bytes_eager - eager)
            self.trace.count("bytes", eager=counted.bytes_eager, lazy=counted.bytes_lazy)

    @contextlib.contextmanager
    def before_update(self, step: int) -> Iterator[None]:
        """Waiting for the rest of a copy of `step`."""
        began, cpu_began = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            now, counted = time.perf_counter(), self._counted
            self._waited_s += now - began
            counted.before_update_s += now - began
            counted.stall_s_last += now - began
            counted.cpu_s += time.thread_time() - cpu_began
            self.trace.span("before update", began, now, step=step)

    def copied(self, size: int) -> None:
        """Bytes were copied at the boundary."""
        self._counted.bytes_eager += size

    def lazily(self, grant: int, size: int) -> None:
        """The rest of the capture for `grant` begins to be copied beside the next step."""
        self._windows[grant] = _Window(size, time.perf_counter())

    # --- whoever ends a capture, one at a time

    def settled(self, outcome: m.Captured | m.Missed) -> None:
        """A grant has its outcome. Where it was copied in a window, the caller is the thread that has done so."""
        counted, window = self._counted, self._windows.pop(outcome.grant, None)
        if window is not None:
            self._window_cpu_s += time.thread_time()
            counted.bytes_lazy += window.size if isinstance(outcome, m.Captured) else 0
            self.trace.span("window", window.began, time.perf_counter(), bytes=window.size)
        if isinstance(outcome, m.Missed):
            counted.snapshots_skipped += 1
            counted.skip_reasons[outcome.reason] = counted.skip_reasons.get(outcome.reason, 0) + 1
            self.trace.moment("skipped", grant=outcome.grant, reason=outcome.reason)
        else:
            counted.snapshots_captured += 1
            self.trace.moment("captured", step=outcome.step, grant=outcome.grant)

    def reached(self, level: Level, step: int) -> None:
        """`step` is the first, or a newer one, to have reached a level."""
        self._counted.snapshots_sealed += level is Level.SEALED
        self._counted.snapshots_protected += level is Level.PROTECTED
        self.trace.moment(level.value, step=step)
