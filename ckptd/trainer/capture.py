"""Capture: a rank's side of grants, from the boundary of a step to Captured or Missed.

Owns the outcome of every grant and the copy window; what is captured, and into which slots, is memory.py's. Two threads
meet here: the training thread at boundaries and before optimizer steps, the session's thread with messages; `_lock`
guards what both touch.

Invariants
- A slot is written only between a Grant for it and the outcome of that grant (protocol/slots.py).
- A grant has one outcome, remembered and repeated until superseded.
- The window: what is copied lazily is only what optimizer steps alone may write; the copy is complete, or given up,
  before the next optimizer step runs (PROTOCOL section 6, docs/architecture.md).
"""

from __future__ import annotations

import logging
import os
import threading
import time

from ckptd.core.config import Options
from ckptd.core.errors import CkptdError, DaemonError, DeadlineError, StoreError
from ckptd.core.types import Epoch, Level, SnapshotId
from ckptd.daemon.client import refusal
from ckptd.daemon.session import Session
from ckptd.format.objects import pack_table
from ckptd.protocol import messages as m
from ckptd.trainer import device
from ckptd.trainer.costs import Costs
from ckptd.trainer.memory import SnapshotMemory
from ckptd.trainer.state import AppState
from ckptd.trainer.window import Running, Window

log = logging.getLogger("ckptd.capture")

AUDITED_FIRST, AUDITED_EVERY = 3, 100
"""Windows whose sources are hashed at the boundary and compared with the copy: the first few, then one in so many."""

WAIT_SLICE_S = 0.5

DEVICES_S = 10.0
"""How long the end of a training waits for copies from devices; they take part of a second unless a device hangs."""

BOUNDARY_S = 0.002
"""Boundaries that follow each other faster are not all told: the daemon would fall behind and grant what has passed."""


