"""The Checkpointer: ckptd wrapped around a training loop.

Owns the life of a job's epoch in this process: start and restore, the boundaries of steps, and the four ways out
(clean end, exception, SIGTERM, death). What happens at a boundary is in capture.py, how an epoch starts in start.py.
"""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from types import TracebackType
from typing import Any

import msgspec
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptd.core.config import Options, World
from ckptd.core.errors import ConfigError, FormatError, UnrecoverableError
from ckptd.core.types import Job, Level, SnapshotId
from ckptd.daemon.address import Address, address_of
from ckptd.daemon.session import Session
from ckptd.observe.trace import Trace
from ckptd.protocol import messages as m
from ckptd.tiers.arena import SnapshotReader
from ckptd.tiers.store import Store, StoredCheckpoint, location
from ckptd.trainer import collective, start
from ckptd.trainer.capture import Capture
from ckptd.trainer.costs import Costs, Statistics
from ckptd.trainer.node_memory import NodeMemory, open_memory
from ckptd.trainer.places import Places
from ckptd.trainer.restoring import restore_state
from ckptd.trainer.signals import Terminator
from ckptd.trainer.state import AppState
from ckptd.trainer.state_tensors import Source

log = logging.getLogger("ckptd")

SEAL_S = 600.0
"""How long a snapshot that every rank waits for may take."""

CLOSE_S = 60.0


