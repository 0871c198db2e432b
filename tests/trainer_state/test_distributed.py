"""State over two ranks: DDP, FSDP2, ZeRO, DTensors. Each case runs on both ranks of one world."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ckptd.core.catalog import TensorInfo
from ckptd.core.errors import ConfigError
from ckptd.trainer.state import AppState, Share
from tests.api.world import World, succeeded
from tests.trainer_state.memory import Memory, resumes_exactly, same_bits, same_tensors

Adam = torch.optim.AdamW


class Net(nn.Module):
    """Shapes that two ranks split evenly (8), unevenly (5), and not at all (1)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 8)
        self.odd = nn.Linear(8, 5)
        self.one = nn.Linear(5, 1, bias=False)
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.dropout(self.wide(data).tanh(), 0.2, self.training)
        return self.one(self.odd(hidden) * self.frozen)


def step(state: Any) -> None:
    state["optimizer"].zero_grad()
    state["model"](torch.randn(4, 4) + dist.get_rank()).square().mean().backward()
    state["optimizer"].step()


def gathered(memory: Memory) -> Memory:
    """The boxes of all ranks together, as a store has them; objects and per-rank tensors are rank 0's."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (memory.boxes, [tuple(info) for info in memory.infos.values()], memory.objects))
    boxes = {place: tensor for held, _, _ in reversed(parts) for place, tensor in held.items()}
    infos = {info[0]: TensorInfo(*info) for _, known, _ in reversed(parts) for info in known}
    return Memory(boxes, infos, parts[0][2])


def data_parallel() -> None:
    def build() -> dict[str, Any]:
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))
        model = DistributedDataParallel(net)
        return {"model": model, "optimizer": Adam(model.parameters())}

    restored, memory = resumes_exactly(build, step)
    sources = {source.key: source for source in restored.sources()}
    assert "model/0.weight" in sources
    assert sources["model/0.weight"].share is Share.REPLICATED
    assert sources["model/1.running_mean"].share is Share.PER_RANK
    means: list[Any] = [None, None]
    dist.all_gather_object(means, memory.full("model/1.running_mean"))
    assert not torch.equal(*means), "ranks' buffers differ, so a rank needs its own"


def sharded_model() -> dict[str, Any]:
    net = Net()
    fully_shard(net.odd)
    fully_shard(net)
    return {"model": net, "optimizer": Adam(net.parameters(), lr=1e-2)}


def fully_sharded() -> None:
    restored, memory = resumes_exactly(sharded_model, step)
    rank = dist.get_rank()
    sources = {source.key: source for source in restored.sources()}
    odd = sources["optimizer/state/odd.weight/exp_avg"]
    assert odd.share is Share.SHARDED
    assert odd.shape == (5, 8)
    assert (odd.box.offsets, odd.box.sizes) == (((0, 0), (3, 8)), ((3, 0), (2, 8)))[rank]
    assert sources["model/one.weight"].box.elements == (5, 0)[rank]
    assert not sources["model/frozen"].windowed
    assert sources["optimizer/state/odd.weight/step"].share is Share.REPLICATED
    whole = gathered(memory)
    assert whole.infos["model/odd.weight"].shape == (5, 8)


def after_an_evaluation() -> None:
    """After a forward without backward the modules show unsharded parameters: the sharded ones are what is stored,
    and a restore must not leave the stale unsharded ones for the next forward."""
    state = sharded_model()
    app = AppState(state)
    step(state)
    expected = Memory.of(app)
    data = torch.ones(2, 4)
    state["model"].eval()
    with torch.no_grad():
        state["model"](data)
    assert not isinstance(state["model"].wide.weight, DTensor), "the case this test is about"
    fresh = AppState(state)
    assert app.unchanged()
    found = Memory.of(fresh)
    assert found.boxes.keys() == expected.boxes.keys()
    assert all(same_bits(found.boxes[place], tensor) for place, tensor in expected.boxes.items())
    assert not isinstance(state["model"].wide.weight, DTensor), "reading moves nothing"

    other = sharded_model()
    with torch.no_grad():
        other["model"](data)
    found.restore(AppState(other))
    with torch.no_grad():
        assert same_bits(other["model"].eval()(data), state["model"](data))


def between_layouts() -> None:
    """What two ranks stored, a plain model loads, trains on, and the shards of two ranks load again."""
    state = sharded_model()
    for _ in range(2):
        step(state)
    stored = gathered(Memory.of(AppState(state)))
    net = Net()
    plain: dict[str, Any] = {"model": net, "optimizer": Adam(net.parameters(), lr=1e-2)}
    app = AppState(plain)
    assert app.missing(stored.infos, stored.objects) == []
    assert app.unexpected([*stored.infos, *stored.objects]) == []
    stored.restore(app)
    for name, parameter in state["model"].named_parameters():
        assert same_bits(parameter.full_tensor(), net.get_parameter(name))
        if parameter.requires_grad:
            moment = state["optimizer"].state[parameter]["exp_avg"]
            assert same_bits(moment.full_tensor(), plain["optimizer"].state[net.get_parameter(name)]["exp_avg"])
    again = sharded_model()
    Memory.of(app).restore(AppState(again))
    for name, parameter in state["model"].named_parameters():
        assert same_bits(parameter.to_local(), again["model"].get_parameter(name).to_local())


def partitioned_optimizer() -> None:
    """ZeroRedundancyOptimizer: the state of each parameter exists on one rank, and no consolidation is needed."""

    def build() -> dict[str, Any]:
        net = Net()
        trained = [p for p in net.parameters() if p.requires_grad]
        model = DistributedDataParallel(net)
        return {"model": model, "optimizer": ZeroRedundancyOptimizer(trained, torch.optim.Adam, lr=1e-2)}

    restored, memory = resumes_exactly(build, step)
    keys: list[Any] = [None, None]
    dist.all_gather_object(keys, {key for key in memory.infos if key.startswith("optimizer/state")})
    assert keys[0]
    assert keys[1]
    assert keys[0].isdisjoint(keys[1])
    assert {key.split("/")[2] for held in keys for key in held} == {
        "wide.weight", "wide.bias", "odd.weight", "odd.bias", "one.weight",
    }  # fmt: skip
    shares = {s.share for s in restored.sources() if s.key.startswith("optimizer/state")}
    assert shares == {Share.SHARDED}
    assert restored.unexpected(gathered(memory).infos) == []


class LocalMoment(torch.optim.Optimizer):
    """Works on local shards, and keeps plain tensors of their shape, one row of statistics, and a DTensor."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                mesh = p.device_mesh
                state["moment"] = torch.zeros_like(p.to_local(), dtype=torch.float64)
                state["total"] = DTensor.from_local(torch.zeros(3), mesh, [Replicate()], run_check=False)
            state["moment"] += p.grad.to_local()
            state["total"] += 1
            p.data.to_local().sub_(0.1 * state["moment"])


