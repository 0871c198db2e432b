"""Two real ranks: shards and replicas, other layouts, saving in the background, and failures of one rank."""

from __future__ import annotations

import gc
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import _async_process_executor as process_executor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import ckptd
from ckptd.core.catalog import Catalog
from ckptd.dcp import StorageReader, StorageWriter
from ckptd.tiers.store import PartWriter, Store, StoredCheckpoint
from tests.api.world import World, succeeded
from tests.dcp.states import Application, blank, copied, directories, equal, failure, mixed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def shard(model: nn.Module) -> None:
    """FSDP2; five rows on two ranks are three and two, one row is one and none."""
    fully_shard(model.first)
    fully_shard(model)


def full(state: Any) -> Any:
    """The same with DTensors gathered."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: full(value) for key, value in state.items()}
    return [full(value) for value in state] if isinstance(state, list) else state


def save_sharded(store: Path) -> dict[str, Any]:
    application = Application(1, wrap=shard)
    application.save(store, step=2)
    return full(application.state())


def load_sharded(store: Path) -> tuple[dict[str, Any], list[float]]:
    application = Application(2, wrap=shard)
    application.load(store)
    return copied(full(application.state())), application.train(2)


def test_shards_on_any_number_of_ranks(two_ranks: World, tmp_path: Path) -> None:
    """FSDP2 on two ranks, there again and in one process; training goes on as if nothing had been."""
    saved = succeeded(two_ranks.run(save_sharded, tmp_path))
    loaded = succeeded(two_ranks.run(load_sharded, tmp_path))
    assert all(equal(state, saved[0]) for state, _ in loaded)
    alone = Application(3)
    alone.load(tmp_path)
    assert equal(alone.state(), saved[0])
    losses = alone.train(2)
    assert losses == pytest.approx(loaded[0][1])
    in_ckptd = Application(4)
    ckptd.load({"model": in_ckptd.model, "optimizer": in_ckptd.optimizer}, tmp_path)
    assert in_ckptd.train(2) == losses


def test_one_process_to_two_ranks(two_ranks: World, tmp_path: Path) -> None:
    application = Application(1)
    application.save(tmp_path)
    loaded = succeeded(two_ranks.run(load_sharded, tmp_path))
    assert all(equal(state, application.state()) for state, _ in loaded)


def shards(value: float) -> dict[str, Any]:
    """A ShardedTensor, as FSDP1 makes them, DTensors of both dimensions, and replicas."""
    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])  # type: ignore[list-item]
    classic = sharded_tensor.full(spec, (5, 3), value)
    mesh = init_device_mesh("cpu", (2,))
    table = torch.arange(35.0).reshape(5, 7) + value
    return {
        "classic": classic,
        "rows": distribute_tensor(table, mesh, [Shard(0)]),
        "columns": distribute_tensor(table, mesh, [Shard(1)]),
        "plain": {str(index): torch.full((1000,), value + index) for index in range(4)},
        "values": [1, value],
    }


def exchange(directory: Path) -> tuple[bool, bool, int]:
    """Saves both ways; whether both come back equal, and in ours and theirs."""
    state = shards(2.0)
    save(state, storage_writer=StorageWriter(directory / "ours"))
    save(state, storage_writer=FileSystemWriter(directory / "theirs"))
    ours, theirs = shards(9.0), shards(9.0)
    load(ours, storage_reader=StorageReader(directory / "ours"))
    load(theirs, storage_reader=FileSystemReader(directory / "theirs"))
    parts = Store.open(directory / "ours").reader(Store.open(directory / "ours").checkpoints()[0]).commit.parts
    return same_shards(ours, state), same_shards(theirs, state), len(parts)


def same_shards(one: dict[str, Any], other: dict[str, Any]) -> bool:
    held = [state["classic"].local_shards()[0].tensor for state in (one, other)]
    others = [{key: full(value) for key, value in state.items() if key != "classic"} for state in (one, other)]
    return torch.equal(*held) and equal(*others)


def test_as_the_file_system_writer(two_ranks: World, tmp_path: Path) -> None:
    """Every kind of shard comes back equal from both, and both ranks have written."""
    assert succeeded(two_ranks.run(exchange, tmp_path)) == [(True, True, 2)] * 2
    loaded = {"classic": torch.zeros(5, 3), "columns": torch.zeros(5, 7), "values": None}
    load(loaded, storage_reader=StorageReader(tmp_path / "ours"))
    assert equal(loaded["classic"], torch.full((5, 3), 2.0))
    assert equal(loaded["columns"], torch.arange(35.0).reshape(5, 7) + 2)
    assert loaded["values"] == [1, 2.0]


def load_counted(store: Path) -> list[str]:
    """The chunks that this rank reads."""
    read: list[str] = []
    original = StoredCheckpoint.read

    def counted(stored: StoredCheckpoint, row: int, into: memoryview) -> None:
        read.append(_described(stored.catalog(), row))
        original(stored, row, into)

    StoredCheckpoint.read = counted  # type: ignore[method-assign]
    try:
        state = {"rows": shards(9.0)["rows"]}
        load(state, storage_reader=StorageReader(store))
    finally:
        StoredCheckpoint.read = original  # type: ignore[method-assign]
    return read


def _described(catalog: Catalog, row: int) -> str:
    return f"{catalog.tensors[catalog.tensor[row]].key}{list(catalog.box(row).offsets)}"


def test_each_rank_reads_its_own(two_ranks: World, tmp_path: Path) -> None:
    succeeded(two_ranks.run(exchange, tmp_path))
    assert succeeded(two_ranks.run(load_counted, tmp_path / "ours")) == [["rows[0, 0]"], ["rows[3, 0]"]]


def save_in_background(store: Path, kind: AsyncCheckpointerType) -> bool:
    """Whether what is loaded is what was there when async_save returned."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children
    state = mixed() | Application(1, wrap=shard).state()
    expected = full(copied(state))
    response = async_save(state, storage_writer=StorageWriter(store, step=4), async_checkpointer_type=kind)
    state["weights"]["large"].zero_()
    state["model"]["first.weight"].zero_()
    response.result()
    loaded = blank(expected)
    load(loaded, storage_reader=StorageReader(store))
    process_executor._CHECKPOINT_PROCESS = None
    gc.collect()
    return equal(loaded, expected)


