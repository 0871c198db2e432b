"""Small applications whose state has everything: parameters, buffers, optimizer state, schedules, tied weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Model(nn.Module):
    """Linear, batch norm, linear; sizes that do not divide by two ranks, one that leaves a rank without any. `tied`
    shares the first weight as third."""

    def __init__(self, width: int = 5, tied: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 3)
        self.gate = nn.Linear(width, 1)
        self.head = nn.Linear(3, width, bias=False)
        if tied:
            self.head.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        return self.head(self.last(hidden) * self.gate(hidden))


def application(seed: int, **options: Any) -> dict[str, Any]:
    """A model, AdamW and a schedule, deterministic in `seed`; no step taken."""
    torch.manual_seed(seed)
    model = Model(**options)
    return {"model": model, **optimisation(model)}


def optimisation(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return {"optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)}


def train(state: dict[str, Any], steps: int, seed: int = 0) -> list[float]:
    """Takes `steps` optimizer steps on data made from `seed`; the losses."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        loss = state["model"](torch.randn(7, 3, generator=generator)).square().mean()
        loss.backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        state["scheduler"].step()
        losses.append(loss.item())
    return losses


def content(state: dict[str, Any]) -> dict[str, Any]:
    """Everything in it, by name, as copies."""
    found: dict[str, Any] = {f"model/{k}": v.detach().clone() for k, v in state["model"].state_dict().items()}
    found["scheduler"] = dict(state["scheduler"].state_dict())
    for index, values in state["optimizer"].state_dict()["state"].items():
        found |= {f"optimizer/{index}/{name}": value.clone() for name, value in values.items()}
    found["groups"] = [{**group} for group in state["optimizer"].state_dict()["param_groups"]]
    return found


def same(one: Any, other: Any) -> bool:
    """Equal in structure, dtype and bits."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(x, y) for x, y in zip(one, other, strict=True))
    return bool(one == other)
