"""Layouts of data and tensor parallelism, each made by torch."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.layouts.applications import (
    RATE,
    Application,
    application,
    gathered_by_fsdp1,
    gathered_by_parameter,
    optimisation,
    with_schedule,
)
from tests.layouts.model import Model


@functools.cache
def mesh_of(*sizes: int) -> DeviceMesh:
    names = {1: ("dp",), 2: ("dp", "tp")}[len(sizes)]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def ddp() -> Application:
    model = DistributedDataParallel(Model())
    return application(model, optimisation(model.parameters()), gathered_by_parameter)


def zero1() -> Application:
    """ZeroRedundancyOptimizer: whole parameters, each with state on one rank."""
    model = DistributedDataParallel(Model())
    options = {"lr": RATE, "betas": (0.8, 0.95), "weight_decay": 0.02}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)
    return application(model, with_schedule(optimizer), gathered_by_parameter)


def fsdp1(use_orig_params: bool, strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD) -> Application:
    options: dict[str, Any] = {
        "use_orig_params": use_orig_params,
        "device_id": torch.device("cpu"),
        "sharding_strategy": strategy,
    }
    if strategy is ShardingStrategy.HYBRID_SHARD:
        options["device_mesh"] = mesh_of(2, 2)
    shards = {ShardingStrategy.NO_SHARD: 1, ShardingStrategy.HYBRID_SHARD: 2}.get(strategy, dist.get_world_size())
    model: Any = Model()
    for number in model.layers:
        model.layers[number] = FullyShardedDataParallel(model.layers[number], **options)
    model = FullyShardedDataParallel(model, **options)
    return application(model, optimisation(model.parameters()), functools.partial(gathered_by_fsdp1, shards))


def fsdp2(*sizes: int) -> Application:
    """One size: FSDP2. Two: HSDP, replicas by shards."""
    model = Model()
    mesh = mesh_of(*sizes)
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model.experts, mesh=mesh, shard_placement_fn=lambda p: Shard(1 if p.shape[1] % sizes[-1] == 0 else 0))
    fully_shard(model, mesh=mesh)
    return application(model, optimisation(model.parameters()), gathered_by_parameter)


def parallelized(mesh: DeviceMesh) -> Model:
    """Rows of `up`, columns of `down`, words of the embedding and the head over tensor parallelism."""
    model = Model()
    whole_result = {"output_layouts": Replicate()}
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(**whole_result),
    }
    for number in model.layers:
        plan[f"layers.{number}.up"] = ColwiseParallel(use_local_output=False)
        plan[f"layers.{number}.down"] = RowwiseParallel()
    parallelize_module(model, mesh, plan)
    model.head.weight = model.embed.weight
    return model


def tensor_parallel() -> Application:
    model = parallelized(mesh_of(dist.get_world_size()))
    return application(model, optimisation(model.parameters(), foreach=False), gathered_by_parameter)


def tensor_parallel_and_fsdp2() -> Application:
    """Rows that are sharded twice are strided."""
    mesh = mesh_of(2, 2)
    model = parallelized(mesh["tp"])
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return application(model, optimisation(model.parameters(), foreach=False), gathered_by_parameter)
