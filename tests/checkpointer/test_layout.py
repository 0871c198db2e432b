"""State that changes its shape while training goes on: what is captured is what is there, restarts find it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptd
from ckptd.daemon.client import Control
from ckptd.protocol import messages as m
from tests.checkpointer.cases import digest
from tests.checkpointer.home import Home
from tests.checkpointer.training import Training

CHANGE_AT, STOP = 4, 7


class Growing(Training):
    """A training with parts that are not used from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 2)
        self.extra.requires_grad_(False)
        self.notes: dict[str, Any] = {"text": "", "tensor": torch.zeros(1), "buffer": torch.zeros(2)}
        self.state.update(extra=self.extra, notes=self.notes)

    def forward(self) -> None:
        self.extra(self.model(torch.randn(2, 4))).square().mean().backward()


def add_parameter_group(training: Growing) -> None:
    training.extra.requires_grad_(True)
    training.optimizer.add_param_group({"params": list(training.extra.parameters()), "lr": 0.01})


def add_module(training: Growing) -> None:
    training.model.add_module("late", nn.Linear(5, 5))
    training.optimizer.add_param_group({"params": list(training.model.late.parameters())})


def replace_optimizer(training: Growing) -> None:
    training.optimizer = training.state["optimizer"] = torch.optim.Adam(training.model.parameters())


def load_states(training: Growing) -> None:
    """Both replace or overwrite tensors, and lead elsewhere than the loop."""
    other = Growing()
    torch.manual_seed(9)
    for _ in range(3):
        other.step()
    training.model.load_state_dict(other.model.state_dict())
    training.optimizer.load_state_dict(other.optimizer.state_dict())


def move_storage(training: Growing) -> None:
    for parameter in training.model.parameters():
        parameter.data = parameter.data.clone() * 2


def change_strides(training: Growing) -> None:
    training.model.weight.data = training.model.weight.data.t().contiguous().t()


def change_dtype(training: Growing) -> None:
    training.extra.to(torch.float64)
    training.model.to(torch.float64)
    training.optimizer.state.clear()


def forget_optimizer_state(training: Growing) -> None:
    training.optimizer.state.clear()


def write_much(training: Growing) -> None:
    training.notes["text"] = "much more than there was room for " * 10_000


def resize_data(training: Growing) -> None:
    training.notes["tensor"] = torch.arange(10.0)
    training.notes["new"] = [torch.ones(2, 2), {"deep": torch.ones(3)}]
    del training.notes["buffer"]


def tie(training: Growing) -> None:
    training.model.register_module("twin", nn.Linear(4, 3))
    training.model.twin.weight = training.model.weight


CHANGES: list[Callable[[Growing], None]] = [
    add_parameter_group,
    add_module,
    replace_optimizer,
    load_states,
    move_storage,
    change_strides,
    change_dtype,
    forget_optimizer_state,
    write_much,
    resize_data,
    tie,
]


@pytest.mark.parametrize(
    ("change", "capture"),
    [*((change, "eager") for change in CHANGES), *((change, "lazy") for change in (add_module, load_states, tie))],
)
def test_a_change_is_captured(home: Home, change: Callable[[Growing], None], capture: str) -> None:
    """Before the change, right after it, and at the end: each snapshot is exactly what stood at its boundary."""
    dtype = torch.float64 if change is change_dtype else torch.float32
    training, stood = Growing(), {}
    options = {"capture": capture, "snapshot_every": 10**6, "keep": None, "audit": True, "max_stall_s": 60}
    with ckptd.Checkpointer(training.state, home.store(), **options) as checkpointer:
        for step in checkpointer.steps(STOP):
            if step - 1 in (CHANGE_AT - 1, CHANGE_AT):
                checkpointer.flush()
            if step == CHANGE_AT:
                change(training)
                torch.set_default_dtype(dtype)
            training.step()
            stood[step] = digest(training.state)
        torch.set_default_dtype(torch.float32)
        assert not {"mutated", "failed", "stall"} & checkpointer.statistics()["skip_reasons"].keys()
    assert home.checkpoints() == [CHANGE_AT - 1, CHANGE_AT, STOP]
    for step in home.checkpoints():
        again = Growing()
        if step >= CHANGE_AT:
            change(again)
        assert load(home, step, again) == step
        assert digest(again.state) == stood[step], f"step {step}"


def load(home: Home, step: int, training: Growing) -> int:
    folder: Path = next((home.folder / "store").glob(f"step-*{step}.*"))
    return ckptd.load(training.state, folder, rng=True)


def test_memory_of_an_old_layout_is_let_go(home: Home) -> None:
    """Each change takes new slots; those of the layouts before are freed, here and in the daemon."""
    training = Growing()

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:ckptd-slot")

    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=10**6) as checkpointer:
        checkpointer.restore()
        control = Control.connect()
        counts, sizes = [], []
        for step in checkpointer.steps(7):
            if step > 1:
                checkpointer.snapshot()
                counts.append(mapped())
                sizes.append(len(control.status()["slots"]))
            training.notes["tensor"] = torch.zeros(step * 1000)
            training.step()
        control.close()
    assert max(counts) <= 6
    assert max(sizes) <= 6
    assert mapped() == 0


def test_a_parameter_that_appears_in_no_module_ends_no_training(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    """A mistake in the middle of the run: it is named and logged, snapshots stop, training and the store do not."""
    training, stray = Growing(), nn.Parameter(torch.zeros(3))
    with ckptd.Checkpointer(training.state, home.store(), snapshot_every=1, flush_every=None) as checkpointer:
        for step in checkpointer.steps():
            if step == 3:
                checkpointer.flush()
                training.optimizer.add_param_group({"params": [stray]})
            if step == 5:
                checkpointer._capture.received(m.Survey(99), [])
            training.step()
            if step > 5 and "is in no module of the state" in caplog.text:
                break
        with pytest.raises(ckptd.ConfigError, match="is in no module of the state"):
            checkpointer.snapshot()
        training.optimizer.param_groups.pop()
        last = checkpointer.flush()
    assert home.checkpoints() == [2, last]
