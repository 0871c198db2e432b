"""save and load on two real ranks: replicas, shards, per-rank state, other layouts, and failures of one rank."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ckptd
from ckptd.tiers.store import PartWriter
from ckptd.trainer import saving
from tests.api.models import Model, application, content, optimisation, same, train
from tests.api.world import World, succeeded


def replicated(seed: int) -> dict[str, Any]:
    """A DDP application whose ranks see different data, so that batch norm's buffers differ."""
    state = application(seed)
    return {**state, "model": DistributedDataParallel(state["model"], broadcast_buffers=False)}


def sharded(seed: int) -> dict[str, Any]:
    """An FSDP2 application; five rows on two ranks are three and two, one row is one and none."""
    torch.manual_seed(seed)
    model = Model()
    fully_shard(model.first)
    fully_shard(model)
    return {"model": model, **optimisation(model)}


def full(found: dict[str, Any]) -> dict[str, Any]:
    """The same content with DTensors gathered."""
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """The same content under the names of the unwrapped model."""
    return {key.replace("model/module.", "model/"): value for key, value in found.items()}


def save_replicated(store: Path) -> dict[str, Any]:
    state = replicated(1)
    train(state, 3, seed=dist.get_rank())
    torch.manual_seed(100 + dist.get_rank())
    state["own"] = {"cursor": dist.get_rank()}
    ckptd.save(state, store, step=3)
    return {**plain(content(state)), "next": torch.rand(()).item()}


def load_replicated(store: Path) -> dict[str, Any]:
    state = replicated(2)
    state["own"] = {"cursor": -1}
    assert ckptd.load(state, store, rng=True) == 3
    assert state["own"] == {"cursor": dist.get_rank()}
    return {**plain(content(state)), "next": torch.rand(()).item()}


def save_sharded(store: Path) -> dict[str, Any]:
    state = sharded(1)
    train(state, 3)
    ckptd.save(state, store, step=3)
    return full(content(state))


def load_sharded(store: Path) -> tuple[dict[str, Any], list[float]]:
    state = sharded(2)
    ckptd.load(state, store)
    return full(content(state)), train(state, 2, seed=7)


def save_damaged(store: Path, how: str) -> None:
    """A save in which rank 1 fails, or differs, in the way `how`."""
    other = dist.get_rank() == 1
    state: dict[str, Any] = {"w": torch.ones(4), "loader": Loader()}
    if how == "write" and other:
        original = PartWriter.write
        PartWriter.write = _full_disk  # type: ignore[method-assign]
        try:
            ckptd.save(state, store, step=1)
        finally:
            PartWriter.write = original  # type: ignore[method-assign]
    elif how == "shape" and other:
        ckptd.save({**state, "w": torch.ones(5)}, store, step=1)
    elif how == "path" and other:
        ckptd.save(state, store / "elsewhere", step=1)
    elif how == "bucket":
        ckptd.save(state, f"file+object://{store}" + "/elsewhere" * other, step=1)
    elif how == "state" and other:
        ckptd.save({**state, "w": object()}, store, step=1)
    else:
        ckptd.save(state, store, step=2 if how == "step" and other else 1)


def _full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


class Loader:
    """State that differs between ranks, with a tensor in it."""

    def __init__(self) -> None:
        self.order = torch.arange(4) + 10 * dist.get_rank()

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "rank": dist.get_rank()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = state["order"]


