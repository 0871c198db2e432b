"""Small trainings, one for each kind of state whose numbers ckptd must not change; and how one is run."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import ckptd

STEPS = 50
KILL_FROM, KILL_AT = 12, 35
"""A run that is to be killed dies once snapshots are sealed, and with an enforced one at the latest."""

PACE_S = 0.004
"""What a step takes besides: small ones are over before a daemon can say a word."""


class Case(NamedTuple):
    """A training: its state, and one step of it (the loss)."""

    state: dict[str, Any]
    step: Callable[[], Any]


class Trained(NamedTuple):
    """What a run ended with. `losses` are those of the steps it did itself."""

    digest: dict[str, str]
    losses: dict[int, dict[str, float]]
    statistics: dict[str, Any]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.GELU(), nn.Linear(32, 4))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Uses all three global generators."""
    scale = 1.0 + 0.1 * random.random() + 0.1 * float(np.random.rand())
    return torch.randn(8, 16) * scale, torch.randn(8, 4)


def loss_of(model: nn.Module) -> torch.Tensor:
    inputs, targets = batch()
    return nn.functional.mse_loss(model(inputs), targets)


def with_optimizer(make: Callable[[Any], torch.optim.Optimizer]) -> Case:
    model = network()
    optimizer = make(model.parameters())

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Case({"model": model, "optimizer": optimizer}, step)


def lbfgs() -> Case:
    model = nn.Linear(16, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)

    def step() -> float:
        inputs, targets = batch()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        return float(optimizer.step(closure))

    return Case({"model": model, "optimizer": optimizer}, step)


def scaler() -> Case:
    """The scale grows until gradients overflow: the scaler skips steps, and some boundaries have no update."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grads = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=3)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        grads.scale(loss).backward()
        grads.step(optimizer)
        grads.update()
        return loss.item()

    return Case({"model": model, "optimizer": optimizer, "scaler": grads}, step)


def schedulers() -> Case:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 12)
    sequence = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[15])
    other = nn.Linear(16, 4)
    adam = torch.optim.Adam(other.parameters())
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=0.01, total_steps=STEPS + 1)

    def step() -> float:
        optimizer.zero_grad()
        adam.zero_grad()
        loss = loss_of(model) + loss_of(other)
        loss.backward()
        optimizer.step()
        adam.step()
        sequence.step()
        cycle.step()
        return loss.item()

    state = {
        "models": [model, other],
        "optimizers": {"sgd": optimizer, "adam": adam},
        "schedulers": (sequence, cycle),
    }
    return Case(state, step)


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 112

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((16,), index / 112.0)


class Noisy(Numbers):
    """Draws from the generator of its worker process, which no state dict of torchdata's holds."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index) + 0.01 * torch.randn(16)


def loader(kind: type[Numbers] = Numbers) -> Case:
    """Workers, shuffling, several passes over the data."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data: Any = StatefulDataLoader(kind(), batch_size=8, shuffle=True, num_workers=2)
    iterator: list[Any] = []

    def draw() -> torch.Tensor:
        if not iterator:
            iterator.append(iter(data))
        try:
            return next(iterator[0])
        except StopIteration:
            iterator[0] = iter(data)
            return next(iterator[0])

    def step() -> float:
        optimizer.zero_grad()
        loss = model(draw()).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Case({"model": model, "optimizer": optimizer, "loader": data}, step)


def accumulation() -> Case:
    """An optimizer step in every third step. Gradients are in no snapshot: one is taken where they are used up."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    progress = {"steps": 0}

    def step() -> float:
        progress["steps"] += 1
        loss = loss_of(model)
        loss.backward()
        if progress["steps"] % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return Case({"model": model, "optimizer": optimizer, "progress": progress}, step)


def in_backward() -> Case:
    """One optimizer for each parameter, stepped as soon as its gradient is there: while the backward pass goes on."""
    model = network()
    optimizers = {name: torch.optim.Adam([parameter]) for name, parameter in model.named_parameters()}

    def hook(name: str) -> Callable[[torch.Tensor], None]:
        def stepped(parameter: torch.Tensor) -> None:
            optimizers[name].step()
            optimizers[name].zero_grad()

        return stepped

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(hook(name))

    def step() -> float:
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    return Case({"model": model, "optimizers": optimizers}, step)


