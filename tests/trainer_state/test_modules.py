"""Names and tensors of modules, and the cheap look for changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ckptd.core.errors import ConfigError
from ckptd.trainer.state import AppState, Share
from tests.trainer_state.memory import Memory, resumes_exactly, same_bits

Adam = torch.optim.Adam


class Tied(nn.Module):
    """A language model's embedding and head, tied; a buffer that is kept and one that is not; a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.head(self.frozen(self.embedding(tokens)))


def test_tied_frozen_and_buffers() -> None:
    def build() -> dict[str, Any]:
        model = Tied()
        return {"model": model, "optimizer": Adam([p for p in model.parameters() if p.requires_grad])}

    def step(state: Any) -> None:
        state["model"](torch.randint(6, (3,))).square().mean().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()

    restored, memory = resumes_exactly(build, step)
    sources = {source.key: source for source in restored.sources()}
    assert {key for key in sources if key.startswith("model/")} == {
        "model/embedding.weight",
        "model/frozen.weight",
        "model/frozen.bias",
        "model/count",
    }
    states = ("step", "exp_avg", "exp_avg_sq")
    assert restored.aliases() == {
        "model/head.weight": "model/embedding.weight",
        **{f"optimizer/state/head.weight/{name}": f"optimizer/state/embedding.weight/{name}" for name in states},
    }
    assert sources["model/count"].share is Share.PER_RANK
    assert sources["model/frozen.weight"].share is Share.REPLICATED
    assert [key for key, s in sources.items() if s.windowed and key.startswith("model/")] == ["model/embedding.weight"]
    assert memory.full("model/count").item() == 3


def test_tied_by_memory_and_across_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data = model[0].weight.data
    app = AppState({"model": model, "first": model[0]})
    assert app.aliases() == {
        "model/1.weight": "model/0.weight",
        "first/weight": "model/0.weight",
        "first/bias": "model/0.bias",
    }
    optimized = AppState({"model": model, "optimizer": torch.optim.SGD(model.parameters())})
    assert len(optimized.objects()["optimizer/param_groups"]) > 0, "each parameter object has a name of its own"


def test_checkpoint_that_knows_only_the_alias() -> None:
    """A checkpoint of an untied model, or of one tied in another order, fills the tied tensor from what it has."""
    model = Tied()
    app = AppState({"model": model})
    memory = Memory.of(app)
    for table in (memory.infos, memory.boxes):
        for place in [p for p in table if "embedding.weight" in str(p)]:
            value = table.pop(place)
            key = "model/head.weight"
            table[(key, place[1]) if isinstance(place, tuple) else key] = (
                value if isinstance(place, tuple) else type(value)(key, *value[1:])
            )
    assert app.missing(memory.infos, memory.objects) == []
    assert app.unexpected(memory.infos) == []
    before = model.embedding.weight.detach().clone()
    nn.init.zeros_(model.embedding.weight)
    memory.restore(app)
    assert same_bits(model.embedding.weight, before)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": torch.compile,
    "activation checkpoint": lambda m: nn.Sequential(checkpoint_wrapper(m[0]), m[1]),
    "data parallel": nn.DataParallel,
    "both": lambda m: torch.compile(nn.DataParallel(m)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_leave_no_trace_in_names(wrapper: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    plain = [source.key for source in AppState({"model": model}).sources()]
    assert [source.key for source in AppState({"model": WRAPPERS[wrapper](model)}).sources()] == plain


def test_a_submodule_called_module_keeps_its_name() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 1))
    assert {source.key for source in AppState({"ema": averaged}).sources()} == {
        "ema/n_averaged",
        "ema/module.weight",
        "ema/module.bias",
    }


