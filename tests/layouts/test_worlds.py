"""What is each rank's own, in the same world and in another: generators, data, schedules, hyperparameters.

Same number of ranks: to the bit. Another: generators that differed are derived, no two alike; all else is rank 0's.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import ckptd
from tests.api.world import World, succeeded
from tests.layouts.model import HIDDEN, WIDTH, Layer

pytestmark = pytest.mark.xdist_group("layouts")  # one set of worlds for all


def rank_and_size() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


class Loader:
    """Each rank is somewhere else."""

    def __init__(self) -> None:
        self.at = -1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def everything() -> dict[str, Any]:
    return {
        "own": {
            "torch": torch.Generator(),
            "python": random.Random(0),
            "numpy": np.random.default_rng(0),
            "legacy": np.random.RandomState(0),
        },
        "common": torch.Generator(),
        "loader": Loader(),
        "counter": {"steps": 0},
    }


def draw(state: dict[str, Any]) -> dict[str, float]:
    """The next number of every generator."""
    own = state["own"]
    return {
        "torch": torch.rand((), dtype=torch.float64).item(),
        "python": random.random(),
        "numpy": float(np.random.rand()),
        "own torch": torch.rand((), dtype=torch.float64, generator=own["torch"]).item(),
        "own python": own["python"].random(),
        "own numpy": float(own["numpy"].random()),
        "own legacy": float(own["legacy"].rand()),
        "common": torch.rand((), dtype=torch.float64, generator=state["common"]).item(),
    }


def save_own(path: Path) -> dict[str, float]:
    rank, _ = rank_and_size()
    state = everything()
    torch.manual_seed(100 + rank)
    random.seed(200 + rank)
    np.random.seed(300 + rank)
    state["own"]["torch"].manual_seed(400 + rank)
    state["own"]["python"].seed(500 + rank)
    state["own"]["numpy"].bit_generator.state = np.random.PCG64(600 + rank).state
    state["own"]["legacy"].seed(700 + rank)
    state["common"].manual_seed(800)
    state["loader"].at = 10 + rank
    state["counter"]["steps"] = 9
    draw(state)
    ckptd.save(state, path, step=9)
    return draw(state)


def load_own(path: Path) -> tuple[dict[str, float], int, int, list[str]]:
    """Numbers drawn, position of the loader, counter, and what was said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckptd.state").addHandler(handler)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    state = everything()
    ckptd.load(state, path, rng=True)
    logging.getLogger("ckptd.state").removeHandler(handler)
    return draw(state), state["loader"].at, state["counter"]["steps"], said


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_same_world_goes_on_where_it_was(worlds: dict[int, World], tmp_path: Path, size: int) -> None:
    saved = succeeded(worlds[size].run(save_own, tmp_path))
    loaded = succeeded(worlds[size].run(load_own, tmp_path))
    assert [numbers for numbers, _, _, _ in loaded] == saved
    assert [(at, steps, said) for _, at, steps, said in loaded] == [(10 + rank, 9, []) for rank in range(size)]


@pytest.mark.parametrize(("size", "other"), [(2, 4), (4, 2), (2, 1), (1, 4)])
def test_another_world_has_new_streams(worlds: dict[int, World], tmp_path: Path, size: int, other: int) -> None:
    """The same ones each time, no two alike, none of those that were saved; what was alike on all ranks stays so."""
    saved = succeeded(worlds[size].run(save_own, tmp_path))
    loaded = succeeded(worlds[other].run(load_own, tmp_path))
    again = succeeded(worlds[other].run(load_own, tmp_path))
    assert again == loaded
    derived = {"torch", "python", "numpy"}
    if size > 1:
        derived |= {"own torch", "own python", "own numpy", "own legacy"}
    for name in saved[0]:
        numbers = [drawn[name] for drawn, _, _, _ in loaded]
        if name in derived:
            assert len(set(numbers)) == other
            assert set(numbers).isdisjoint(drawn[name] for drawn in saved)
        else:
            assert numbers == [saved[0][name]] * other
    assert [(at, steps) for _, at, steps, _ in loaded] == [(10, 9)] * other, "rank 0's"
    said = loaded[0][3]
    assert [line for _, _, _, lines in loaded[1:] for line in lines] == []
    assert len(said) == (1 if size > 1 else 0)
    assert all(line.startswith("loader: differed") for line in said)


class Samples:
    """The recipe of docs/guides/layouts.md: a position in the order of all ranks, and batches that are cut from it."""

    def __init__(self, count: int, batch: int) -> None:
        self.count, self.batch, self.consumed = count, batch, 0

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = rank_and_size()
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(0)).tolist()
        while self.consumed + self.batch <= self.count:
            mine = order[self.consumed : self.consumed + self.batch][rank::world]
            self.consumed += self.batch
            yield mine

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed = state["consumed"]


