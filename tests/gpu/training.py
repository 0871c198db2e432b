"""Trainings on a CUDA device, of which two of the same seed take the same steps; for processes too."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ckptd
from tests.checkpointer.child import report

WIDTH = 512

Make = Callable[[nn.Module], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw-fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    "adamw-foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True),
    "adamw-capturable": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
}


class Network(nn.Module):
    """Matrix products, a norm with buffers, a convolution whose weight is not contiguous, many tiny tensors."""

    def __init__(self, tiny: int = 64) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.BatchNorm1d(2 * WIDTH)
        self.outer = nn.Linear(2 * WIDTH, WIDTH)
        self.mixed = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(1 + i % 7)) for i in range(tiny)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.outer(torch.relu(self.norm(self.inner(x))))
        x = x + self.mixed(x.view(len(x), 8, 8, -1)).reshape(len(x), -1)
        return x + sum(shift.sum() for shift in self.shifts)


class Training:
    """Steps whose results depend on everything before them, dropout's generator included."""

    def __init__(self, make: Make, device: str = "cuda") -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = Network().to(device)
        self.optimizer = make(self.model)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.model(x), 0.1).square().mean()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(torch.randn(16, WIDTH, device=self.device)).backward()
        self.optimizer.step()

    def everything(self) -> dict[str, bytes]:
        """The bytes of all tensors, under the keys of checkpoints."""
        torch.cuda.synchronize()
        found = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                if torch.is_tensor(value):
                    found[f"optimizer/state/{name}/{key}"] = value
        return {key: tensor.detach().cpu().contiguous().numpy().tobytes() for key, tensor in found.items()}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Keys whose bytes differ, or that only one has."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def train_until_killed(store: str, optimizer: str, steps: int, kill_at: int) -> dict[str, bytes]:
    """A training process: kills itself at a step, if it comes to that in this life; else what it has at the end."""
    torch.use_deterministic_algorithms(True)
    training = Training(OPTIMIZERS[optimizer])
    with ckptd.Checkpointer(training.state, store, snapshot_every=1, flush_every=None, audit=True) as checkpointer:
        for step in checkpointer.steps(steps):
            training.step()
            if step == kill_at:
                checkpointer.step()
                checkpointer.snapshot()
                report(step)
                os.kill(os.getpid(), signal.SIGKILL)
        checkpointer.flush()
        return training.everything()
