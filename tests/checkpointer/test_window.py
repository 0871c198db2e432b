"""The lazy window: what optimizers alone may write is copied after the boundary, while the next forward and backward
run, and the next write waits for it. A write that nobody announced is found, or its snapshot is not taken."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ckptd
from ckptd.daemon.client import Control
from ckptd.trainer import capture as capturing
from ckptd.trainer.copying import CopyJobs, Rows
from tests.checkpointer.home import Home
from tests.checkpointer.training import UNTIL_S, Training, until, weights_after


class Gate:
    """Holds the window's thread before it copies, so that a test can do something meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        original = CopyJobs.copy

        def copy(jobs: CopyJobs, rows: Rows, target: int, crcs: Any, threads: int) -> None:
            if threading.current_thread().name == "ckptd-window":
                self.entered.set()
                assert self.opened.wait(UNTIL_S)
            original(jobs, rows, target, crcs, threads)

        monkeypatch.setattr(CopyJobs, "copy", copy)

    def is_held(self, checkpointer: ckptd.Checkpointer) -> bool:
        """Whether a window is open; then its thread stands at the gate."""
        assert checkpointer._capture is not None
        return checkpointer._capture._window is not None and self.entered.wait(UNTIL_S)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


def lazily(home: Home, training: Training, **options: Any) -> ckptd.Checkpointer:
    options = {"capture": "lazy", "max_stall_s": UNTIL_S, "flush_every": None, "snapshot_every": 1, **options}
    return ckptd.Checkpointer(training.state, home.store(), **options)


def until_held(checkpointer: ckptd.Checkpointer, training: Training, gate: Gate) -> int:
    """Trains until a window is open, its copy held at the gate; the step whose body has just begun."""
    for step in checkpointer.steps():
        if gate.is_held(checkpointer):
            return step
        training.step()
    raise AssertionError


def stored(home: Home, step: int, training: Training) -> Training:
    """The training as the newest sealed snapshot has it, which must be of `step`."""
    control = Control.connect()
    assert control.flush() == step
    control.close()
    assert ckptd.load(training.state, home.store()) == step
    return training


def test_the_next_optimizer_step_waits_for_the_copy(home: Home, gate: Gate) -> None:
    """The copy has not even begun when the optimizer wants to write: it writes afterwards, and only afterwards."""
    training = Training()
    seen: list[bool] = []
    with lazily(home, training) as checkpointer:
        step = until_held(checkpointer, training, gate)
        before = training.weights

        def release() -> None:
            seen.append(training.weights == before)
            gate.opened.set()

        training.forward()
        seen.append(training.weights == before)
        timer = threading.Timer(0.1, release)
        timer.start()
        training.update()
        timer.join()
        assert training.weights != before
        until(lambda: checkpointer.level(step - 1) == "sealed")
        found = stored(home, step - 1, Training()).weights
        checkpointer.step()
    assert seen == [True, True]
    assert found == before
    assert checkpointer.statistics()["stall_s_total"] >= 0.1


def in_place(training: Training) -> None:
    with torch.no_grad():
        training.model.weight.add_(1.0)


def behind_the_back(training: Training) -> None:
    training.model.weight.data.add_(1.0)


def at_the_end(training: Training) -> None:
    training.model.weight.data[-1, -1] += 1.0


def by_swapping(training: Training) -> None:
    training.model.weight.data = training.model.weight.data + 1.0


def of_optimizer_state(training: Training) -> None:
    training.optimizer.state[training.model.weight]["momentum_buffer"].zero_()


def name_of(write: Callable[[Training], None]) -> str:
    """The key of the tensor that it writes to."""
    return "optimizer/state/weight/momentum_buffer" if write is of_optimizer_state else "model/weight"