class Extra(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


def test_extra_state() -> None:
    model = nn.Sequential(Extra({"scale": torch.ones(5000, dtype=torch.float64), "n": 3}), nn.Sequential(Extra((1, 2))))
    stored = AppState({"model": model, "root": Extra("text")})
    memory = Memory.of(stored)
    assert set(memory.infos) == {"model/_extra_state/0/scale"}
    assert {"model/_extra_state/0", "model/_extra_state/1.0", "root/_extra_state"} <= set(memory.objects)
    fresh = nn.Sequential(Extra(None), nn.Sequential(Extra(None)))
    root = Extra(None)
    memory.restore(AppState({"model": fresh, "root": root}))
    assert fresh[0].value["n"] == 3
    assert same_bits(fresh[0].value["scale"], torch.ones(5000, dtype=torch.float64))
    assert fresh[1][0].value == (1, 2)
    assert root.value == "text"


def test_modules_without_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="model/weight: has no shape yet"):
        AppState({"model": nn.LazyLinear(3)})
    with pytest.raises(ConfigError, match="model/weight: it is on the meta device"):
        AppState({"model": nn.Linear(2, 2, device="meta")}).sources()


def test_changes_are_seen() -> None:
    """Everything that gives a key another memory, or another meaning, ends `unchanged`."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    given = torch.zeros(2)
    state: dict[str, Any] = {
        "model": model, "optimizer": optimizer, "scheduler": scheduler, "given": given, "nets": [model[0]], "n": 1,
    }  # fmt: skip
    app = AppState(state)

    def step() -> None:
        model(torch.randn(3, 2)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        state["n"] += 1

    def changed(change: Callable[[], object]) -> bool:
        app.sources()
        assert app.unchanged()
        change()
        found = not app.unchanged()
        app.sources()
        return found

    assert not AppState(state).unchanged(), "nothing was read yet"
    assert changed(step), "the first step creates optimizer state"
    assert not changed(step)
    assert changed(lambda: optimizer.load_state_dict(optimizer.state_dict()))
    assert not changed(lambda: model[0].weight.data.fill_(1.0))
    assert changed(lambda: setattr(model[0].weight, "data", model[0].weight.data.clone()))
    assert changed(lambda: setattr(model[1], "running_mean", torch.zeros(2)))
    assert changed(lambda: model.append(nn.Linear(2, 2)))
    assert changed(lambda: model.__setitem__(2, nn.Linear(2, 2)))
    assert changed(lambda: model[2].register_buffer("late", torch.zeros(1)))
    assert changed(lambda: optimizer.add_param_group({"params": model[2].parameters()}))
    assert changed(lambda: model[0].weight.requires_grad_(False))
    assert changed(lambda: state.update(given=torch.zeros(2)))
    assert changed(lambda: state.update(n=torch.zeros(2)))
    assert changed(lambda: state.update(new=2))
    assert changed(lambda: state["nets"].append(nn.Linear(1, 1)))
    entry = optimizer.state[model[0].weight]
    assert changed(lambda: entry.update(exp_avg=torch.zeros(2, 2)))
    assert changed(lambda: setattr(entry["exp_avg_sq"], "data", torch.zeros(2, 2)))
    assert changed(optimizer.state.clear)


def test_unchanged_brings_state_dicts_up_to_date() -> None:
    """A state dict gives new tensors at each call: the list that was returned follows them, if the layout is equal."""

    class Average:
        value = torch.zeros(9000)

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    average = Average()
    app = AppState({"average": average})
    (source,) = app.sources()
    average.value = torch.ones(9000)
    assert app.unchanged()
    assert source.tensor.data_ptr() == average.value.data_ptr()
    average.value = torch.ones(9001)
    assert not app.unchanged()


def test_reading_many_tensors_is_fast_enough_to_do_at_every_boundary() -> None:
    """No time is asserted; a quadratic walk would not end. 20,000 tensors with Adam's state are 80,000 sources."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(20_000)])
    optimizer = Adam(model.parameters(), foreach=False)
    for parameter in model:
        optimizer.state[parameter] = {
            "step": torch.zeros(()), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1),
        }  # fmt: skip
    app = AppState({"model": model, "optimizer": optimizer})
    sources = app.sources()
    assert len(sources) == 80_000
    assert app.unchanged()
    memory = {source.key: source for source in sources}
    assert app.unexpected(memory) == []
