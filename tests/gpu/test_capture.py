"""Capture on a real CUDA device: every snapshot has the bits of its boundary, whatever runs meanwhile.

The same properties are tested on a fake driver without a device (tests/checkpointer/test_device.py, tests/native)."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ckptd
from ckptd.trainer import device
from ckptd.trainer.window import Running
from tests.checkpointer.child import Child
from tests.checkpointer.home import Home
from tests.checkpointer.training import until
from tests.gpu.training import OPTIMIZERS, WIDTH, Network, Training, differing, train_until_killed

ENOUGH = 12
MOST_STEPS = 5000


class Snapshots:
    """What slots held when their captures were complete, by step and key."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: dict[int, dict[str, bytes]] = {}
        self.threads: set[str] = set()
        original = Running.complete

        def complete(running: Running) -> None:
            catalog, target = running.jobs.catalog, running.slot.map()
            found: dict[str, list[bytes]] = {}
            for row in range(len(catalog)):
                data = ctypes.string_at(target + int(catalog.file_offset[row]), int(catalog.raw[row]))
                found.setdefault(catalog.tensors[catalog.tensor[row]].key, []).append(data)
            self.steps[running.snapshot.step] = {key: b"".join(parts) for key, parts in found.items()}
            self.threads.add(threading.current_thread().name)
            original(running)

        monkeypatch.setattr(Running, "complete", complete)


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    return Snapshots(monkeypatch)


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def around(home: Home, training: Training, **options: Any) -> ckptd.Checkpointer:
    return ckptd.Checkpointer(training.state, home.store(), **{"snapshot_every": 1, "flush_every": None, **options})


def check(snapshots: Snapshots, training: Training, step: Callable[[Training], None]) -> None:
    """Takes the same steps again without ckptd and compares each snapshot, bit by bit."""
    assert snapshots.steps
    for number in range(1, max(snapshots.steps) + 1):
        step(training)
        if number in snapshots.steps:
            found, wanted = snapshots.steps[number], training.everything()
            wrong = [key for key, data in wanted.items() if key in found and found[key] != data]
            assert wrong == [], f"step {number}"
            assert len(wanted.keys() & found.keys()) > 10


def train(
    home: Home, training: Training, snapshots: Snapshots, step: Callable[[Training], None], **options: Any
) -> ckptd.Checkpointer:
    with around(home, training, **options) as checkpointer:
        for number in checkpointer.steps():
            if len(snapshots.steps) >= ENOUGH:
                break
            assert number < MOST_STEPS
            step(training)
    return checkpointer