@pytest.mark.parametrize(
    ("write", "audit"),
    [(in_place, False), (of_optimizer_state, False), (behind_the_back, False), (at_the_end, True)],
)
def test_a_write_that_nobody_announced_is_found(
    home: Home,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    write: Callable[[Training], None],
    audit: bool,
) -> None:
    """In-place operations by the version of the tensor; writes through `.data` by the first bytes of what they change,
    or by the audit. The snapshot is not taken, that is counted and logged, and the next one is sound."""
    monkeypatch.setattr(capturing, "AUDITED_FIRST", 0)
    training = Training()
    with lazily(home, training, audit=audit) as checkpointer:
        step = until_held(checkpointer, training, gate)
        training.forward()
        with caplog.at_level(logging.ERROR, "ckptd"):
            write(training)
            gate.opened.set()
            training.update()
        assert checkpointer.level(step - 1) is None
        assert checkpointer.statistics()["skip_reasons"]["mutated"] == 1
        assert f"step {step - 1} is not captured: {name_of(write)} changed" in caplog.text
        assert "before_update()" in caplog.text
        assert checkpointer.step() == step
        assert checkpointer.snapshot() == step
        assert stored(home, step, Training()).weights == training.weights


def test_a_tensor_that_is_written_in_the_window_is_copied_before_it(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are changed in each forward pass, unannounced: after the first miss, no snapshot is missed."""
    gate = Gate(monkeypatch)
    training = Training()
    with lazily(home, training) as checkpointer:
        until_held(checkpointer, training, gate)
        in_place(training)
        gate.opened.set()
        checkpointer.before_update()
        assert checkpointer.statistics()["skip_reasons"] == {**checkpointer.statistics()["skip_reasons"], "mutated": 1}
        checkpointer.step()
        for _ in checkpointer.steps():
            in_place(training)
            training.step()
            if checkpointer.statistics()["snapshots_sealed"] >= 4:
                break
        assert checkpointer.statistics()["skip_reasons"]["mutated"] == 1
        last = checkpointer.flush()
    again = Training()
    assert ckptd.load(again.state, home.store()) == last
    assert again.weights == training.weights


def test_a_tensor_that_is_replaced_in_the_window_is_no_harm(home: Home, gate: Gate) -> None:
    """The copy holds the storage that was there at the boundary, and nobody writes to that any more."""
    training = Training()
    with lazily(home, training, audit=True) as checkpointer:
        step = until_held(checkpointer, training, gate)
        before = training.weights
        by_swapping(training)
        gate.opened.set()
        training.step()
        until(lambda: checkpointer.level(step - 1) == "sealed")
        assert stored(home, step - 1, Training()).weights == before
        checkpointer.step()
        assert checkpointer.snapshot() == step
        assert stored(home, step, Training()).weights == training.weights


@pytest.mark.parametrize("write", [in_place, behind_the_back, by_swapping, of_optimizer_state])
def test_a_write_that_is_announced_waits(
    home: Home, gate: Gate, monkeypatch: pytest.MonkeyPatch, write: Callable[[Training], None]
) -> None:
    """`before_update` returns when the copy is complete; what is written afterwards is not in the snapshot."""
    monkeypatch.setattr(capturing, "AUDITED_FIRST", 0)
    training = Training()
    with lazily(home, training) as checkpointer:
        step = until_held(checkpointer, training, gate)
        before = training.weights
        threading.Timer(0.05, gate.opened.set).start()
        checkpointer.before_update()
        write(training)
        until(lambda: checkpointer.level(step - 1) == "sealed")
        assert stored(home, step - 1, Training()).weights == before
        checkpointer.step()
        assert checkpointer.snapshot() == step
        assert stored(home, step, Training()).weights == training.weights


def test_only_what_optimizers_write_is_copied_late(home: Home, gate: Gate) -> None:
    """Buffers, averages, counters and frozen weights may change in the window: they were copied at the boundary."""
    frozen = nn.Linear(2, 2).requires_grad_(False)
    norm = nn.BatchNorm1d(4)
    average, counts = torch.zeros(3), {"seen": torch.zeros(1), "batches": 0}

    def made() -> Training:
        return Training(norm=norm, average=average, counts=counts, frozen=frozen)

    training = made()
    with lazily(home, training, audit=True) as checkpointer:
        for step in checkpointer.steps():
            if gate.is_held(checkpointer):
                break
            training.step()
            for tensor in (average, counts["seen"], frozen.weight):
                tensor.copy_(torch.full_like(tensor, float(step)))
            counts["batches"] = step
            norm(torch.full((3, 4), float(step)))
        mean = norm.running_mean.clone()
        norm(torch.ones(3, 4))
        average += 100
        counts["seen"] += 100
        counts["batches"] = -1
        frozen.weight.mul_(2)
        gate.opened.set()
        checkpointer.before_update()
        until(lambda: checkpointer.level(step - 1) == "sealed")
        control = Control.connect()
        control.flush()
        control.close()
        checkpointer.step()
    last = float(step - 1)
    stored_step = home.checkpoints()[0]
    assert stored_step == step - 1
    folder = next((home.folder / "store").glob(f"step-*{stored_step}.*"))
    found = ckptd.open(folder)
    assert found.read("average").tolist() == [last] * 3
    assert found.read("counts/seen").tolist() == [last]
    assert found.read("frozen/weight").tolist() == [[last] * 2] * 2
    assert torch.equal(found.read("norm/running_mean"), mean)


def test_a_copy_that_takes_too_long_is_given_up(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer waits `max_stall_s`, no longer; the snapshot is skipped, that is counted, and the next works."""
    training = Training()
    original, slow = CopyJobs.slices, True

    def slices(jobs: CopyJobs, rows: Rows, most_bytes: int) -> Iterator[Rows]:
        for part in (rows[:1], rows[1:]):
            yield part
            if slow:
                until(lambda: checkpointer._capture._window is not None)
                assert checkpointer._capture._window._given_up.wait(UNTIL_S)

    monkeypatch.setattr(CopyJobs, "slices", slices)
    with lazily(home, training, max_stall_s=0.05) as checkpointer:
        for _ in checkpointer.steps():
            training.step()
            if checkpointer.statistics()["skip_reasons"].get("stall"):
                break
        slow = False
        monkeypatch.setattr(CopyJobs, "slices", original)
        last = checkpointer.flush()
    assert home.checkpoints() == [last]
    assert checkpointer.statistics()["snapshots_sealed"] == 1
    assert training.weights == weights_after(last)


def test_the_next_boundary_closes_the_window(home: Home, gate: Gate) -> None:
    """A step without an update: the copy of the one before is complete before the next boundary is."""
    training = Training()
    with lazily(home, training) as checkpointer:
        step = until_held(checkpointer, training, gate)
        threading.Timer(0.05, gate.opened.set).start()
        checkpointer.step()
        assert checkpointer.level(step - 1) is not None
        until(lambda: checkpointer.level(step - 1) == "sealed")
        assert stored(home, step - 1, Training()).weights == weights_after(step - 1)


def test_an_error_in_the_window_ends_it(home: Home, gate: Gate) -> None:
    """Training fails while the copy runs: the error comes out, the copy ends, the memory is let go."""
    training = Training()

    def fail() -> None:
        with lazily(home, training) as checkpointer:
            for _ in checkpointer.steps():
                if gate.is_held(checkpointer):
                    threading.Timer(0.05, gate.opened.set).start()
                    raise RuntimeError("out of memory")
                training.step()

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert not [thread for thread in threading.enumerate() if thread.name == "ckptd-window"]
    home.stop()


def test_a_request_finds_the_window_open(home: Home, gate: Gate) -> None:
    """`snapshot` right after the boundary, whose own capture is still under way: one snapshot, sound."""
    training = Training()
    with lazily(home, training) as checkpointer:
        step = until_held(checkpointer, training, gate)
        threading.Timer(0.05, gate.opened.set).start()
        assert checkpointer.snapshot() == step - 1
        assert stored(home, step - 1, Training()).weights == weights_after(step - 1)


def test_a_step_that_raises_has_closed_the_window(home: Home, gate: Gate) -> None:
    """The pre-hook runs before an optimizer's own checks: what it raises finds no copy under way."""
    training = Training()
    with lazily(home, training) as checkpointer:
        until_held(checkpointer, training, gate)
        training.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        threading.Timer(0.05, gate.opened.set).start()
        with pytest.raises(ZeroDivisionError):
            training.step()
        assert not [thread for thread in threading.enumerate() if thread.name == "ckptd-window"]