class Deadly:
    """State whose reading kills rank 1."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def save_and_die(store: Path) -> None:
    ckptd.save({"w": torch.ones(4), "deadly": Deadly()}, store)


def load_mismatched(store: Path) -> None:
    size = 4 if dist.get_rank() == 0 else 5
    state = {"w": torch.full((size,), 3.0)}
    try:
        ckptd.load(state, store)
    finally:
        assert bool((state["w"] == 3).all())


def load_own(store: Path) -> list[int]:
    loader = Loader()
    loader.order = torch.zeros(4, dtype=torch.int64)
    ckptd.load({"loader": loader}, store)
    return loader.order.tolist()


def test_replicas_keep_what_is_each_ranks_own(two_ranks: World, tmp_path: Path) -> None:
    """Batch norm's buffers, generators and plain data come back per rank; another layout takes rank 0's."""
    saved = succeeded(two_ranks.run(save_replicated, tmp_path))
    assert not same(saved[0]["model/norm.running_mean"], saved[1]["model/norm.running_mean"])
    assert saved[0]["next"] != saved[1]["next"]
    loaded = succeeded(two_ranks.run(load_replicated, tmp_path))
    assert same(saved, loaded)
    alone = application(3)
    ckptd.load(alone, tmp_path)
    expected = {key: value for key, value in saved[0].items() if key != "next"}
    assert same(content(alone), expected)


def test_replicas_are_stored_once(two_ranks: World, tmp_path: Path) -> None:
    succeeded(two_ranks.run(save_replicated, tmp_path))
    stored = ckptd.open(tmp_path)
    rows = stored.manifest.select(["key", "rank"]).to_pylist()
    ranks: dict[str, list[int | None]] = {}
    for row in rows:
        ranks.setdefault(row["key"], []).append(row["rank"])
    assert ranks["model/first.weight"] == [None]
    assert ranks["model/norm.num_batches_tracked"] == [None], "equal on both ranks"
    assert sorted(ranks["model/norm.running_mean"], key=str) == [1, None]
    assert "objects/rng/torch@1" in ranks
    assert "objects/optimizer/param_groups@1" not in ranks
    assert len(list(next(tmp_path.glob("step-*")).glob("manifest.parquet/*"))) == 2


def test_uneven_shards_there_and_back(two_ranks: World, tmp_path: Path) -> None:
    """FSDP2 on two ranks -> one process -> FSDP2 on two ranks, bit-exact each way."""
    saved = succeeded(two_ranks.run(save_sharded, tmp_path / "two"))[0]
    again, losses = succeeded(two_ranks.run(load_sharded, tmp_path / "two"))[0]
    assert same(saved, again)
    alone = application(3)
    ckptd.load(alone, tmp_path / "two")
    assert same(content(alone), saved)
    ckptd.save(alone, tmp_path / "one", step=3)
    back, same_losses = succeeded(two_ranks.run(load_sharded, tmp_path / "one"))[0]
    assert same(back, saved)
    assert same_losses == losses


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("write", ckptd.StoreError, "No space left on device"),
        ("shape", ckptd.ConfigError, r"w: replicated float32 \[4\] on rank 0, replicated float32 \[5\] on rank 1"),
        ("state", ckptd.ConfigError, "w"),
        ("path", ckptd.ConfigError, "elsewhere on node .* is not the store that rank 0 opened"),
        ("bucket", ckptd.ConfigError, "elsewhere on node .* is not the store that rank 0 opened"),
        ("step", ckptd.ConfigError, "rank 1 for step=2"),
    ],
)
def test_one_rank_fails_and_so_do_all(
    two_ranks: World, tmp_path: Path, how: str, error: type[Exception], says: str
) -> None:
    answers = two_ranks.run(save_damaged, tmp_path, how)
    assert [type(answer) for answer in answers] == [error, error]
    for answer in answers:
        with pytest.raises(error, match=says):
            raise answer
    assert not list(tmp_path.glob("**/*")), "nothing committed, nothing left"
    succeeded(two_ranks.run(save_damaged, tmp_path, "not at all"))
    assert succeeded(two_ranks.run(load_own, tmp_path)) == [[0, 1, 2, 3], [10, 11, 12, 13]]


def save_twice(store: Path) -> int:
    """Saves one layout twice, with other values; how often that was planned."""
    planned = 0
    original = saving.plan_save

    def counted(pieces: Any) -> Any:
        nonlocal planned
        planned += 1
        return original(pieces)

    saving.plan_save = counted
    try:
        for step in (1, 2):
            ckptd.save({"w": torch.full((4, 3), float(step)), "own": Loader()}, store, step=step)
    finally:
        saving.plan_save = original
    return planned


def test_a_layout_that_is_saved_again_is_not_planned_again(two_ranks: World, tmp_path: Path) -> None:
    assert succeeded(two_ranks.run(save_twice, tmp_path)) == [1, 1]
    for step in (1, 2):
        (path,) = tmp_path.glob(f"step-0000000{step}.*")
        assert bool((ckptd.open(path).read("w") == step).all())


def test_a_mismatch_of_one_rank_is_everybodys(two_ranks: World, tmp_path: Path) -> None:
    ckptd.save({"w": torch.ones(4)}, tmp_path)
    answers = two_ranks.run(load_mismatched, tmp_path)
    assert [type(answer) for answer in answers] == [ckptd.MismatchError] * 2
    assert str(answers[0]) == str(answers[1])
    assert "w: shape [4] in the checkpoint, [5] here" in str(answers[0])


def test_a_rank_that_is_killed_leaves_no_checkpoint_and_nobody_waiting(tmp_path: Path) -> None:
    world = World(2, tmp_path)
    try:
        answer, _ = world.run(save_and_die, tmp_path / "store")
    finally:
        world.close()
    assert isinstance(answer, ckptd.DeadlineError)
    assert "another rank did not take part" in str(answer)
    assert not list((tmp_path / "store").glob("step-*"))