class Capture:
    """See the module docstring. Implements the session's Handler."""

    def __init__(
        self,
        state: AppState,
        epoch: Epoch,
        rank: int,
        threads: int,
        options: Options,
        costs: Costs,
        durable: int = -1,
    ) -> None:
        """`costs`: the account to keep. `durable`: the step that was restored, if it is in the store already."""
        self._costs = costs
        self.session: Session | None = None
        self._state, self._epoch, self._rank, self._threads, self._options = state, epoch, rank, threads, options
        self._changed = threading.Condition()
        self._lock = self._changed
        self._grants: dict[int, m.Grant] = {}
        self._outcomes: dict[int, m.Captured | m.Missed] = {}
        self._survey: int | None = None
        self._boundary: m.Boundary | None = None
        self._told_at = 0.0
        self._passed = -1
        self._requested: int | None = None
        self._granted_last = 0
        self._capturing: set[int] = set()
        self._standing: list[m.Message] = []
        self._sealed = self._protected = -1
        self._durable = durable
        self._answers: list[m.Message] = []
        self._failed_flush: tuple[int, str] | None = None
        self._refused: CkptdError | None = None
        self._window: Window | None = None
        self._closed_windows: list[Window] = []
        self._windows = 0
        self._writers = device.Writers()
        self.memory = SnapshotMemory(state, rank, threads, self._say, self._cannot)

    def start(self, session: Session) -> None:
        """The session through which to speak; called once, before anything else."""
        self.session = session

    # --- the training thread

    def boundary(self, step: int, updated: bool) -> None:
        """`step` steps are complete. `updated`: an optimizer has stepped since the last boundary."""
        self.close_window()
        with self._costs.boundary(step):
            self._at_boundary(step, updated)

    def _at_boundary(self, step: int, updated: bool) -> None:
        self.memory.release([window.capture.slot for window in self._closed_windows])
        with self._lock:
            if self._refused is not None:
                raise self._refused
            self._boundary = self._costs.boundary_message(step)
        now = time.monotonic()
        if now - self._told_at >= BOUNDARY_S:
            self._told_at = now
            self._say(self._boundary)
        if not updated:
            return
        try:
            self._answer_survey()
        except CkptdError as error:
            if self._sealed < 0:
                raise
            log.error("step %d is not captured: %s", step, error)
        grant = self._due(step)
        if grant is not None:
            self._capture(grant, step)

    def snapshot(self, step: int, deadline_s: float) -> None:
        """Captures `step`, at whose boundary every rank stands; returns when it is sealed. Raises DeadlineError."""
        until = time.monotonic() + deadline_s
        self.close_window()
        with self._lock:
            if self._sealed >= step:
                return
            self._requested = step
        try:
            self._say(m.Request(step))
            while True:
                self._answer_survey()
                grant = self._due(step)
                if grant is not None:
                    self._capture(grant, step)
                    self.close_window()
                with self._lock:
                    if self._refused is not None:
                        raise self._refused
                    if self._sealed >= step:
                        return
                    if not self._changed.wait_for(lambda: self._wakes(step), WAIT_SLICE_S):
                        self._check_deadline(until, f"the snapshot of step {step} was not sealed")
        finally:
            with self._lock:
                self._requested = None

    def close_window(self) -> None:
        """Before any write that a copy must not see: nothing is being copied by this process when it returns, and what
        is queued on the current streams of devices from now on comes after their copies."""
        streams = self._writers.note()
        if self._window is not None:
            with self._costs.before_update(self._window.capture.snapshot.step):
                self._window.finish(self._options.max_stall_s, streams)  # its copies come after those of all before it
            self._closed_windows.append(self._window)
            self._window = None
        else:
            for window in self._closed_windows:  # another stream than the first one may write now
                window.finish(self._options.max_stall_s, streams)
        self._closed_windows = [window for window in self._closed_windows if not self._is_over(window)]

    def _is_over(self, window: Window) -> bool:
        """Whether nobody needs the window any more."""
        over = window.ended()
        if over and window.written:
            self.memory.written_in_window(window.written)
        return over

    def wait(self, level: Level, step: int, until: float | None) -> Level:
        """Until a snapshot of `step` or later has reached `level`, or the monotonic time `until`. Raises StoreError,
        DeadlineError, and what the daemon refused."""
        with self._lock:
            while True:
                found = self._level(step)
                if found is not None and found >= level:
                    return found
                if self._refused is not None:
                    raise self._refused
                if self._failed_flush is not None and level is Level.DURABLE and self._failed_flush[0] >= step:
                    raise StoreError(self._failed_flush[1])
                if until is not None:
                    self._check_deadline(until, f"step {step} did not reach level {level}")
                self._changed.wait(WAIT_SLICE_S)

    def level(self, step: int) -> Level | None:
        """The level of the safest snapshot of `step` or a later one, if there is any."""
        with self._lock:
            return self._level(step)

    @property
    def sealed(self) -> int:
        """The newest sealed step of this epoch, -1 if none."""
        return self._sealed

    def ask(self, message: m.Message, answers: tuple[type[m.Message], ...], timeout_s: float | None) -> m.Message:
        """Says `message`, again after reconnections, until an answer of one of the types comes. Raises StoreError for a
        Refuse, DeadlineError."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            stale = [a for a in self._answers if isinstance(a, (*answers, m.Refuse))] if not self._standing else []
            self._answers = [answer for answer in self._answers if answer not in stale]
            self._standing.append(message)
            self._failed_flush = None
        self._say(message)
        try:
            with self._lock:
                while True:
                    for answer in self._answers:
                        if isinstance(answer, (*answers, m.Refuse)):
                            self._answers.remove(answer)
                            if isinstance(answer, m.Refuse):
                                raise refusal(answer)
                            return answer
                    if until is not None:
                        self._check_deadline(until, f"no answer to {type(message).__name__}")
                    self._changed.wait(WAIT_SLICE_S)
        finally:
            with self._lock:
                self._standing.remove(message)

    def close(self, message: m.Message, timeout_s: float) -> None:
        """Says the last word, waits until it is heard, and lets go of the slots."""
        self.close_window()
        over = all(window.ended(DEVICES_S) for window in self._closed_windows)
        if self.session is not None:
            if isinstance(message, m.Close):
                try:
                    self.ask(message, (m.Closed,), timeout_s)
                except (DeadlineError, DaemonError) as error:
                    log.warning("closing the job: %s", error)
            else:
                self._say(message)
            self.session.end()
        if over:
            self.memory.close()
            device.close()
        else:
            log.error("devices do not end their copies: the memory that they write to is kept until this process ends")

    def _check_deadline(self, until: float, what: str) -> None:
        if time.monotonic() >= until:
            raise DeadlineError(f"{what} in time; `ckptd status` shows the daemon's view")

    def _say(self, message: m.Message, descriptors: list[int] | None = None) -> None:
        assert self.session is not None
        self.session.say(message, descriptors)

    def _wakes(self, step: int) -> bool:
        """Something has come that the training thread must act on while it waits in `snapshot`."""
        return bool(self._unused(step)) or self._survey is not None or self._sealed >= step or self._refused is not None

    def _level(self, step: int) -> Level | None:
        if step <= self._durable:
            return Level.DURABLE
        if step <= self._protected:
            return Level.PROTECTED
        if step <= self._sealed:
            return Level.SEALED
        captured = any(isinstance(x, m.Captured) and x.step >= step for x in self._outcomes.values())
        return Level.CAPTURED if captured else None

    def _answer_survey(self) -> None:
        """Tells the daemon what the state consists of."""
        with self._lock:
            generation, self._survey = self._survey, None
        if generation is None:
            return
        try:
            self.memory.survey(generation)
        except BaseException:
            with self._lock:
                self._survey = generation if self._survey is None else self._survey
            raise

    def _cannot(self, error: CkptdError) -> None:
        """No slots for the state. At the start that is an error of the job; later, training goes on without snapshots
        rather than end by a fault of ours."""
        with self._lock:
            if self._sealed < 0:
                self._refused = error
                self._changed.notify_all()
        if self._refused is not error:
            log.error("no more snapshots are taken: %s", error)

    # --- capture

    def _due(self, step: int) -> m.Grant | None:
        """The grant to use at the boundary of `step`. Older ones have been overtaken."""
        with self._lock:
            self._passed = max(self._passed, step)
            due = self._unused(step)
            for grant in due[:-1]:
                self._settle(m.Missed(grant, "revoked"))
            self._capturing.update(due[-1:])
            return self._grants[due[-1]] if due else None

    def _unused(self, step: int) -> list[int]:
        """Grants for steps up to `step` that are neither settled nor in use."""
        used = self._capturing.union(self._outcomes)
        return sorted(number for number, grant in self._grants.items() if grant.step <= step and number not in used)

    def _settle(self, outcome: m.Captured | m.Missed) -> None:
        """The one outcome of a grant; said, remembered, counted."""
        with self._lock:
            if outcome.grant in self._outcomes:
                return
            self._outcomes[outcome.grant] = outcome
            self._capturing.discard(outcome.grant)
            self._costs.settled(outcome)
            self._changed.notify_all()
        self._say(outcome)

    def _capture(self, grant: m.Grant, step: int) -> None:
        with self._costs.capturing(step):
            self._begin(grant, step)

    def _begin(self, grant: m.Grant, step: int) -> None:
        """Copies what is copied eagerly, and opens the window for the rest."""
        try:
            jobs = self.memory.jobs(audit=grant.compare)
            objects = pack_table(self._state.objects())
            slot = self.memory.slot(grant.slot)
            if slot is None or jobs is None or len(objects) > slot.geometry.objects_bytes:
                self._settle(m.Missed(grant.grant, "layout"))
                return
            slot.begin()
            replicas = self.memory.compare(jobs, step) if grant.compare else {}
            snapshot = SnapshotId(self._epoch, step)
            capture = Running(self._settle, snapshot, slot, jobs, grant, objects, replicas)
            lazy = jobs.lazy(self._options.capture)
            lazy_bytes = int(jobs.catalog.raw[lazy].sum())
            if len(lazy):
                self._costs.lazily(grant.grant, lazy_bytes)
            before = self._closed_windows[-1] if self._closed_windows else None
            window = Window(capture, lazy, bool(len(lazy)) and self._audits(), self._threads, before)
            if window.begin(self._writers):
                self._window = window
            self._costs.copied(int(jobs.catalog.raw[jobs.rows].sum()) - lazy_bytes)
        except Exception:  # whatever it is, training goes on
            log.exception("step %d is not captured", step)
            self._settle(m.Missed(grant.grant, "failed"))

    def _audits(self) -> bool:
        self._windows += 1
        return self._options.audit or self._windows <= AUDITED_FIRST or self._windows % AUDITED_EVERY == 0

    # --- the session's thread

    def received(self, message: m.Message, descriptors: list[int]) -> None:
        """A message of the daemon."""
        match message:
            case m.Plan():
                try:
                    self.memory.plan(message.generation, descriptors)
                except CkptdError as error:
                    self._cannot(error)
                finally:
                    _close_all(descriptors)
            case m.Allot():
                self.memory.allot(message, descriptors)
            case m.Grant():
                self._granted(message)
            case m.Revoke():
                self._revoked(message.grant)
            case _:
                _close_all(descriptors)
                with self._lock:
                    self._noted(message)
                    self._changed.notify_all()

    def repeat(self) -> list[m.Message]:
        """What the daemon may not have heard."""
        with self._lock:
            said: list[m.Message] = [*self._outcomes.values()]
            if self._boundary is not None:
                said.insert(0, self._boundary)
            if self._requested is not None:
                said.append(m.Request(self._requested))
            return [*said, *self._standing]

    @property
    def granted(self) -> int:
        """The newest grant heard of."""
        return self._granted_last

    def _granted(self, message: m.Grant) -> None:
        with self._lock:
            known = self._outcomes.get(message.grant)
            if message.grant in self._capturing:
                return  # its outcome will be said
            self._grants[message.grant] = message
            self._granted_last = max(self._granted_last, message.grant)
            late = message.step <= self._passed and message.step != self._requested
            self._changed.notify_all()
        if known is not None:
            self._say(known)
        elif late:
            self._settle(m.Missed(message.grant, "late"))

    def _revoked(self, grant: int) -> None:
        """The daemon takes a grant back. What is being copied under it goes on, and is settled when it ends."""
        if grant in self._capturing:
            return
        known = self._outcomes.get(grant)
        if known is not None:
            self._say(known)
        else:
            self._settle(m.Missed(grant, "revoked"))

    def _noted(self, message: m.Message) -> None:
        match message:
            case m.Survey():
                self._survey = message.generation
            case m.Reached():
                self._reached(message)
            case m.FlushFailed():
                self._failed_flush = (message.step, message.message)
                log.error("step %d could not be made durable: %s", message.step, message.message)
            case m.Welcome():
                self.memory.welcomed(message.slots, message.pending)
            case m.Refuse(error="ConfigError") if not self._standing:
                self._cannot(refusal(message))
            case m.Refuse(error="StoreError") if not self._standing:
                pass  # a flush that nobody waits for any more; FlushFailed has told of it
            case m.Refuse() if not self._standing:
                self._refused = self._refused or refusal(message)  # what is refused after it is a consequence
            case _:
                self._answers.append(message)

    def _reached(self, message: m.Reached) -> None:
        known = {Level.DURABLE: self._durable, Level.PROTECTED: self._protected}.get(message.level, self._sealed)
        if message.step > known:
            self._costs.reached(message.level, message.step)
        newest = max(known, message.step)
        if message.level is Level.DURABLE:
            self._durable, self._failed_flush = newest, None
        elif message.level is Level.PROTECTED:
            self._protected = newest
        else:
            self._sealed = newest
            self._forget(message.grant)

    def _forget(self, sealed: int) -> None:
        """Outcomes of grants up to one that is sealed are superseded."""
        for grant in [g for g in self._outcomes if g <= sealed]:
            del self._outcomes[grant]
            self._grants.pop(grant, None)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
