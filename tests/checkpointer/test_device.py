"""State on CUDA devices, on a fake driver: every snapshot has the bytes of its boundary in whatever order the device
works, and the training waits for nothing."""

from __future__ import annotations

import ctypes
import gc
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ckptd
from ckptd.trainer import capture as capturing
from ckptd.trainer import device
from ckptd.trainer.window import Running
from tests.checkpointer.fake_device import FakePlatform, FakeTraining, value
from tests.checkpointer.home import Home
from tests.checkpointer.training import UNTIL_S, until
from tests.native.fake_cuda import Fake, library

WEIGHT = "model/0.weight"
ENOUGH = 5


@pytest.fixture
def fake() -> Iterator[Fake]:
    """Nothing of the driver is left when the trainings of a test are over, and nothing was asked that must not be."""
    made = Fake(library(), devices=2)
    yield made
    made.stop()
    device.close()
    gc.collect()
    assert made.misuse == ""
    assert made.live == 0
    made.reset()


@pytest.fixture
def platform(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> FakePlatform:
    made = FakePlatform(fake)
    monkeypatch.setattr(device, "platform", made)
    return made


class Snapshots:
    """What slots held when their captures were complete."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: dict[int, dict[str, bytes]] = {}
        original = Running.complete

        def complete(running: Running) -> None:
            catalog, target = running.jobs.catalog, running.slot.map()
            self.steps[running.snapshot.step] = {
                catalog.tensors[catalog.tensor[row]].key: ctypes.string_at(
                    target + int(catalog.file_offset[row]), int(catalog.raw[row])
                )
                for row in range(len(catalog))
            }
            original(running)

        monkeypatch.setattr(Running, "complete", complete)

    def wrong(self, training: FakeTraining) -> list[tuple[int, str]]:
        """(step, key) of whatever is not what it was at the boundary."""
        return [
            (step, key)
            for step, found in self.steps.items()
            for key, expected in training.after(step).items()
            if found[key] != expected
        ]


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    return Snapshots(monkeypatch)


def around(home: Home, training: FakeTraining, **options: Any) -> ckptd.Checkpointer:
    options = {"flush_every": None, "snapshot_every": 1, "max_stall_s": UNTIL_S, **options}
    return ckptd.Checkpointer(training.state, home.store(), **options)


def train(
    checkpointer: ckptd.Checkpointer, training: FakeTraining, snapshots: Snapshots, *, in_step: bool = False
) -> None:
    """Until some snapshots are taken. The loop is ahead of the device by as much as it likes for some steps, or it ends
    each one when the device has done it (`in_step`)."""
    deadline = time.monotonic() + UNTIL_S
    for step in checkpointer.steps():
        if len(snapshots.steps) >= ENOUGH:
            break
        assert time.monotonic() < deadline
        training.step()
        if in_step:
            until(lambda: training.fake.queued == 0)
        elif step % 4 == 0:
            until(lambda: training.fake.queued < 100)


def until_open(checkpointer: ckptd.Checkpointer, training: FakeTraining) -> int:
    """Trains until a window is open; the step whose body has just begun."""
    for step in checkpointer.steps():
        assert checkpointer._capture is not None
        if checkpointer._capture._window is not None:
            return step
        training.step()
        training.fake.run(step)
    raise AssertionError


def skipped(checkpointer: ckptd.Checkpointer, reason: str) -> int:
    return checkpointer.statistics()["skip_reasons"].get(reason, 0)


@pytest.mark.parametrize(
    ("seed", "first", "options"),
    [
        (1, None, {}),
        (2, "training", {}),
        (3, "copies", {}),
        (4, "training", {"audit": True}),
        (5, "training", {"capture": "eager"}),
        (6, "training", {"capture": "lazy"}),
    ],
)
def test_every_snapshot_is_of_its_boundary(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots, seed: int, first: str | None, options: Any
) -> None:
    """The device works by itself, in an order of its own, and the loop runs ahead of it as far as it likes."""
    training = FakeTraining(fake, platform)
    fake.prefer(platform.current[0], {"training": 1, "copies": -1, None: 0}[first])
    fake.start(seed)
    with around(home, training, **options) as checkpointer:
        train(checkpointer, training, snapshots)
    assert snapshots.wrong(training) == []
    assert home.checkpoints() == [training.steps]
    restored = FakeTraining(fake, platform)
    assert ckptd.load(restored.state, home.store()) == training.steps
    assert restored.model[0].weight.detach().numpy().tobytes() == training.after(training.steps)[WEIGHT]


def test_without_waits_snapshots_are_wrong(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setattr(capturing, "AUDITED_FIRST", 0)
    training = FakeTraining(fake, platform)
    with around(home, training) as checkpointer:
        until_open(checkpointer, training)
        fake.ignore_waits(True)
        fake.prefer(platform.current[0], 1)
        training.step()
        fake.run()
        fake.ignore_waits(False)
        fake.start()
    assert {key for _, key in snapshots.wrong(training)} >= {WEIGHT}


def test_the_loop_waits_for_nothing(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device does nothing at all, and the training goes on all the same: forward, optimizer step, boundary."""
    monkeypatch.setattr(capturing, "AUDITED_FIRST", 0)
    training = FakeTraining(fake, platform)
    with around(home, training) as checkpointer:
        step = until_open(checkpointer, training)
        queued = fake.queued
        training.step()
        for _ in range(3):
            checkpointer.step()
            training.step()
        assert fake.queued > queued > 0
        assert checkpointer.level(step - 1) is None
        fake.start()
        until(lambda: checkpointer.level(step - 1) == "sealed")
        checkpointer.step()
    assert step - 1 in snapshots.steps
    for n, found in snapshots.steps.items():
        print(
            "SNAP",
            n,
            [k for k in range(0, 2000) if found[WEIGHT] == training.after(k)[WEIGHT]],
            "step",
            step,
            training.steps,
        )
    assert snapshots.wrong(training) == []


def test_sources_live_until_they_are_copied(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight gets other memory in the window; what it had is held until the device has read it, and let go then."""
    monkeypatch.setattr(capturing, "AUDITED_FIRST", 0)
    training = FakeTraining(fake, platform)
    with around(home, training) as checkpointer:
        step = until_open(checkpointer, training)
        weight, transfer = training.model[0].weight, checkpointer._capture._window._transfer
        address = weight.data_ptr()
        weight.data = platform.place(torch.zeros_like(weight))
        training.step()
        checkpointer.step()
        assert address in [tensor.data_ptr() for tensor in transfer._held]
        fake.start()
        until(lambda: checkpointer.level(step - 1) == "sealed")
        assert transfer._held == ()
        training.step()
        checkpointer.step()
    assert snapshots.steps[step - 1][WEIGHT] == training.after(step - 1)[WEIGHT]


def test_a_write_that_nobody_announced(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots, caplog: Any
) -> None:
    """Through PyTorch but by no optimizer: found by the version, the snapshot is not taken, and from then on that
    tensor is copied before the training goes on."""
    training = FakeTraining(fake, platform)
    fake.start()
    with around(home, training) as checkpointer:
        for misses in (0, 1, 1, 1):
            assert skipped(checkpointer, "mutated") == misses
            step = until_open(checkpointer, training)
            training.write(WEIGHT, training.model[0].weight)
            training.step()
            checkpointer.step()
            until(lambda: skipped(checkpointer, "mutated") == 1)
            checkpointer.before_update()
        assert f"is not captured: {WEIGHT} changed" in caplog.text
        until(lambda: checkpointer.level(step - 1) is not None)
    assert snapshots.wrong(training) == []


def test_a_write_that_was_announced(home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots) -> None:
    """`before_update`, as for a CUDA graph that is replayed: a write like that of an optimizer."""
    training = FakeTraining(fake, platform)
    fake.start()
    with around(home, training) as checkpointer:
        step = until_open(checkpointer, training)
        checkpointer.before_update()
        training.write(WEIGHT, training.model[0].weight)
        training.step()
        checkpointer.step()
        until(lambda: checkpointer.level(step - 1) is not None)
    assert skipped(checkpointer, "mutated") == 0
    assert snapshots.wrong(training) == []


def test_the_audit_finds_what_no_version_shows(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots, caplog: Any
) -> None:
    """A kernel of somebody else's writes to a weight between boundary and optimizer step, and PyTorch knows nothing."""
    training = FakeTraining(fake, platform)
    fake.start()
    with around(home, training, audit=True) as checkpointer:
        step = until_open(checkpointer, training)
        fake.kernel(platform.current[0], training.model[0].weight.data_ptr(), bytes(64))
        training.step()
        until(lambda: skipped(checkpointer, "mutated") == 1)
        assert f"step {step - 1} is not captured: {WEIGHT} changed" in caplog.text
        checkpointer.step()
    assert step - 1 not in snapshots.steps
    assert snapshots.wrong(training) == []


def test_a_graph_in_the_making_is_left_alone(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots
) -> None:
    """A boundary while the stream is being captured takes no snapshot; an optimizer step that is captured, not run,
    joins nothing to the graph (the fake driver reports it as misuse)."""
    training = FakeTraining(fake, platform)
    fake.start()
    with around(home, training) as checkpointer:
        until_open(checkpointer, training)
        fake.capturing(platform.current[0], True)
        checkpointer.before_update()
        while not skipped(checkpointer, "failed"):
            checkpointer.before_update()
            checkpointer.step()
        fake.capturing(platform.current[0], False)
        training.steps = checkpointer._step
        training.step()
        checkpointer.step()
    assert skipped(checkpointer, "failed") >= 1
    assert home.checkpoints() == [training.steps]


def test_the_state_is_written_on_other_streams(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps are on a stream of their own, the boundary on the default one: the copy comes after the former, and the
    next step after the copy."""
    training = FakeTraining(fake, platform)
    outside, inside = platform.current[0], fake.stream(0)
    fake.prefer(outside, 2)
    fake.prefer(inside, -1)
    fake.start()
    with around(home, training) as checkpointer:
        original = training.step

        def step() -> None:
            platform.current[0] = inside
            original()
            platform.current[0] = outside

        monkeypatch.setattr(training, "step", step)
        train(checkpointer, training, snapshots)
    assert snapshots.wrong(training) == []


def test_two_devices(home: Home, fake: Fake, monkeypatch: pytest.MonkeyPatch, snapshots: Snapshots) -> None:
    platform = FakePlatform(fake, devices=2)
    monkeypatch.setattr(device, "platform", platform)
    training = FakeTraining(fake, platform, device_of=lambda name: int(name.startswith("2")))
    fake.start(9)
    with around(home, training) as checkpointer:
        train(checkpointer, training, snapshots)
    assert snapshots.wrong(training) == []
    assert fake.calls("cuStreamCreateWithPriority") == 2


def test_moments_in_main_memory(home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots) -> None:
    """An optimizer that is offloaded: its state is copied at the boundary, the weights in the window."""
    training = FakeTraining(fake, platform, host_moments=True)
    fake.start(3)
    with around(home, training) as checkpointer:
        train(checkpointer, training, snapshots)
    assert snapshots.wrong(training) == []
    assert home.checkpoints() == [training.steps]


def test_memory_that_cannot_be_pinned(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_warned", set())
    training = FakeTraining(fake, platform)
    fake.start()
    original = device.engine

    def refusing() -> Any:
        fake.fail("cuMemHostRegister_v2")
        return original()

    monkeypatch.setattr(device, "engine", refusing)
    with caplog.at_level(logging.WARNING), around(home, training) as checkpointer:
        train(checkpointer, training, snapshots)
    assert snapshots.wrong(training) == []
    assert caplog.text.count("cannot be pinned") == 1


@pytest.mark.parametrize(
    "function",
    [
        "cuStreamIsCapturing",
        "cuEventRecord",
        "cuStreamWaitEvent",
        "cuMemcpyDtoHAsync_v2",
        "cuEventQuery",
    ],
)
def test_errors_of_the_driver_cost_a_snapshot(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots, function: str, caplog: Any
) -> None:
    """The one that was being taken, and that is said; the training goes on, and so do snapshots."""
    training = FakeTraining(fake, platform)
    fake.start()
    with around(home, training) as checkpointer:
        until_open(checkpointer, training)
        training.step()
        fake.fail(function)
        while not skipped(checkpointer, "failed"):
            checkpointer.step()
            training.step()
        checkpointer.step()
        assert "CUDA_ERROR_FAKE" in caplog.text
    assert snapshots.wrong(training) == []
    assert home.checkpoints() == [training.steps]


def test_a_device_that_breaks_for_good(home: Home, fake: Fake, platform: FakePlatform, caplog: Any) -> None:
    """After a fault every call fails: no snapshot more, an end all the same."""
    training = FakeTraining(fake, platform)
    fake.start()

    def run() -> None:
        with around(home, training) as checkpointer:
            until_open(checkpointer, training)
            fake.fail("", 5, sticky=True)
            for _ in range(20):
                training.step()
                checkpointer.step()
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run()
    home.stop()
    fake.reset(2)


def test_an_error_ends_the_training_in_the_window(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots
) -> None:
    """What is being copied by then is completed: the step is not lost."""
    training = FakeTraining(fake, platform)
    seen = []

    def run() -> None:
        with around(home, training) as checkpointer:
            seen.append(until_open(checkpointer, training) - 1)
            fake.start()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert seen[0] in snapshots.steps
    assert snapshots.wrong(training) == []
    home.stop()


def test_without_a_driver_pytorch_copies(
    home: Home, fake: Fake, platform: FakePlatform, snapshots: Snapshots, caplog: Any
) -> None:
    """No driver to ask, as under ROCm: one warning, right bytes. That the copies of PyTorch come after what is queued
    is its own affair: here the device has done everything before they are made."""
    platform.library = "/no-such-driver.so"
    training = FakeTraining(fake, platform)
    fake.start()
    with around(home, training) as checkpointer:
        train(checkpointer, training, snapshots, in_step=True)
    assert snapshots.wrong(training) == []
    assert caplog.text.count("copied by PyTorch") == 1


def test_a_value_says_of_which_step_it_is() -> None:
    """What the tests above compare differs from step to step and from key to key."""
    assert len({value(key, step, 7).tobytes() for key in ("a", "b") for step in range(5)}) == 10
