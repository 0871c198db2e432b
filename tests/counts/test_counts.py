"""What a snapshot takes, in counts that are the same on every machine: bytes, native calls, descriptors, memory.

None of them may depend on how many tensors the state is made of, nor grow with the number of snapshots. Speed is not
measured here (docs/benchmarks.md), but it is lost first where one of these counts changes.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from torch import nn

import ckptd
from ckptd.trainer import copying
from tests.checkpointer.home import Home
from tests.checkpointer.training import until

FEW, MANY = 10, 2000
ELEMENTS = 24_000
"""Of all parameters together; with their momentum twice as many."""

STATE_BYTES = 2 * 4 * ELEMENTS
WARM, MORE = 5, 50
KIND = ["eager", "lazy"]


class Call(NamedTuple):
    """One call of the native copy."""

    sources: tuple[int, ...]
    copied: int
    read: int


class Calls(list[Call]):
    """All that a rank asks of the native copy: bytes that are copied, and bytes that are only checksummed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = copying.copy_boxes

        def counted(sources: Any, targets: Any, sizes: Any, strides: Any, packed: Any, items: Any, **more: Any) -> None:
            raw = np.prod(sizes, axis=1, dtype=np.int64) * items
            copied = targets != 0
            self.append(Call(tuple(sources[copied].tolist()), int(raw[copied].sum()), int(raw[~copied].sum())))
            original(sources, targets, sizes, strides, packed, items, **more)

        monkeypatch.setattr(copying, "copy_boxes", counted)

    def take(self) -> list[Call]:
        found = list(self)
        self.clear()
        return found


class Loop:
    """A training whose state is made of a number of tensors, that captures each step."""

    def __init__(self, home: Home, tensors: int, **options: Any) -> None:
        torch.manual_seed(0)
        self.home = home
        self.model = nn.ParameterList([torch.randn(ELEMENTS // tensors) for _ in range(tensors)])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, foreach=True)
        state = {"model": self.model, "optimizer": self.optimizer}
        self.checkpointer = ckptd.Checkpointer(state, snapshot_every=10**6, max_stall_s=30.0, job="counts", **options)

    def steps(self, number: int) -> Iterator[int]:
        """Trains and captures, so many times; between two of them the caller may look."""
        for step in range(number):
            for parameter in self.model:
                parameter.grad = torch.ones_like(parameter)
            self.optimizer.step()
            self.checkpointer.step()
            self.checkpointer.snapshot()
            yield step

    def descriptors(self) -> tuple[int, int, int, int]:
        """Of this process and the daemon: all, and those of shared memory."""
        return *open_here(os.getpid()), *open_here(self.home.daemon().pid)

    def settled_descriptors(self) -> tuple[int, int, int, int]:
        """Once nothing is under way any more."""
        seen = [self.descriptors()]

        def same() -> bool:
            seen.append(self.descriptors())
            return len(seen) > 5 and len(set(seen[-5:])) == 1

        until(same)
        return seen[-1]


def open_here(process: int) -> tuple[int, int]:
    """Descriptors of a process: all, and those of shared memory."""
    links = []
    for name in os.listdir(f"/proc/{process}/fd"):
        try:
            links.append(os.readlink(f"/proc/{process}/fd/{name}"))
        except FileNotFoundError:  # the one that lists
            continue
    return len(links), sum(link.startswith("/memfd:ckptd") for link in links)


def run(loop: Loop, number: int) -> None:
    for _ in loop.steps(number):
        pass


@pytest.mark.parametrize("capture", KIND)
def test_each_byte_is_copied_once_in_as_many_calls_as_for_ten_tensors(
    home: Home, monkeypatch: pytest.MonkeyPatch, capture: str
) -> None:
    """The bytes of the state, each from its own place, and nothing else; by calls whose number the tensors do not set.
    Lazy captures look at the first bytes of each chunk twice, and hash the first few windows."""
    monkeypatch.setattr("ckptd.trainer.capture.AUDITED_FIRST", 0)
    calls = Calls(monkeypatch)
    number_of_calls = set()
    for tensors in (FEW, MANY):
        loop = Loop(home, tensors, capture=capture)
        with loop.checkpointer:
            run(loop, WARM)
            calls.take()
            before = loop.checkpointer.statistics()
            for _ in loop.steps(MORE // 5):
                made = calls.take()
                assert sum(call.copied for call in made) == STATE_BYTES
                sources = [source for call in made for source in call.sources]
                assert len(sources) == len(set(sources)) == 2 * tensors
                least_read = 0 if capture == "eager" else 2
                assert sum(call.read for call in made) == least_read * min(
                    2 * tensors * copying.WITNESS_BYTES, STATE_BYTES
                )
                number_of_calls.add(len(made))
            after = loop.checkpointer.statistics()
        counted = {name: after[name] - before[name] for name in ("bytes_captured", "bytes_eager", "bytes_lazy")}
        kind = "bytes_eager" if capture == "eager" else "bytes_lazy"
        assert counted["bytes_captured"] == counted[kind] == MORE // 5 * STATE_BYTES
    assert len(number_of_calls) == 1
    assert max(number_of_calls) <= 4


def test_descriptors_are_constant(home: Home) -> None:
    """After 50 snapshots as after 5, with 2,000 tensors as with 10: in the trainer and in the daemon."""
    found = set()
    _, others = open_here(os.getpid())
    for tensors in (FEW, MANY):
        loop = Loop(home, tensors)
        with loop.checkpointer:
            run(loop, WARM)
            found.add(loop.settled_descriptors())
            run(loop, MORE)
            found.add(loop.settled_descriptors())
    assert len(found) == 1, found
    ((_, trainer, _, daemon),) = found
    assert 0 < trainer - others <= daemon <= 8


def test_the_daemon_does_not_grow(home: Home) -> None:
    """Whatever it remembers of a snapshot it forgets: 200 of them leave less than a page each."""
    loop = Loop(home, FEW)
    with loop.checkpointer:
        run(loop, 20)
        daemon = psutil.Process(home.daemon().pid)
        before = daemon.memory_full_info().uss
        run(loop, 200)
        assert daemon.memory_full_info().uss - before < 200 * 4096


@pytest.mark.parametrize("tensors", [FEW, MANY])
def test_a_trainer_keeps_nothing_of_a_snapshot(home: Home, tensors: int) -> None:
    """Blocks that are allocated in ckptd's code: none remains of a capture once the next one is done; and while it runs
    it needs what it makes of rows as columns, not a copy of the state."""
    loop = Loop(home, tensors)
    with loop.checkpointer:
        run(loop, WARM)
        tracemalloc.start()
        try:
            run(loop, MORE)  # what is remembered of recent steps is as much as it will be
            before = blocks()
            tracemalloc.reset_peak()
            resting = tracemalloc.get_traced_memory()[0]
            run(loop, MORE)
            peak = tracemalloc.get_traced_memory()[1]
            after = blocks()
        finally:
            tracemalloc.stop()
    assert after - before <= MORE // 5
    assert peak - resting <= 1024 * 2 * tensors + 256 * 1024


def blocks() -> int:
    """Allocated by lines of ckptd and alive."""
    gc.collect()
    found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/ckptd/*")])
    return sum(statistic.count for statistic in found.statistics("filename"))
