"""The smallest training there is, for tests of what happens around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

UNTIL_S = 30.0


class Training:
    """A linear layer and SGD with momentum. Every object of the same seed takes the same steps."""

    def __init__(self, **more: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, **more}

    def forward(self) -> None:
        """Half a step: gradients."""
        self.model(torch.randn(2, 4)).square().mean().backward()

    def update(self) -> None:
        """The other half."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.forward()
        self.update()

    @property
    def weights(self) -> list[list[float]]:
        return self.model.weight.tolist()


def weights_after(steps: int) -> list[list[float]]:
    """What a training without ckptd has after so many steps."""
    training = Training()
    for _ in range(steps):
        training.step()
    return training.weights


def until(condition: Callable[[], bool], otherwise: Callable[[], str] = lambda: "it does not happen") -> None:
    """Waits for another process to do something; fails with what `otherwise` says."""
    deadline = time.monotonic() + UNTIL_S
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.005)