@pytest.mark.parametrize("options", [{}, {"audit": True}, {"capture": "eager"}, {"capture": "lazy"}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_snapshots_are_exact(home: Home, snapshots: Snapshots, optimizer: str, options: dict[str, Any]) -> None:
    """While the loop runs ahead of the device, with weights that are not contiguous and tiny tensors."""
    checkpointer = train(home, Training(OPTIMIZERS[optimizer]), snapshots, Training.step, **options)
    assert checkpointer.statistics()["skip_reasons"].get("mutated", 0) == 0
    assert checkpointer.statistics()["skip_reasons"].get("failed", 0) == 0
    assert snapshots.threads == {"ckptd-window"}
    check(snapshots, Training(OPTIMIZERS[optimizer]), Training.step)


def test_the_driver_is_used(home: Home, snapshots: Snapshots) -> None:
    """Not the way through PyTorch, which is there for devices that are not CUDA's; and slots are pinned."""
    training = Training(OPTIMIZERS["sgd"])
    with around(home, training) as checkpointer:
        for _ in checkpointer.steps():
            training.step()
            if snapshots.steps:
                assert device.engine() is not None
                assert device._pinned
                break
    assert not device._pinned


def test_steps_on_a_stream_of_their_own(home: Home, snapshots: Snapshots) -> None:
    """The boundary is on the default stream, which knows nothing of it."""
    stream = torch.cuda.Stream()

    def step(training: Training) -> None:
        with torch.cuda.stream(stream):
            training.step()

    train(home, Training(OPTIMIZERS["adamw-fused"]), snapshots, step)
    check(snapshots, Training(OPTIMIZERS["adamw-fused"]), Training.step)


def test_a_replayed_graph(home: Home, snapshots: Snapshots) -> None:
    """The whole step in a CUDA graph, captured under the Checkpointer; `before_update` before each replay."""
    training = Training(OPTIMIZERS["adamw-capturable"])
    x = torch.randn(16, WIDTH, device="cuda")

    def plain(training: Training) -> None:
        training.optimizer.zero_grad(set_to_none=False)
        training.model(x).square().mean().backward()
        training.optimizer.step()

    with around(home, training) as checkpointer:
        graph: torch.cuda.CUDAGraph | None = None
        for number in checkpointer.steps():
            if len(snapshots.steps) >= ENOUGH:
                break
            assert number < MOST_STEPS
            if number <= 3:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    plain(training)
                torch.cuda.current_stream().wait_stream(side)
                continue
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    plain(training)
            checkpointer.before_update()
            graph.replay()
    assert checkpointer.statistics()["skip_reasons"].get("mutated", 0) == 0
    check(snapshots, Training(OPTIMIZERS["adamw-capturable"]), plain)


def test_a_compiled_training(home: Home, snapshots: Snapshots) -> None:
    """Model and optimizer step are compiled; where no hook runs any more, `before_update` says it."""
    training = Training(OPTIMIZERS["adamw-foreach"])
    compiled = torch.compile(training.model)
    update = torch.compile(training.optimizer.step)
    with around(home, training, audit=True) as checkpointer:
        for number in checkpointer.steps():
            if len(snapshots.steps) >= 4:
                break
            assert number < MOST_STEPS
            training.optimizer.zero_grad()
            compiled(torch.randn(16, WIDTH, device="cuda")).square().mean().backward()
            checkpointer.before_update()
            update()
        last = checkpointer.flush()
        here = training.everything()
    restored = Training(OPTIMIZERS["adamw-foreach"])
    assert ckptd.load(restored.state, home.store()) == last
    assert differing(restored.everything(), here) == []


def test_an_unannounced_write_is_found(home: Home, snapshots: Snapshots) -> None:
    """By the version where PyTorch knows of it; by the audit where it does not."""
    training = Training(OPTIMIZERS["adamw-fused"])
    weight = training.model.inner.weight

    def step(training: Training) -> None:
        with torch.no_grad():
            weight.data.mul_(0.5)
        training.step()

    with around(home, training, audit=True, max_stall_s=30.0) as checkpointer:
        for number in checkpointer.steps():
            if checkpointer.statistics()["skip_reasons"].get("mutated"):
                break
            assert number < MOST_STEPS
            step(training)


def test_ten_thousand_tiny_tensors(home: Home, snapshots: Snapshots) -> None:
    def made() -> Training:
        training = Training(OPTIMIZERS["sgd"])
        training.model = Network(tiny=10_000).cuda()
        training.optimizer = torch.optim.SGD(training.model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
        training.state.update(model=training.model, optimizer=training.optimizer)
        return training

    training = made()
    with around(home, training) as checkpointer:
        for number in checkpointer.steps():
            if len(snapshots.steps) >= 2:
                break
            assert number < MOST_STEPS
            training.step()
        last, here = checkpointer.flush(), training.everything()
    restored = made()
    assert ckptd.load(restored.state, home.store()) == last
    assert differing(restored.everything(), here) == []


def test_moments_in_main_memory(home: Home, snapshots: Snapshots) -> None:
    """An optimizer that works on the CPU on copies of the weights, which then go to the device."""
    training = Training(OPTIMIZERS["sgd"])
    masters = [torch.nn.Parameter(p.detach().cpu().clone()) for p in training.model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3)
    state = {"model": training.model, "masters": torch.nn.ParameterList(masters), "optimizer": optimizer}
    with ckptd.Checkpointer(state, home.store(), snapshot_every=1, flush_every=None) as checkpointer:
        for _ in checkpointer.steps(200):
            training.loss(torch.randn(16, WIDTH, device="cuda")).backward()
            for master, parameter in zip(masters, training.model.parameters(), strict=True):
                master.grad, parameter.grad = parameter.grad.cpu(), None
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, training.model.parameters(), strict=True):
                    parameter.copy_(master)
    found = ckptd.open(home.store())
    assert torch.equal(found.read("model/inner.weight"), training.model.inner.weight.detach().cpu())
    assert checkpointer.statistics()["snapshots_sealed"] > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_in_one_process(home: Home, snapshots: Snapshots) -> None:
    first, second = (Training(OPTIMIZERS["adamw-fused"], f"cuda:{number}") for number in range(2))
    state = {"first": first.state, "second": second.state}
    with ckptd.Checkpointer(state, home.store(), snapshot_every=1, flush_every=None) as checkpointer:
        for number in checkpointer.steps():
            if len(snapshots.steps) >= ENOUGH:
                break
            assert number < MOST_STEPS
            first.step()
            second.step()
        checkpointer.flush()
    found = ckptd.open(home.store())
    for name, training in (("first", first), ("second", second)):
        assert torch.equal(found.read(f"{name}/model/inner.weight"), training.model.inner.weight.detach().cpu())


@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw-foreach"])
def test_killed_and_started_again(home: Home, optimizer: str) -> None:
    """It goes on from memory, and ends with the bits of a training that nobody killed."""
    environment = {**home.environment, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    arguments = (home.store(), optimizer, 40, 25)
    child = Child(environment, home.folder / "first", train_until_killed, *arguments)
    assert child.receive() == 25
    assert child.end().status == -9
    again = Child(environment, home.folder / "second", train_until_killed, home.store(), optimizer, 40, 0).end()
    assert "restored step" in again.stderr
    straight = Training(OPTIMIZERS[optimizer])
    for _ in range(40):
        straight.step()
    assert differing(again.value, straight.everything()) == []


def test_memory_of_the_device_is_let_go(home: Home, snapshots: Snapshots) -> None:
    """Snapshots take none of it, and sources are not held longer than copies take."""
    training = Training(OPTIMIZERS["adamw-fused"])
    with around(home, training) as checkpointer:
        for _ in range(3):
            training.step()
            checkpointer.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(200):
            training.step()
            checkpointer.step()
        training.optimizer.zero_grad()
        until(lambda: torch.cuda.memory_allocated() <= before)