def consume(path: Path, save: bool) -> list[int]:
    samples = Samples(48, 8)
    if not save:
        ckptd.load({"samples": samples}, path)
        return [index for batch in samples for index in batch]
    batches = iter(samples)
    seen = [index for _ in range(3) for index in next(batches)]
    ckptd.save({"samples": samples}, path)
    return seen


@pytest.mark.parametrize(("size", "other"), [(2, 4), (4, 1)])
def test_a_global_position_is_exact_in_every_world(
    worlds: dict[int, World], tmp_path: Path, size: int, other: int
) -> None:
    before = [index for seen in succeeded(worlds[size].run(consume, tmp_path, True)) for index in seen]
    after = [index for seen in succeeded(worlds[other].run(consume, tmp_path, False)) for index in seen]
    assert (len(before), len(after)) == (24, 24)
    assert sorted(before + after) == list(range(48))


def grouped(held: list[str], rates: dict[str, float]) -> dict[str, Any]:
    """Layers `held` by this rank, and an optimizer with one group for each kind of parameter that it has."""
    model = nn.ModuleDict({name: Layer() for name in held})
    groups = [
        {"params": [p for n, p in model.named_parameters() if (p.ndim > 1) == matrices], "lr": rates[kind]}
        for kind, matrices in (("matrices", True), ("vectors", False))
    ]
    return {"model": model, "optimizer": torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.5)}


def stages(path: Path, rates: dict[str, float] | None) -> list[float]:
    """Two stages, of which the second has no vectors, so that its groups are others; saves, or loads with no rates."""
    rank, _ = rank_and_size()
    state = grouped(["0"], rates or {"matrices": 9.0, "vectors": 9.0})
    if rank == 1:
        model = nn.ModuleDict({"1": nn.ModuleDict({"up": nn.Linear(WIDTH, HIDDEN, bias=False)})})
        rate = rates["matrices"] if rates else 9.0
        state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.5)}
    for parameter in state["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    if rates:
        state["optimizer"].step()
        ckptd.save(state, path)
    else:
        ckptd.load(state, path)
        assert all(len(entry) == 3 for entry in state["optimizer"].state.values())
        state["optimizer"].step()
    return [group["lr"] for group in state["optimizer"].param_groups]


def alone(path: Path, save: bool) -> list[float]:
    """Both stages in one process."""
    model = nn.ModuleDict({"0": Layer(), "1": nn.ModuleDict({"up": nn.Linear(WIDTH, HIDDEN, bias=False)})})
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    rates = (0.25, 0.75) if save else (9.0, 9.0)
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "lr": rates[0]}, {"params": vectors, "lr": rates[1]}], weight_decay=0.5
    )
    state = {"model": model, "optimizer": optimizer}
    if save:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ckptd.save(state, path)
    else:
        ckptd.load(state, path)
        assert len(optimizer.state) == 5
    return [group["lr"] for group in optimizer.param_groups]


def test_groups_of_stages_are_found_by_name(worlds: dict[int, World], tmp_path: Path) -> None:
    """Two stages with different groups -> one process -> two stages."""
    there = succeeded(worlds[2].run(stages, tmp_path / "stages", {"matrices": 0.25, "vectors": 0.75}))
    assert there == [[0.25, 0.75], [0.25]]
    assert succeeded(worlds[1].run(alone, tmp_path / "stages", False)) == [[0.25, 0.75]]
    assert succeeded(worlds[2].run(stages, tmp_path / "stages", None)) == there
    assert succeeded(worlds[1].run(alone, tmp_path / "one", True)) == [[0.25, 0.75]]
    assert succeeded(worlds[2].run(stages, tmp_path / "one", None)) == there


def test_groups_that_differ_cannot_be_one(worlds: dict[int, World], tmp_path: Path) -> None:
    """Stage 0 has stepped its matrices at another rate than stage 1: no one group is right."""
    assert succeeded(worlds[2].run(uneven_rates, tmp_path)) == [None, None]
    (answer,) = worlds[1].run(alone, tmp_path, False)
    assert isinstance(answer, ckptd.MismatchError)
    assert "optimizer/param_groups/0: its parameters are in 2 groups" in str(answer)


def uneven_rates(path: Path) -> None:
    rank, _ = rank_and_size()
    rates = {"matrices": 0.25 + rank, "vectors": 0.75}
    stages(path, rates)
