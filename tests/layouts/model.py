"""A tiny model that every layout can hold, what each element of its state is, and its loss.

Sizes divide by nothing: 10 words, 6 wide, 7 hidden, 5 experts. The embedding is tied to the head. Layers can be left
out, for stages of a pipeline, and experts for expert parallelism; what remains keeps its names.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

WORDS, WIDTH, HIDDEN, EXPERTS, LAYERS = 10, 6, 7, 5, 4
TOKENS = torch.tensor([[1, 2, 9], [0, 5, 7]])

Reduce = Callable[[torch.Tensor], torch.Tensor]


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Experts(nn.Module):
    """Experts stacked into one tensor, and experts as modules of their own. `owned`: those of this rank; `enter` and
    `leave` are what a rank with a part of them does around its part."""

    def __init__(self, owned: Iterable[int] = range(EXPERTS)) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.zeros(EXPERTS, WIDTH, WIDTH))
        self.each = nn.ModuleDict({str(i): nn.Linear(WIDTH, WIDTH, bias=False) for i in owned})
        self.enter: Reduce = same
        self.leave: Reduce = same

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = self.enter(x)
        stacked = self.stacked
        if isinstance(stacked, DTensor) and self.leave is not same:
            stacked = stacked.to_local()
        made = torch.einsum("eij,abj->abi", stacked, inside)
        for expert in self.each.values():
            made = made + expert(inside)
        return x + self.leave(made) / EXPERTS


class Model(nn.Module):
    """`layers`: the numbers of those held; `first` and `last`: whether what comes before and after them is."""

    def __init__(self, layers: Iterable[int] = range(LAYERS), first: bool = True, last: bool = True) -> None:
        super().__init__()
        if first:
            self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleDict({str(i): Layer() for i in layers})
        if last:
            self.experts = Experts()
            self.norm = nn.LayerNorm(WIDTH)
            self.register_buffer("scale", torch.ones(3))
            self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if first and last:
            self.head.weight = self.embed.weight

    def before(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed(tokens)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x

    def after(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.experts(x))) * self.scale.sum()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.after(self.between(self.before(tokens)))


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return (logits - 0.3).square().mean()


def logical(kind: str, name: str, shape: Iterable[int]) -> torch.Tensor:
    """What the tensor `kind` (model, exp_avg, exp_avg_sq, step) of parameter `name` is: a function of its element."""
    if kind == "step":
        return torch.tensor(3.0)
    shape = tuple(shape)
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    value = torch.sin(index * 0.7 + zlib.crc32(f"{kind}/{name}".encode()) % 1000).reshape(shape)
    return (value.square() * 0.1 + 0.05 if kind == "exp_avg_sq" else value * 0.4).float()


@functools.cache
def shapes() -> dict[str, torch.Size]:
    """Every parameter by name, and its shape."""
    return {name: parameter.shape for name, parameter in Model().named_parameters()}


def expected() -> dict[str, torch.Tensor]:
    """The logical state: every tensor, under `<kind>/<name>`."""
    kinds = ("model", "exp_avg", "exp_avg_sq", "step")
    found = {f"{kind}/{name}": logical(kind, name, shape) for name, shape in shapes().items() for kind in kinds}
    return {**found, "model/scale": logical("model", "scale", (3,))}