class Checkpointer:
    """Asynchronous snapshots of a training state, restored after any failure.

    `state` maps names to modules, optimizers, anything with `state_dict`/`load_state_dict`, tensors, or plain data.
    `store` is a path or URI for durable checkpoints; None keeps snapshots in memory only. Options (see docs and
    `ckptd.core.config.Options`) may also be given as CKPTD_<NAME> in the environment.

    Use as a context manager; every rank makes one with the same arguments. Raises ConfigError for options, a state or
    an environment that cannot work, before anything is written.
    """

    def __init__(
        self, state: MutableMapping[str, Any], store: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        self._options = Options.resolve(options)
        self._state = AppState(state)
        self._world = World.from_environment()
        self._store = None if store is None else location.parse(store).uri
        self._address: Address = address_of(Job(_job_name(self._options.job, self._store)))
        self._group: collective.Group | None = None
        self._places: Places | None = None
        self._capture: Capture | None = None
        self._session: Session | None = None
        self._terminator: Terminator | None = None
        self._unhook: Callable[[], None] | None = None
        self._restored: dict[str, Any] | None = None
        self._costs: Costs | None = None
        self._step = 0
        self._open: int | None = None
        self._left = False
        self._updates = 0
        self._updates_seen = 0
        self._always_updated = False

    # --- the context

    def __enter__(self) -> Checkpointer:
        self._group = collective.world()
        self._places = Places.find(self._group, self._world, self._options.redundancy)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._capture is None:
            return
        try:
            if kind is None:
                self._finish()
            else:
                self._capture.close(m.Leave(), CLOSE_S)
        except BaseException:
            self._capture.close(m.Leave(), CLOSE_S)
            raise
        finally:
            self._let_go()

    def _finish(self) -> None:
        """A clean end: the last step durable, the job closed."""
        self._left = True
        self._count_left_body()
        if self._store is not None and self._step > 0:
            self.flush()
        self._running.close(m.Close(), CLOSE_S)

    def _let_go(self) -> None:
        if self._unhook is not None:
            self._unhook()
        if self._terminator is not None:
            self._terminator.end()
        if self._costs is not None:
            self._costs.trace.close()
        self._capture = None

    # --- restoring

    def restore(self, step: int | None = None, before: int | None = None) -> int:
        """Starts the job's epoch and restores the newest snapshot: of exactly `step`, or of fewer steps than `before`.

        Once, before the first step; `steps` and `step` do it where it was not done. Collective. Returns the last
        completed step, 0 if there is nothing to restore. Raises NotFoundError where a step that must be there is not,
        MismatchError where it does not fit the state, UnrecoverableError where nothing readable is left.
        """
        if self._restored is not None:
            raise ConfigError("restore: the state is restored already; make a new Checkpointer to restore again")
        if self._group is None or self._places is None:
            raise ConfigError("restore: use the Checkpointer as a context manager (`with ckptd.Checkpointer(...)`)")
        self._group.together(self._check_state)
        options = self._options if step is None else dataclasses.replace(self._options, resume=step)

        def wanted(snapshot: SnapshotId) -> bool:
            exact = snapshot.step == options.resume or not isinstance(options.resume, int)
            return exact and (before is None or snapshot.step < before)

        started = time.perf_counter()
        excluded: list[tuple[SnapshotId, str]] = []
        while True:
            starting = start.Start(self._address, self._group, self._places, options, self._policy(), wanted, excluded)
            entry = starting.enter()
            choice = entry.choice
            try:
                age_s = self._load(entry)
                break
            except (FormatError, UnrecoverableError) as error:
                assert choice.snapshot is not None
                entry.connection.close()
                excluded.append((choice.snapshot, choice.source))
                if self._group.rank == 0:
                    log.error("%s in %s cannot be restored, trying the next: %s", choice.snapshot, choice.source, error)
        self._begin(entry, age_s, time.perf_counter() - started)
        return self._step

    def _check_state(self) -> bytes:
        """Reads the state as a capture will. What cannot be stored is an error now, not at the first boundary."""
        self._state.sources()
        self._state.objects()
        return b""

    def _load(self, entry: start.Entry) -> float | None:
        """Fills the state from what was chosen; its age in seconds. Raises the same error on every rank."""
        group, choice = self._grouped, entry.choice
        if choice.snapshot is None:
            return None
        opened: list[SnapshotReader | NodeMemory | StoredCheckpoint] = []

        def find() -> bytes:
            assert choice.snapshot is not None
            assert self._store is not None
            opened.append(Store.open(self._store).reader(choice.snapshot))
            return b""

        try:
            if choice.source == start.MEMORY:
                assert self._places is not None
                held = [slot.duplicate() for slot in entry.restore]
                opened.append(open_memory(choice.snapshot, group, self._places.node_of, held, choice.world))
            else:
                group.together(find)
            origin = opened[0]
            restore_state(self._state, group, origin, rng=True, what=f"{choice.snapshot} in {choice.source}")
            return None if isinstance(origin, StoredCheckpoint) else max(0.0, time.time() - origin.captured_at)
        finally:
            for origin in opened:
                origin.close()
            for slot in entry.restore:
                slot.close()

    def _begin(self, entry: start.Entry, age_s: float | None, took_s: float) -> None:
        """Everything is in place: the session starts, hooks are set."""
        choice = entry.choice
        self._step = 0 if choice.snapshot is None else choice.snapshot.step
        self._restored = {
            "step": self._step,
            "epoch": str(choice.epoch),
            "source": choice.source,
            "age_s": age_s,
            "took_s": took_s,
            "begin_s": entry.begin_s,
            "memory_s": entry.memory_s,
            "not_finite": [] if choice.snapshot is None else _not_finite(self._state.sources()),
        }
        if self._grouped.rank == 0:
            _announce(self._address.job, self._restored)
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, self._world.local_size))
        durable = self._step if choice.durable else -1
        rank = self._grouped.rank
        trace = Trace(f"rank-{rank}")
        trace.begin(self._options.trace)
        self._costs = Costs(trace)
        self._capture = Capture(self._state, choice.epoch, rank, threads, self._options, self._costs, durable)
        self._session = Session(self._address, entry.connection, entry.hello, self._capture)
        self._capture.start(self._session)
        self._always_updated = not self._state.optimizers()
        self._unhook = register_optimizer_step_pre_hook(self._before_optimizer).remove
        self._terminator = Terminator(self._drain, self._options.grace_s)
        atexit.register(self._let_go)

    def _policy(self) -> m.Policy:
        options = self._options
        timed = options.flush_every if isinstance(options.flush_every, datetime.timedelta) else None
        return m.Policy(
            store=self._store,
            snapshot_steps=None if options.snapshot_every == "auto" else int(options.snapshot_every),
            flush_steps=options.flush_every if isinstance(options.flush_every, int) else None,
            flush_s=None if timed is None else timed.total_seconds(),
            keep=options.keep,
            overhead_budget=options.overhead_budget,
            memory_bytes=None if options.memory == "auto" else int(options.memory),
            linger_s=options.linger_s,
            protection_bandwidth=options.protection_bandwidth,
            flush_bandwidth=options.flush_bandwidth,
            trace=options.trace,
        )

    # --- the loop

    def steps(self, stop: int | None = None) -> Iterator[int]:
        """Restores, then yields the steps to do: last completed + 1 to `stop` (for ever if None). The snapshot of a
        step is taken when the loop's body ends; after `break` or `return` too, if an optimizer stepped in the body."""
        if self._restored is None:
            self.restore()
        self._count_left_body()
        while stop is None or self._step < stop:
            self._open = number = self._step + 1
            try:
                yield number
            except GeneratorExit:
                self._left = True
                raise
            self._end_step(number)

    def _count_left_body(self) -> None:
        """Ends the step whose body was left by `break` or `return`, if an optimizer stepped in it. Not when the loop
        is left but at the next occasion: an exception leaves it in the same way, and then nothing counts."""
        if self._left and self._open is not None and self._updated:
            self._end_step(self._open)
        if self._left:
            self._open, self._left = None, False

    def step(self, n: int | None = None) -> int:
        """Ends a step in a loop that counts itself; `n` is the number of steps completed. Returns it.

        A loop should `restore` before its first step. Where it has not and there is something to restore, that is done
        now and what was trained before is lost: the step that is restored is returned, and none is counted."""
        if self._restored is None and self.restore() and n is None:
            log.warning("step %d is restored after training had begun: call restore() before the loop", self._step)
            return self._step
        self._end_step(self._step + 1 if n is None else n)
        return self._step

    def _end_step(self, step: int) -> None:
        if step <= self._step:
            raise ConfigError(
                f"step {step} ends after step {self._step}: steps only grow; begin with the step after restore()"
            )
        self._open, self._left = None, False
        self._step = step
        self._running.boundary(step, self._updated)
        self._updates_seen = self._updates

    @property
    def _updated(self) -> bool:
        """Whether the state has been updated since the last boundary."""
        return self._always_updated or self._updates != self._updates_seen

    def _before_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.before_update()

    def before_update(self) -> None:
        """Closes the copy window: call before writing to parameters or optimizer state other than by a torch
        optimizer's step (foreign optimizers, weight swaps, CUDA graph replay)."""
        self._updates += 1
        if self._capture is not None:
            self._capture.close_window()

    # --- on request

    def snapshot(self) -> int | None:
        """Captures the state at the last boundary now; every rank calls it. The step once it is sealed, None where the
        state has moved on since the boundary or nothing is done yet."""
        self._count_left_body()
        if self._capture is None or not self._at_boundary:
            return None
        self._capture.snapshot(self._step, SEAL_S)
        return self._step

    @property
    def _at_boundary(self) -> bool:
        """Whether the state is that of the last completed step."""
        return self._step > 0 and (self._always_updated or not self._updated)

    def flush(self) -> int:
        """Makes the last completed step durable; every rank calls it. Returns the step. Raises StoreError (memory keeps
        the snapshot), ConfigError without a store. Where the state has moved on since the last boundary, it is the
        newest sealed step."""
        if self._store is None:
            raise ConfigError("flush: this job has no store; give the Checkpointer one, or `ckptd flush --to PATH`")
        self._count_left_body()
        running, step = self._running, self._step
        if not self._at_boundary and running.level(step) is None:
            step = running.sealed
            log.warning("flush: the state has moved on from step %d, which was not captured", self._step)
        if step < 1:
            raise ConfigError("flush: no step is captured, and the state is not that of a completed step")
        self.wait(Level.DURABLE, step)
        return step

    def wait(
        self, level: str | Level = Level.DURABLE, step: int | None = None, timeout_s: float | None = None
    ) -> Level:
        """Until a snapshot of `step` (the last completed one if None) or a later step has reached `level`; every rank
        calls it. Captures and flushes what is not. Raises DeadlineError, StoreError, and ConfigError at once where the
        level cannot be reached."""
        self._count_left_body()
        running, wanted, target = self._running, _level(level), self._step if step is None else step
        self._check_reachable(wanted, target)
        until = None if timeout_s is None else time.monotonic() + timeout_s
        in_memory = min(wanted, Level.SEALED)
        found = running.level(target)
        if self._at_boundary and (found is None or found < in_memory):
            running.snapshot(self._step, SEAL_S if until is None else until - time.monotonic())
        elif found is None:
            raise ConfigError(
                f"wait: step {target} was not captured, and the state has moved on; wait at a boundary, or call "
                "snapshot() there"
            )
        running.wait(in_memory, target, until)
        if wanted is Level.DURABLE and running.level(target) is not Level.DURABLE:
            running.ask(m.Flush(), (m.Flushed,), None if until is None else until - time.monotonic())
        return running.wait(wanted, target, until)

    def _check_reachable(self, wanted: Level, step: int) -> None:
        if wanted is Level.PROTECTED:
            raise ConfigError("wait: level 'protected' needs several nodes; this job runs on one")
        if wanted is Level.DURABLE and self._store is None:
            raise ConfigError("wait: level 'durable' needs a store; this job has none")
        if not 1 <= step <= self._step:
            raise ConfigError(f"wait: step {step} is not completed; the last completed one is {self._step}")

    def level(self, step: int) -> Level | None:
        """How safe the work up to `step` is: the level of the safest snapshot of that step or a later one; None if no
        such snapshot was taken."""
        return self._running.level(step)

    def statistics(self) -> dict[str, Any]:
        """What the loop paid and got since it was restored; also after its end: `ckptd.trainer.costs.Statistics`, with
        what was `restored`, and how often the daemon's connection was lost."""
        counted = Statistics() if self._costs is None else self._costs.statistics()
        lost = 0 if self._session is None else self._session.lost
        return {"restored": self._restored, **msgspec.structs.asdict(counted), "daemon_connections_lost": lost}

    def _drain(self, grace_s: float) -> None:
        """SIGTERM (on a thread of its own): the newest sealed snapshot becomes durable, if time allows."""
        if self._capture is not None:
            self._capture.ask(m.Terminating(), (m.Drained,), grace_s)

    @property
    def _running(self) -> Capture:
        if self._capture is None:
            raise ConfigError("the Checkpointer is not running: use it as a context manager, and restore first")
        return self._capture

    @property
    def _grouped(self) -> collective.Group:
        assert self._group is not None
        return self._group