def optimizer_of_local_shards() -> None:
    """A plain state tensor of a DTensor parameter's local shape is a shard, not a replica."""

    def build() -> dict[str, Any]:
        net = Net()
        fully_shard(net)
        return {"model": net, "optimizer": LocalMoment(net.parameters())}

    restored, memory = resumes_exactly(build, step)
    sources = {source.key: source for source in restored.sources()}
    moment = sources["optimizer/state/odd.weight/moment"]
    assert moment.share is Share.SHARDED
    assert moment.shape == (5, 8)
    assert moment.box.sizes == ((3, 8), (2, 8))[dist.get_rank()]
    optimizer = restored.optimizers()[0]
    assert isinstance(next(iter(optimizer.state.values()))["total"], DTensor)
    assert gathered(memory).full("optimizer/state/odd.weight/moment").abs().min() > 0


def given_dtensors() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(10.0).reshape(5, 2)
    state: dict[str, Any] = {
        "shard": distribute_tensor(whole, mesh, [Shard(0)]),
        "replica": distribute_tensor(whole, mesh, [Replicate()]),
        "data": {"nested": [distribute_tensor(whole, mesh, [Shard(1)])]},
    }
    memory = gathered(Memory.of(AppState(state)))
    assert all(same_bits(memory.full(key), whole) for key in ("shard", "replica", "data/nested/0"))
    empty = {name: distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)]) for name in ("shard", "replica")}
    fresh: dict[str, Any] = {**empty, "data": {"nested": [distribute_tensor(torch.zeros(5, 2), mesh, [Replicate()])]}}
    memory.restore(AppState(fresh))
    assert all(same_bits(value.full_tensor(), whole) for value in (*empty.values(), fresh["data"]["nested"][0]))

    partial = DTensor.from_local(whole, mesh, [Partial()], run_check=False)
    with pytest.raises(ConfigError, match=r"sum: placement .* still pending"):
        AppState({"sum": partial}).sources()