@pytest.mark.parametrize(
    "kind", [AsyncCheckpointerType.THREAD, pytest.param(AsyncCheckpointerType.PROCESS, marks=pytest.mark.slow)]
)
def test_async_save(two_ranks: World, tmp_path: Path, kind: AsyncCheckpointerType) -> None:
    """By a thread, and by a process that gets a pickled writer."""
    assert succeeded(two_ranks.run(save_in_background, tmp_path, kind)) == [True, True]
    assert ckptd.open(tmp_path).step == 4


def save_damaged(store: Path, how: str) -> tuple[dict[int, tuple[str, str]], list[str]]:
    """A save in which rank 1 fails, or differs, in the way `how`: errors, and what is left when it is over."""
    other = dist.get_rank() == 1
    state: dict[str, Any] = {"w": distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)])}
    path: str | Path = store
    original = PartWriter.write
    if how == "disk" and other:
        PartWriter.write = _full_disk  # type: ignore[method-assign]
    elif how == "path" and other:
        path = store / "elsewhere"
        path.mkdir()
    elif how == "elsewhere":  # where nothing needs to exist before it is written to
        path = f"file+object://{store / 'other'}" if other else f"file+object://{store}"
    elif how == "object":
        state["o"] = object()
    elif how == "paths":
        state |= {"a.b": {"c": state["w"]}} if other else {"a": {"b.c": state["w"]}}
    try:
        errors = failure(lambda: save(state, storage_writer=StorageWriter(path, step=1)))
    finally:
        PartWriter.write = original  # type: ignore[method-assign]
    gc.collect()
    dist.barrier()
    return {rank: (type(error).__name__, str(error)) for rank, error in errors.items()}, directories(store)


def _full_disk(*_: Any, **__: Any) -> None:
    raise ckptd.StoreError("No space left on device")


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ("disk", "StoreError", "No space left"),
        ("path", "ConfigError", "one shared store"),
        ("object", "ConfigError", "o: object"),
        ("elsewhere", "ConfigError", "one shared store"),
        ("paths", "ConfigError", "a.b.c: is ('a.b', 'c') on one rank and ('a', 'b.c') on another"),
    ],
)
def test_one_rank_fails(two_ranks: World, tmp_path: Path, how: str, kind: str, told: str) -> None:
    """Every rank gets the same errors, nothing is committed, and nothing stays."""
    answers = succeeded(two_ranks.run(save_damaged, tmp_path, how))
    assert answers[0] == answers[1]
    errors, left = answers[0]
    found, message = next(iter(errors.values()))
    assert found == kind
    assert told in message
    assert left == []


def load_damaged(store: Path) -> dict[int, str]:
    errors = failure(lambda: load({"w": torch.zeros(8)}, storage_reader=StorageReader(store)))
    return {rank: type(error).__name__ for rank, error in errors.items()}


def test_a_damaged_chunk(two_ranks: World, tmp_path: Path) -> None:
    save({"w": torch.ones(8)}, storage_writer=StorageWriter(tmp_path))
    (path,) = tmp_path.glob("step-*/data/*")
    path.write_bytes(bytes(path.stat().st_size))
    assert succeeded(two_ranks.run(load_damaged, tmp_path)) == [{0: "CorruptionError", 1: "CorruptionError"}] * 2


def load_while_saving(store: Path) -> dict[int, str]:
    """Rank 1 opens a checkpoint that was committed after rank 0 had opened another."""
    reader = StorageReader(store, step=dist.get_rank())
    errors = failure(lambda: load({"n": 0}, storage_reader=reader))
    return {rank: f"{type(error).__name__}: {error}" for rank, error in errors.items()}


def test_ranks_that_see_different_checkpoints(two_ranks: World, tmp_path: Path) -> None:
    for step in (0, 1):
        save({"n": step}, storage_writer=StorageWriter(tmp_path, step=step))
    answers = succeeded(two_ranks.run(load_while_saving, tmp_path))
    assert answers[0] == answers[1]
    assert "StoreError" in answers[0][0]
    assert "different checkpoints" in answers[0][0]
