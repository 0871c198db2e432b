"""Layouts in which ranks hold different modules, or flat ranges cut by somebody else: pipelines, experts, ZeRO."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import functional_call

import ckptd
from tests.layouts.applications import Application, gathered_by_parameter, optimisation, parameters_of, together
from tests.layouts.model import EXPERTS, LAYERS, TOKENS, WIDTH, Experts, Model, loss_of, shapes


class Enter(torch.autograd.Function):
    """Forward: the same; backward: the sum over ranks, each of which computed a part."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        context.group = group
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=context.group)
        return gradient, None


class Leave(torch.autograd.Function):
    """Forward: the sum over ranks; backward: the same."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def expert_parallel(replicas: int) -> Application:
    """`replicas` groups, in each of which the stacked experts are sharded, and a rank has some of the others."""
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("dp", "ep"))
    experts = mesh["ep"]
    group, rank = experts.get_group(), experts.get_local_rank()
    model = Model()
    model.experts = Experts(range(rank, EXPERTS, experts.size()))
    model.experts.stacked = nn.Parameter(distribute_tensor(model.experts.stacked.detach(), experts, [Shard(0)]))
    model.experts.enter = lambda x: Enter.apply(x, group)
    model.experts.leave = lambda x: Leave.apply(x, group)
    state = optimisation(model.parameters(), foreach=False)

    def backward() -> float:
        loss = loss_of(model(TOKENS))
        loss.backward()
        return float(loss.detach())

    return Application(
        {"model": model, **state}, model, backward, lambda: gathered_by_parameter(model, state["optimizer"])
    )


class Pipeline:
    """This rank's stage of a pipeline, `replicas` of which run side by side on the same data."""

    def __init__(self, replicas: int, renamed: bool) -> None:
        """`renamed`: the last stage knows the tied tensor as `head.weight` alone."""
        self.stages = dist.get_world_size() // replicas
        replica, self.stage = divmod(dist.get_rank(), self.stages)
        self.ranks = [replica * self.stages + stage for stage in range(self.stages)]
        self.first, self.last = self.stage == 0, self.stage == self.stages - 1
        runs = [range(LAYERS)[i * LAYERS // self.stages : (i + 1) * LAYERS // self.stages] for i in range(self.stages)]
        self.model = Model(runs[self.stage], self.first or (self.last and not renamed), self.last)
        ends = [dist.new_group([r * self.stages, (r + 1) * self.stages - 1]) for r in range(replicas)]
        self.ends = ends[replica]

    def backward(self) -> float:
        inside = torch.zeros(*TOKENS.shape, WIDTH)
        if self.first:
            made = self.model.between(self.model.before(TOKENS))
        else:
            dist.recv(inside, self.ranks[self.stage - 1])
            inside.requires_grad_()
            made = self.model.between(inside)
        loss = torch.zeros(())
        if self.last:
            loss = loss_of(self.model.after(made))
            loss.backward()
        else:
            dist.send(made.detach(), self.ranks[self.stage + 1])
            gradient = torch.zeros_like(made)
            dist.recv(gradient, self.ranks[self.stage + 1])
            made.backward(gradient)
        if not self.first:
            assert inside.grad is not None
            dist.send(inside.grad, self.ranks[self.stage - 1])
        if self.first or self.last:
            tied = (self.model.head if self.last else self.model.embed).weight
            dist.all_reduce(tied.grad, group=self.ends)
        loss = loss.detach().clone()
        dist.broadcast(loss, dist.get_world_size() - 1)
        return float(loss)


def pipeline(replicas: int = 1, renamed: bool = False) -> Application:
    stage = Pipeline(replicas, renamed)
    state = optimisation(stage.model.parameters())

    def gathered() -> dict[str, torch.Tensor]:
        return gathered_by_parameter(stage.model, state["optimizer"])

    return Application({"model": stage.model, **state}, stage.model, stage.backward, gathered)


ALIGNMENT = 4


def cuts() -> tuple[list[tuple[str | None, tuple[int, ...]]], int]:
    """All parameters end to end, each begun at a multiple of ALIGNMENT, and the elements of one rank's part."""
    tensors: list[tuple[str | None, tuple[int, ...]]] = []
    for name, shape in shapes().items():
        tensors += [(name, tuple(shape)), (None, (-shape.numel() % ALIGNMENT,))]
    total = sum(math.prod(shape) for _, shape in tensors)
    return tensors, -(-total // dist.get_world_size())


def joined(parts: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Flat tensors of all ranks, end to end, as logical ones."""
    found = {}
    for kind, flats in parts.items():
        if kind == "step":
            found |= {f"step/{name}": flats[0] for name in shapes()}
            continue
        flat, at = torch.cat(flats), 0
        for name, shape in cuts()[0]:
            if name is not None:
                found[f"{kind}/{name}"] = flat[at : at + math.prod(shape)].view(shape).clone()
            at += math.prod(shape)
    return found


def all_parts(own: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {kind: [part[kind] for part in parts] for kind in own}


def zero3() -> Application:
    """Everything in one flat parameter, of which a rank has a run; no module holds it."""
    tensors, size = cuts()
    start = dist.get_rank() * size
    flat = nn.Parameter(torch.zeros(size))
    scale = torch.zeros(3)
    model, names = Model(), list(shapes())
    tied = {"head.weight": "embed.weight"}
    ranges = ckptd.flat_ranges(tensors, start, start + size)
    declared = ckptd.FlatShards([(flat, ranges), (scale, [ckptd.FlatRange("scale", (3,), 0, 3, 0)])], tied=tied)
    state = optimisation([flat])

    def backward() -> float:
        parts = [torch.zeros(size) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, flat.detach())
        values = {k.removeprefix("model/"): v.requires_grad_() for k, v in joined({"model": parts}).items()}
        loss = loss_of(functional_call(model, {**values, "scale": scale}, (TOKENS,)))
        loss.backward()
        pieces = []
        for name, shape in tensors:
            gradient = torch.zeros(shape) if name is None else values[name].grad
            assert gradient is not None
            pieces.append(gradient.flatten())
        whole = torch.cat(pieces)
        whole = torch.nn.functional.pad(whole, (0, dist.get_world_size() * size - len(whole)))
        flat.grad = whole[start : start + size].clone()
        return float(loss.detach())

    def gathered() -> dict[str, torch.Tensor]:
        own = {"model": flat.detach(), **state["optimizer"].state[flat]}
        return {**joined(all_parts(own)), "model/scale": scale.clone()}

    assert [name for name, _ in tensors if name] == names
    return Application({"model": declared, **state}, nn.Module(), backward, gathered, [flat, scale])


def distributed_optimizer() -> Application:
    """As Megatron's: parameters are views of one buffer; a rank's optimizer has the shard of it that it steps."""
    tensors, size = cuts()
    world, start = dist.get_world_size(), dist.get_rank() * size
    buffer = torch.zeros(world * size)
    model, at = Model(), 0
    parameters = dict(model.named_parameters())
    for name, shape in tensors:
        if name is not None:
            parameters[name].data = buffer[at : at + math.prod(shape)].view(shape)
        at += math.prod(shape)
    shard = nn.Parameter(buffer[start : start + size])
    declared = ckptd.FlatShards([(shard, ckptd.flat_ranges(tensors, start, start + size))], values=False)
    state = optimisation([shard])

    def share(*_: Any) -> None:
        parts = [torch.zeros(size) for _ in range(world)]
        dist.all_gather(parts, shard.detach().clone())
        buffer.copy_(torch.cat(parts))

    state["optimizer"].register_step_post_hook(share)

    def backward() -> float:
        model.zero_grad()
        loss = loss_of(model(TOKENS))
        loss.backward()
        pieces = [torch.zeros(shape) if name is None else parameters[name].grad for name, shape in tensors]
        whole = torch.cat([piece.flatten() for piece in pieces if piece is not None])
        whole = torch.nn.functional.pad(whole, (0, world * size - len(whole)))
        shard.grad = whole[start : start + size].clone()
        return float(loss.detach())

    def gathered() -> dict[str, torch.Tensor]:
        found = together({f"model/{name}": p.detach().clone() for name, p in parameters_of(model)})
        return found | joined(all_parts(dict(state["optimizer"].state[shard]))) | {"model/scale": model.scale.clone()}

    return Application({"model": model, "shards": declared, **state}, model, backward, gathered)