def tied() -> Case:
    """Weights under two names, a frozen part, an average of the weights kept by hand, a generator of one's own."""
    model = nn.ModuleDict({"embed": nn.Embedding(32, 16), "frozen": nn.Linear(16, 16), "head": nn.Linear(16, 32)})
    model["head"].weight = model["embed"].weight
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    average = {name: value.clone() for name, value in model["head"].state_dict().items()}
    generator = torch.Generator().manual_seed(5)

    def step() -> float:
        optimizer.zero_grad()
        tokens = torch.randint(32, (8,), generator=generator)
        out = model["head"](model["frozen"](model["embed"](tokens)))
        loss = nn.functional.cross_entropy(out, torch.roll(tokens, 1))
        loss.backward()
        optimizer.step()
        for name, value in model["head"].state_dict().items():
            average[name].lerp_(value, 0.1)
        return loss.item()

    return Case({"model": model, "optimizer": optimizer, "average": average, "generator": generator}, step)


CASES: dict[str, Callable[[], Case]] = {
    "adamw": lambda: with_optimizer(lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True)),
    "adamw_foreach": lambda: with_optimizer(lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True)),
    "adamw_fused": lambda: with_optimizer(lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)),
    "nadam": lambda: with_optimizer(lambda p: torch.optim.NAdam(p, lr=1e-2)),
    "sgd": lambda: with_optimizer(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3)),
    "sgd_foreach": lambda: with_optimizer(
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, foreach=True)
    ),
    "sgd_fused": lambda: with_optimizer(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, fused=True)),
    "lbfgs": lbfgs,
    "scaler": scaler,
    "schedulers": schedulers,
    "loader": loader,
    "noisy_loader": lambda: loader(Noisy),
    "accumulation": accumulation,
    "in_backward": in_backward,
    "tied": tied,
}


GROUPS: dict[str, list[str]] = {
    "optimizers": ["adamw", "adamw_foreach", "adamw_fused", "nadam", "sgd", "sgd_foreach", "sgd_fused", "lbfgs"],
    "others": ["scaler", "schedulers", "loader", "in_backward", "tied"],
    "accumulation": ["accumulation"],
    "never resumed": ["noisy_loader"],
}
"""Cases that are trained in turns under one Checkpointer: a process and a daemon for each would take too long."""


def group(name: str) -> Case:
    """All trainings of a group as one."""
    cases = {member: CASES[member]() for member in GROUPS[name]}
    return Case(
        {member: case.state for member, case in cases.items()},
        lambda: {member: case.step() for member, case in cases.items()},
    )


def seed(number: int = 0) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def digest(state: dict[str, Any]) -> dict[str, str]:
    """A hash for each leaf of a state, and for the global generators."""
    found: dict[str, str] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = getattr(value, "_local_tensor", value)
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[path] = f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
        elif isinstance(value, torch.Generator):
            visit(path, value.get_state())
        elif type(value).__name__ == "StatefulDataLoader":
            pass  # its state tells of workers and prefetching; what it gives to the training is in losses and weights
        elif hasattr(value, "state_dict"):
            visit(path, value.state_dict())
        elif isinstance(value, dict):
            for key, child in value.items():
                visit(f"{path}/{key}", child)
        elif isinstance(value, (list, tuple)):
            for index, child in enumerate(value):
                visit(f"{path}/{index}", child)
        elif not callable(value):
            found[path] = repr(value)

    visit("", state)
    visit("rng/torch", torch.get_rng_state())
    found["rng/python"] = hashlib.sha256(repr(random.getstate()).encode()).hexdigest()
    found["rng/numpy"] = hashlib.sha256(repr(np.random.get_state()).encode()).hexdigest()
    return found


def plain(name: str) -> Trained:
    """The training without ckptd, never interrupted."""
    seed()
    case = group(name)
    losses = {number: case.step() for number in range(1, STEPS + 1)}
    return Trained(digest(case.state), losses, {})


def train(name: str, dies_at: str | None, options: dict[str, Any]) -> Trained:
    """The training with ckptd. `dies_at`: it is killed on the way, at the "start" or at the "end" of a step's body."""
    seed()
    case = group(name)
    losses = {}
    with ckptd.Checkpointer(case.state, **options) as checkpointer:
        for number in checkpointer.steps(STEPS):
            if dies_at == "start":
                die_if_sealed(checkpointer, number)
            losses[number] = case.step()
            time.sleep(PACE_S)
            if dies_at == "end":
                die_if_sealed(checkpointer, number)
        statistics = checkpointer.statistics()
    return Trained(digest(case.state), losses, statistics)


def die_if_sealed(checkpointer: ckptd.Checkpointer, number: int) -> None:
    """SIGKILL to this process once there is something to restore."""
    sealed = checkpointer.statistics()["snapshots_sealed"]
    if number >= KILL_FROM and (sealed >= 2 or number >= KILL_AT):
        if not sealed:
            checkpointer.snapshot()
        os.kill(os.getpid(), signal.SIGKILL)
