"""Every optimizer continues from a snapshot as if nothing had happened, to the last bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
import torch
from torch import nn

from ckptd.core.errors import ConfigError, MismatchError
from ckptd.format import objects as encoding
from ckptd.trainer.state import AppState, Share
from tests.trainer_state.memory import Memory, resumes_exactly, same_bits

optim = torch.optim


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 3))


def step(state: MutableMapping[str, Any]) -> None:
    """One step on data from torch's generator, so that a wrong generator shows too."""
    optimizer = state["optimizer"]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = state["model"](torch.randn(4, 5)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "adamw": lambda p: optim.AdamW(p, lr=1e-2),
    "adam-amsgrad": lambda p: optim.Adam(p, lr=1e-2, amsgrad=True),
    "adam-fused": lambda p: optim.Adam(p, lr=1e-2, fused=True),
    "adam-foreach": lambda p: optim.Adam(p, lr=1e-2, foreach=True),
    "adamw-tensor-lr": lambda p: optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "nadam": lambda p: optim.NAdam(p, lr=1e-2, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": lambda p: optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: optim.Adamax(p, lr=1e-2),
    "adadelta": lambda p: optim.Adadelta(p),
    "adafactor": lambda p: optim.Adafactor(p),
    "sgd": lambda p: optim.SGD(p, lr=1e-2),
    "sgd-momentum": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=1e-2),
    "adagrad": lambda p: optim.Adagrad(p, lr=1e-2, lr_decay=1e-3),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: optim.Rprop(p, lr=1e-2),
    "asgd": lambda p: optim.ASGD(p, lr=1e-2, t0=2),
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.1, max_iter=4, history_size=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_continues_to_the_bit(name: str) -> None:
    def build() -> dict[str, Any]:
        model = network()
        return {"model": model, "optimizer": OPTIMIZERS[name](model.parameters())}

    resumes_exactly(build, step)


def test_snapshot_before_the_first_step_drops_later_state() -> None:
    """Restoring a snapshot from before any step into an optimizer that has stepped must leave it without state."""
    model = network()
    state: dict[str, Any] = {"model": model, "optimizer": optim.Adam(model.parameters())}
    app = AppState(state)
    memory = Memory.of(app)
    assert not any(key.startswith("optimizer/state") for key in memory.infos)
    step(state)
    assert state["optimizer"].state
    memory.restore(app)
    assert not state["optimizer"].state
    assert Memory.of(app).objects == memory.objects


def test_keys_and_shares() -> None:
    model = network()
    state: dict[str, Any] = {"model": model, "optimizer": optim.AdamW(model.parameters(), lr=torch.tensor(0.1))}
    step(state)
    sources = {source.key: source for source in AppState(state).sources()}
    assert set(sources) == {
        *(f"model/{n}" for n in ("0.weight", "0.bias", "3.weight", "3.bias")),
        *(
            f"optimizer/state/{n}/{s}"
            for n, s in itertools.product(
                ("0.weight", "0.bias", "3.weight", "3.bias"), ("step", "exp_avg", "exp_avg_sq")
            )
        ),
        "optimizer/param_groups/0/lr",
    }
    assert all(source.share is Share.REPLICATED for source in sources.values())
    windowed = {key for key, source in sources.items() if source.windowed}
    assert windowed == set(sources) - {"optimizer/param_groups/0/lr"}


def test_state_keeps_its_dtype_under_other_parameters() -> None:
    """Optimizer.load_state_dict would cast fp32 moments to the parameters' bfloat16."""

    class Moments(optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                moment = self.state[p].setdefault("moment", torch.zeros(p.shape, dtype=torch.float32))
                moment += 0.1
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p.data -= moment.to(p.dtype)

    def build() -> dict[str, Any]:
        model = network().to(torch.bfloat16)
        return {"model": model, "optimizer": Moments(model.parameters())}

    restored, memory = resumes_exactly(build, lambda state: state["optimizer"].step())
    assert memory.infos["optimizer/state/0.weight/moment"].dtype == "float32"
    assert memory.infos["model/0.weight"].dtype == "bfloat16"
    assert encoding.decode(memory.objects["optimizer/state/0.weight"]) == {"count": 3}
    assert restored.optimizers()[0].state[restored.optimizers()[0].param_groups[0]["params"][0]]["count"] == 6


def test_groups_are_matched_by_parameters_and_keep_the_implementation() -> None:
    """Hyperparameters come from the checkpoint; how they are computed (fused, foreach) is the program's own choice."""
    model = network()
    first, second = model[0], model[3]

    def build(**options: Any) -> optim.Optimizer:
        return optim.Adam([{"params": first.parameters(), "lr": 0.1}, {"params": second.parameters()}], **options)

    stored = build(foreach=True)
    stored.param_groups[1]["lr"] = 0.7
    stored.param_groups[0]["initial_lr"] = 0.5
    memory = Memory.of(AppState({"model": model, "optimizer": stored}))
    other = build(fused=True)
    memory.restore(AppState({"model": model, "optimizer": other}))
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.7]
    assert other.param_groups[0]["initial_lr"] == 0.5
    assert [group["fused"] for group in other.param_groups] == [True, True]
    assert encoding.decode(memory.objects["optimizer/param_groups"])[1]["params"] == ["3.weight", "3.bias"]

    merged = AppState({"model": model, "optimizer": optim.Adam(model.parameters())})
    with pytest.raises(MismatchError, match=r"param_groups/0.*2 groups"):
        merged.targets(memory.infos, memory.objects)


def test_tensor_rate_is_filled_in_place() -> None:
    """Compiled and captured steps read the tensor; a schedule of numbers in the checkpoint must reach it."""
    model = network()
    rate = torch.tensor(0.5)
    state: dict[str, Any] = {"model": model, "optimizer": optim.Adam(model.parameters(), lr=rate)}
    app = AppState(state)
    memory = Memory.of(app)
    rate.fill_(9.0)
    memory.restore(app)
    assert state["optimizer"].param_groups[0]["lr"] is rate
    assert rate.item() == 0.5
    number = Memory.of(AppState({"model": model, "optimizer": optim.Adam(model.parameters(), lr=0.25)}))
    number.restore(app)
    assert state["optimizer"].param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


def test_one_optimizer_for_each_parameter() -> None:
    """Optimizers in the backward pass: a dict of optimizers by parameter."""

    def build() -> dict[str, Any]:
        model = network()
        return {"model": model, "optimizers": {n: optim.Adam([p]) for n, p in model.named_parameters()}}

    def backward(state: MutableMapping[str, Any]) -> None:
        state["model"](torch.randn(4, 5)).square().mean().backward()
        for optimizer in state["optimizers"].values():
            optimizer.step()
            optimizer.zero_grad()

    restored, memory = resumes_exactly(build, backward)
    assert "optimizers/0.weight/state/0.weight/exp_avg" in memory.infos
    assert len(restored.optimizers()) == 4


def test_two_modules_one_optimizer_and_equal_names() -> None:
    """A name that stands for two parameters gets its module in front, in the optimizer only."""

    def build() -> dict[str, Any]:
        nets = {"actor": nn.Linear(3, 2), "critic": nn.Sequential(nn.Linear(3, 1))}
        nets["target"] = nn.Linear(3, 2)
        parameters = [p for net in nets.values() for p in net.parameters()]
        return {"nets": nets, "optimizer": optim.Adam(parameters)}

    def train(state: MutableMapping[str, Any]) -> None:
        data = torch.randn(4, 3)
        state["optimizer"].zero_grad()
        sum(net(data).square().mean() for net in state["nets"].values()).backward()
        state["optimizer"].step()

    _, memory = resumes_exactly(build, train)
    names = {key.split("/")[2] for key in memory.infos if key.startswith("optimizer/state")}
    assert names == {
        *(f"nets.{net}.{tensor}" for net in ("actor", "target") for tensor in ("weight", "bias")),
        "0.weight",
        "0.bias",
    }
    assert "nets/critic/0.weight" in memory.infos


def test_optimizer_with_its_own_state_dict_is_stored_through_it() -> None:
    class Own(optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {"inner": super().state_dict(), "more": torch.arange(3.0)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            assert torch.equal(state_dict["more"], torch.arange(3.0))
            super().load_state_dict(state_dict["inner"])

    def build() -> dict[str, Any]:
        model = network()
        return {"model": model, "optimizer": Own(model.parameters(), lr=0.1, momentum=0.9)}

    _, memory = resumes_exactly(build, step)
    assert "optimizer/more" in memory.infos


def test_parameter_in_no_module() -> None:
    model = network()
    stray = nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match=r"optimizer: parameter 4 of group 0, shape \(3,\), is in no module"):
        AppState({"model": model, "optimizer": optim.SGD([*model.parameters(), stray])})
    given = AppState({"model": model, "stray": stray, "optimizer": optim.SGD([*model.parameters(), stray])})
    assert {source.key: source.windowed for source in given.sources()}["stray"]


def test_reading_creates_no_state_and_draws_nothing() -> None:
    model = network()
    state: dict[str, Any] = {"model": model, "optimizer": optim.Adam(model.parameters())}
    weights = [p.clone() for p in model.parameters()]
    before = torch.get_rng_state()
    app = AppState(state)
    app.sources()
    app.objects()
    assert len(state["optimizer"].state) == 0
    assert torch.equal(before, torch.get_rng_state())
    assert all(same_bits(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_entries_of_no_parameter() -> None:
    """Optimizers may keep things under keys of their own; torch copies them as they are."""
    model = network()
    optimizer = optim.SGD(model.parameters())
    optimizer.state["global"] = {"seen": 3, "scale": torch.tensor([2.0])}
    memory = Memory.of(AppState({"model": model, "optimizer": optimizer}))
    assert memory.infos["optimizer/other/global/scale"].shape == (1,)
    fresh = optim.SGD(model.parameters())
    memory.restore(AppState({"model": model, "optimizer": fresh}))
    assert fresh.state["global"]["seen"] == 3
    assert torch.equal(fresh.state["global"]["scale"], torch.tensor([2.0]))
