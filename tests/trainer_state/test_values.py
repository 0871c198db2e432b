"""State that is not a module or optimizer: schedulers, scalers, loaders, plain data, generators."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptd.core.errors import ConfigError, MismatchError
from ckptd.format import objects as encoding
from ckptd.trainer.state import AppState, Share
from ckptd.trainer.state_values import maker, unpack
from tests.trainer_state.memory import Memory, resumes_exactly, same_bits

SGD = torch.optim.SGD

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda epoch: 0.9**epoch),
    "one-cycle": lambda o: schedules.OneCycleLR(o, max_lr=0.5, total_steps=10),
    "cosine-restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2),
    "multi-step": lambda o: schedules.MultiStepLR(o, [2, 4, 4]),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.1, 0.5, step_size_up=2),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.CosineAnnealingLR(o, 6)], milestones=[2]
    ),
    "chained": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)]),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("tensor_rate", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tensor_rate: bool) -> None:
    def build() -> dict[str, Any]:
        model = nn.Linear(3, 2)
        rate = torch.tensor(0.1) if tensor_rate else 0.1
        optimizer = SGD(model.parameters(), lr=rate, momentum=0.9, foreach=False)
        return {"model": model, "optimizer": optimizer, "scheduler": SCHEDULERS[name](optimizer)}

    def step(state: MutableMapping[str, Any]) -> None:
        state["optimizer"].zero_grad()
        loss = state["model"](torch.randn(4, 3)).square().mean()
        loss.backward()
        state["optimizer"].step()
        state["scheduler"].step(*([loss.item()] if name == "plateau" else []))

    resumes_exactly(build, step)


def test_multi_step_milestones_stay_a_counter() -> None:
    model = nn.Linear(1, 1)
    optimizer = SGD(model.parameters())
    state = {"model": model, "optimizer": optimizer, "scheduler": schedules.MultiStepLR(optimizer, [2, 2])}
    app = AppState(state)
    Memory.of(app).restore(app)
    assert type(state["scheduler"].milestones) is collections.Counter


def test_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(1))
    scaler.update(8.0)
    memory = Memory.of(AppState({"scaler": scaler}))
    fresh = torch.amp.GradScaler("cpu")
    memory.restore(AppState({"scaler": fresh}))
    assert fresh.state_dict() == scaler.state_dict()


class Rows(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> int:
        return index


def batches(loader: StatefulDataLoader) -> Iterator[list[int]]:
    while True:
        for batch in loader:
            yield batch.tolist()


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("before", [0, 4, 6, 9])
def test_stateful_data_loader(before: int, own_generator: bool) -> None:
    """Shuffled data goes on where it was, and no generator is off by a draw: an iterator draws a seed when made.

    Stored before the first epoch, inside one, after its last batch, and in the second.
    """

    def build() -> dict[str, Any]:
        generator = torch.Generator()
        generator.manual_seed(7)
        own = generator if own_generator else None
        loader: StatefulDataLoader = StatefulDataLoader(Rows(), batch_size=4, shuffle=True, generator=own)
        return {"generator": generator, "loader": loader}

    torch.manual_seed(1)
    state = build()
    app = AppState(state)
    stream = batches(state["loader"])
    for _ in range(before):
        next(stream)
    memory = Memory.of(app)
    drawn = torch.get_rng_state()
    expected = [(next(stream), torch.rand(1).item()) for _ in range(8)]
    torch.manual_seed(2)
    fresh = build()
    memory.restore(AppState(fresh))
    assert torch.equal(drawn, torch.get_rng_state())
    resumed = batches(fresh["loader"])
    assert [(next(resumed), torch.rand(1).item()) for _ in range(8)] == expected


class Averages:
    """An object with tensors in its state dict, nested, as weight averages have."""

    def __init__(self, value: float) -> None:
        self.shadow = {"a/b": [torch.full((50, 100), value), torch.full((8192,), value, dtype=torch.float64)]}
        self.seen = torch.arange(int(value), dtype=torch.int16)
        self.decay = 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "decay": self.decay, "seen": self.seen, 7: "seven"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state[7] == "seven"
        self.shadow, self.decay, self.seen = state["shadow"], state["decay"], state["seen"]


def test_tensors_of_state_dicts() -> None:
    stored = AppState({"ema": Averages(3.0)})
    sources = {source.key: source for source in stored.sources()}
    assert set(sources) == {"ema/shadow/a\\/b/0", "ema/shadow/a\\/b/1"}, "small tensors stay in the object"
    assert all(s.share is Share.PER_RANK and not s.windowed for s in sources.values())
    fresh = Averages(0.0)
    fresh.decay = 0.0
    untouched = fresh.shadow["a/b"][0]
    Memory.of(stored).restore(AppState({"ema": fresh}))
    assert fresh.decay == 0.5
    assert torch.equal(fresh.shadow["a/b"][0], torch.full((50, 100), 3.0))
    assert same_bits(fresh.seen, torch.arange(3, dtype=torch.int16))
    assert fresh.shadow["a/b"][1].dtype == torch.float64
    assert torch.equal(untouched, torch.zeros(50, 100)), "tensors of a state dict are given, not written into"


def test_plain_data_is_restored_in_place() -> None:
    kept_list, kept_dict, kept_array, kept_tensor = [1, 2], {"x": 1, "gone": 2}, np.zeros(3), torch.zeros(2)
    state: dict[str, Any] = {
        "step": 0,
        "best": None,
        "list": kept_list,
        "dict": kept_dict,
        "array": kept_array,
        "nested": {"tensors": [kept_tensor], "model": nn.Linear(1, 1), "pair": (1, {"deep": 2})},
        "late": None,
    }
    stored: dict[str, Any] = {
        "step": 12,
        "best": 0.5,
        "list": [3, (4, 5), {6}],
        "dict": {"y": 1 << 90, "x": float("inf")},
        "array": np.arange(3.0),
        "nested": {"tensors": [torch.ones(2)], "model": nn.Linear(1, 1), "pair": (7, {"deep": torch.float16})},
        "late": torch.arange(4),
    }
    memory = Memory.of(AppState(stored))
    memory.restore(AppState(state))
    assert (state["step"], state["best"]) == (12, 0.5)
    assert state["list"] is kept_list
    assert kept_list == [3, (4, 5), {6}]
    assert state["dict"] is kept_dict
    assert list(kept_dict.items()) == [("y", 1 << 90), ("x", float("inf"))]
    assert state["array"] is kept_array
    assert kept_array.tolist() == [0, 1, 2]
    assert state["nested"]["tensors"][0] is kept_tensor
    assert kept_tensor.tolist() == [1, 1]
    assert state["nested"]["pair"] == (7, {"deep": torch.float16})
    assert torch.equal(state["late"], torch.arange(4))


def test_tuples_are_rebuilt_where_immutable_values_stand_in_them() -> None:
    pair = collections.namedtuple("pair", "model count")
    model = nn.Linear(1, 1)
    state: dict[str, Any] = {"pair": pair(model, 1), "list": [pair(model, 2)]}
    memory = Memory.of(AppState({"pair": pair(nn.Linear(1, 1), 5), "list": [pair(nn.Linear(1, 1), 6)]}))
    memory.restore(AppState(state))
    assert state["pair"] == pair(model, 5)
    assert state["list"] == [pair(model, 6)]
    assert isinstance(state["pair"], pair)


def test_generators_in_the_mapping() -> None:
    def build(seed: int) -> dict[str, Any]:
        torch_generator = torch.Generator()
        torch_generator.manual_seed(seed)
        legacy = np.random.RandomState(seed)
        legacy.standard_normal()
        return {
            "torch": torch_generator,
            "python": random.Random(seed),
            "numpy": np.random.default_rng(seed),
            "legacy": legacy,
        }

    def draw(state: dict[str, Any]) -> list[float]:
        return [
            torch.rand(1, generator=state["torch"]).item(),
            state["python"].random(),
            state["numpy"].random(),
            state["legacy"].standard_normal(),
        ]

    stored, fresh = build(1), build(2)
    memory = Memory.of(AppState(stored))
    memory.restore(AppState(fresh), rng=False)
    assert draw(fresh) == draw(stored)
    swapped = AppState({**fresh, "torch": random.Random(1)})
    swapped.targets(memory.infos, memory.objects)
    with pytest.raises(MismatchError, match="torch: expected the state of a python generator, found torch cpu"):
        swapped.finish(memory.objects, rng=False)


def test_global_generators_to_the_bit() -> None:
    """Also the second number of a Gaussian pair, which Python and NumPy keep for the next call."""
    app = AppState({"x": 1})
    random.gauss(0, 1)
    np.random.standard_normal()
    memory = Memory.of(app)
    assert set(memory.objects) == {"x", "rng/python", "rng/numpy", "rng/torch"}

    def draw() -> tuple[Any, ...]:
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(3).tolist(),
        )

    expected = draw()
    memory.restore(app, rng=True)
    assert draw() == expected
    memory.restore(app, rng=False)
    assert draw() != expected


class Fails:
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("consolidate first")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(state)


class Holds(Fails):
    def __init__(self, value: object) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"foo": [1, {"bar": self.value}]}


def test_unencodable_values_are_named() -> None:
    with pytest.raises(ConfigError, match=r"progress/a/1: <class '.*Fails'> cannot be stored"):
        AppState({"progress": {"a": [1, object.__new__(type("Fails", (), {}))]}})
    with pytest.raises(ConfigError, match="scheduler/foo/1/bar: <class 'function'> cannot be stored"):
        AppState({"scheduler": Holds(lambda: 0)}).sources()
    with pytest.raises(ConfigError, match=r"zero: Fails.state_dict\(\) failed: consolidate first"):
        AppState({"zero": Fails()}).sources()
    with pytest.raises(ConfigError, match=r"sparse/foo/1/bar: layout torch.sparse_coo cannot be stored"):
        AppState({"sparse": Holds(torch.eye(2).to_sparse())}).sources()
    with pytest.raises(ConfigError, match="clash: two keys have the same text"):
        AppState({"clash": {1: nn.Linear(1, 1), "1": 3}})
    with pytest.raises(ConfigError, match="clash/1: two tensors would be stored under this name"):
        AppState({"clash": {1: torch.zeros(1), "1": torch.zeros(1)}})


@pytest.mark.parametrize("name", ["rng", "objects", "", 3])
def test_names_that_cannot_be_used(name: Any) -> None:
    with pytest.raises(ConfigError, match="state: name"):
        AppState({name: 1})


def test_a_failing_load_says_where() -> None:
    app = AppState({"bad": Holds(1)})
    memory = Memory.of(app)
    with pytest.raises(AssertionError) as caught:
        memory.restore(app)
    assert caught.value.__notes__ == ["while restoring bad"]


def test_reference_to_a_missing_tensor() -> None:
    app = AppState({"ema": Averages(1.0)})
    memory = Memory.of(app)
    with pytest.raises(MismatchError, match=r"ema: refers to tensor 'ema/shadow/a.*/0', which the checkpoint does not"):
        app.targets({}, memory.objects)


def test_objects_belong_to_the_moment_that_was_read() -> None:
    """State dicts are read once for tensors and objects, so that the two cannot be of different moments."""
    counting = {"calls": 0}

    class Counting(Averages):
        def state_dict(self) -> dict[str, Any]:
            counting["calls"] += 1
            return super().state_dict()

    app = AppState({"ema": Counting(1.0)})
    app.sources()
    app.objects()
    assert counting["calls"] == 1
    assert app.unchanged()
    assert encoding.decode(app.objects()["ema"])["decay"] == 0.5
    assert counting["calls"] == 2


def test_missing_and_unexpected() -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), momentum=0.9)
    app = AppState({"model": model, "optimizer": optimizer, "ema": Averages(1.0), "step": 3, "w/x": torch.zeros(1)})
    required = {"model/weight", "model/bias", "optimizer/param_groups", "ema", "step", "w\\/x"}
    assert app.required() == required
    assert app.missing({"model/weight", "w\\/x"}, {"ema", "step"}) == ["model/bias", "optimizer/param_groups"]
    known = [
        "optimizer/state/weight/momentum_buffer",
        "optimizer/state/weight",
        "optimizer/param_groups/0/lr",
        "ema/shadow/c",
        "rng/python",
        "objects/rng/python@0",
        "elsewhere/x",
        "w\\/x",
    ]
    strange = ["model/other", "optimizer/state/other/momentum_buffer", "optimizer/odd", "w\\/x/y"]
    assert app.unexpected([*known, *strange]) == sorted(strange)


def test_small_tensors_of_state_dicts_may_change_their_shape() -> None:
    """A loader's buffer has another length at each step and on each rank: no new layout for that. All of it has a
    limit, beyond which tensors are keys again."""
    many = Holds([torch.arange(n, dtype=torch.int32) for n in range(10)])
    app = AppState({"loader": many})
    assert app.sources() == []
    many.value = [torch.tensor(1.5), torch.zeros(0, 3, dtype=torch.bool)]
    assert app.unchanged()
    found = unpack("loader", app.objects(), {}, maker("loader", {}, {}, reuse=False), Share.PER_RANK).value
    small, empty = found["foo"][1]["bar"]
    assert same_bits(small, torch.tensor(1.5))
    assert same_bits(empty, torch.zeros(0, 3, dtype=torch.bool))
    many.value = [torch.zeros(4096) for _ in range(65)]
    assert [source.key for source in app.sources()] == ["loader/foo/1/bar/64"]