def _level(level: str | Level) -> Level:
    try:
        return Level(level)
    except ValueError:
        raise ConfigError(f"level {level!r}: expected one of {', '.join(known.value for known in Level)}") from None


def _not_finite(sources: Sequence[Source]) -> list[str]:
    """Keys of tensors with NaN or Inf among their elements: they are restored as they are, but not in silence."""
    floating = [s for s in sources if s.tensor.is_floating_point() or s.tensor.is_complex()]
    return [s.key for s in floating if not _is_finite(s.tensor)]


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are. Where their sum is, they are: that is ten times faster than looking at each."""
    wide = torch.complex64 if tensor.is_complex() else torch.float32
    if math.isfinite(abs(tensor.sum(dtype=max(tensor.dtype, wide, key=lambda dtype: dtype.itemsize)).item())):
        return True
    return bool(torch.isfinite(tensor.to(wide) if tensor.element_size() == 1 else tensor).all())


def _announce(job: Job, restored: dict[str, Any]) -> None:
    """One line, so that everybody sees what a run went on from."""
    if restored["source"] == start.NOTHING:
        text = f"ckptd: job {job.name} starts from nothing (epoch {restored['epoch']})"
    else:
        age = "" if restored["age_s"] is None else f", {restored['age_s']:.1f} s old"
        text = (
            f"ckptd: job {job.name} restored step {restored['step']} from {restored['source']}{age} "
            f"(epoch {restored['epoch']})"
        )
    if restored["not_finite"]:
        keys = restored["not_finite"]
        text += f"\nckptd: the restored state has NaN or Inf in {len(keys)} tensors: {', '.join(keys[:10])}"
    print(text, file=sys.stderr, flush=True)


def _job_name(given: str | None, store: str | None) -> str:
    """What a restart is recognised by: a name, else the store, else user and command line."""
    if given is not None:
        return given
    if store is not None:
        return store
    return ":".join([str(os.getuid()), os.path.abspath(sys.argv[0] if sys.argv else ""), *sys.argv[1:]])