class Shadow:
    """A weight average of a sharded model: DTensors in a state dict."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["value"] is not self.value
        self.value = state["value"]


def dtensors_in_state_dicts() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(10.0).reshape(5, 2)
    memory = gathered(Memory.of(AppState({"ema": Shadow(distribute_tensor(whole, mesh, [Shard(0)]))})))
    fresh = Shadow(distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)]))
    memory.restore(AppState({"ema": fresh}))
    assert isinstance(fresh.value, DTensor)
    assert same_bits(fresh.value.full_tensor(), whole)
    assert fresh.value.to_local().shape == ((3, 2), (2, 2))[dist.get_rank()]


def flat_sharded(use_orig_params: bool, strategy: ShardingStrategy, mixed: bool = False) -> None:
    """FSDP1: the parts of a flat parameter are stored under the names of the unwrapped module, the optimizer's too.
    With mixed precision it is what the optimizer steps that is stored, not what forwards compute with."""

    def build() -> dict[str, Any]:
        net: Any = Net()
        net.frozen.requires_grad_(True)
        net.odd = torch.nn.Conv2d(8, 5, (3, 2)).to(memory_format=torch.channels_last)
        net.forward = lambda data: net.one(net.odd(net.wide(data)[:, :, None, None].expand(-1, -1, 3, 2))[..., 0, 0])
        options: Any = {"use_orig_params": use_orig_params, "sharding_strategy": strategy}
        options["device_id"] = torch.device("cpu")
        if mixed:
            options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        net.odd = FullyShardedDataParallel(net.odd, **options)
        model = FullyShardedDataParallel(net, **options)
        return {"model": model, "optimizer": Adam(model.parameters(), lr=1e-2)}

    torch.manual_seed(1)
    state, fresh = build(), build()
    for _ in range(2):
        step(state)
    app, restored = AppState(state), AppState(fresh)
    whole = gathered(Memory.of(app))
    whole.objects = app.objects()
    assert restored.missing(whole.infos, whole.objects) == []
    assert restored.unexpected([*whole.infos, *whole.objects]) == []
    for _ in range(2):
        step(state)
    whole.restore(restored)
    for _ in range(2):
        step(fresh)
    same_tensors(app, restored)
    model, whole = fresh["model"], gathered(Memory.of(restored))
    names = {"wide.weight", "wide.bias", "odd.weight", "odd.bias", "one.weight", "frozen"}
    assert {key for key in whole.infos if key.startswith("model/")} == {f"model/{name}" for name in names}
    assert whole.infos["optimizer/state/odd.weight/exp_avg"].shape == (5, 8, 3, 2)
    assert whole.infos["optimizer/state/odd.weight/step"].shape == ()
    assert whole.infos["model/odd.weight"].dtype == "float32"
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, parameter in model.named_parameters():
            found = whole.full(f"model/{name.replace('_fsdp_wrapped_module.', '')}")
            assert same_bits(found, parameter.detach()), name


def flat_after_an_evaluation() -> None:
    """A forward without backward leaves gathered parameters: neither are they stored, nor do they stay for the next
    forward after a restore."""

    def build() -> dict[str, Any]:
        options: Any = {"use_orig_params": True, "device_id": torch.device("cpu")}
        options["sharding_strategy"] = ShardingStrategy.SHARD_GRAD_OP
        model = FullyShardedDataParallel(nn.Linear(4, 5), **options)
        return {"model": model, "optimizer": Adam(model.parameters(), lr=1e-2)}

    state, data = build(), torch.ones(2, 4)
    app = AppState(state)
    step(state)
    expected = Memory.of(app)
    loss = state["model"](data)
    found = Memory.of(AppState(state))
    assert found.boxes.keys() == expected.boxes.keys()
    assert all(same_bits(found.boxes[place], tensor) for place, tensor in expected.boxes.items())
    other = build()
    other["model"](data)
    found.restore(AppState(other))
    assert same_bits(other["model"](data).detach(), loss.detach())


CASES: list[Callable[[], None]] = [
    data_parallel,
    fully_sharded,
    after_an_evaluation,
    between_layouts,
    partitioned_optimizer,
    optimizer_of_local_shards,
    given_dtensors,
    dtensors_in_state_dicts,
    functools.partial(flat_sharded, True, ShardingStrategy.FULL_SHARD),
    functools.partial(flat_sharded, False, ShardingStrategy.FULL_SHARD),
    functools.partial(flat_sharded, False, ShardingStrategy.NO_SHARD),
    functools.partial(flat_sharded, True, ShardingStrategy.FULL_SHARD, mixed=True),
    functools.partial(flat_sharded, False, ShardingStrategy.SHARD_GRAD_OP, mixed=True),
    flat_after_an_evaluation,
]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(two_ranks: World, case: Callable[[], None]) -> None:
    succeeded(two_ranks.run(case))
