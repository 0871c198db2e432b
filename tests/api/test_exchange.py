"""Loading by several ranks: every byte is read once, whatever is wanted by whom, on one node or several; and how it
fails: everywhere alike, named, and soon."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ckptd
from ckptd.core.catalog import Catalog
from ckptd.plan.exchange import Readers
from ckptd.tiers.store.posix import PosixInput
from ckptd.tiers.store.reader import StoredCheckpoint
from ckptd.trainer import exchange
from ckptd.trainer.exchange_schedule import Schedule, make_schedule
from ckptd.trainer.restoring import PARTLY_WRITTEN
from tests.api.test_save_load import damage
from tests.api.world import World, succeeded

ROOM = 300_000


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(4, tmp_path_factory.mktemp("four"))
    yield world
    world.close()


# --- the schedule


def catalog_of(sizes: list[int], files: int = 1) -> Catalog:
    """Chunks of these bytes, one after the other in `files` files of equal numbers of chunks."""
    count = len(sizes)
    file = np.arange(count) * files // max(count, 1)
    offset = np.zeros(count, np.int64)
    for row in range(1, count):
        offset[row] = 0 if file[row] != file[row - 1] else -(-(offset[row - 1] + sizes[row - 1]) // 64) * 64
    return Catalog.build(
        [(f"t{row:05}", "uint8", (size,)) for row, size in enumerate(sizes)],
        np.arange(count),
        np.zeros((count, 1)),
        np.array(sizes).reshape(count, 1),
        file=file,
        file_offset=offset,
    )


def check_schedule(schedule: Schedule, wanted: list[set[int]], room: int, catalog: Catalog) -> None:
    """What the module promises."""
    times = Counter(row for rows in wanted for row in rows)
    units = [unit for units in schedule.rounds for unit in units]
    shared = [row for unit in units for row in unit.rows]
    assert sorted(shared) == sorted(row for row, count in times.items() if count > 1 and catalog.raw[row])
    for rank, rows in enumerate(schedule.alone):
        assert set(rows.tolist()) == {row for row in wanted[rank] if times[row] == 1}
    for unit in units:
        assert unit.reader in unit.wanting
        for row in unit.rows:
            assert {rank for rank, rows in enumerate(wanted) if row in rows} == set(unit.wanting)
        assert set(unit.places) == {schedule.nodes[rank] for rank in unit.wanting}
        for node, place in unit.places.items():
            assert place.decoder in unit.wanting
            assert schedule.nodes[place.decoder] == node
        assert unit.places[schedule.nodes[unit.reader]].decoder == unit.reader
    assert schedule.room <= max(room, max((unit.size for unit in units), default=0))
    for of_round in schedule.rounds:
        spans: dict[int, list[tuple[int, int]]] = {}
        for unit in of_round:
            for place in unit.places.values():
                spans.setdefault(place.decoder, []).append((place.offset, place.offset + unit.size))
        for taken in map(sorted, spans.values()):
            assert all(before[1] <= after[0] for before, after in zip(taken, taken[1:], strict=False))
            assert taken[-1][1] <= schedule.room


@pytest.mark.parametrize("seed", range(12))
def test_schedules_keep_their_promises(seed: int) -> None:
    chance = random.Random(seed)
    ranks = chance.randint(2, 7)
    sizes = [chance.choice([0, 1, 64, 5000, 300_000, 3_000_000]) for _ in range(chance.randint(0, 80))]
    catalog = catalog_of(sizes, chance.randint(1, 3))
    wanted = [{row for row in range(len(sizes)) if chance.random() < chance.choice([0.2, 1.0])} for _ in range(ranks)]
    nodes = [chance.randint(0, 2) for _ in range(ranks)]
    rows = [np.array(sorted(mine), np.int64) for mine in wanted]
    schedule = make_schedule(catalog, rows, nodes, 4_000_000)
    check_schedule(schedule, wanted, 4_000_000, catalog)
    again = make_schedule(catalog, rows, nodes, 4_000_000)
    assert (again.rounds, again.room) == (schedule.rounds, schedule.room)


@pytest.mark.parametrize("seed", range(12))
def test_schedules_of_parted_memory_keep_their_promises(seed: int) -> None:
    """Ranks ask for what they cannot read; a unit has one reader that can read all of it, and need not want it."""
    chance = random.Random(seed)
    ranks, places = chance.randint(2, 7), chance.randint(1, 4)
    sizes = [chance.choice([0, 1, 64, 5000, 300_000, 3_000_000]) for _ in range(chance.randint(0, 80))]
    catalog = catalog_of(sizes, chance.randint(1, 3))
    holders = [chance.sample(range(ranks), chance.randint(1, ranks)) for _ in range(places)]
    readers = Readers(np.array([chance.randrange(places) for _ in sizes], np.int64), [sorted(some) for some in holders])
    asked = [
        {row for row, place in enumerate(readers.place) if rank not in holders[place] and chance.random() < 0.7}
        for rank in range(ranks)
    ]
    nodes = [chance.randint(0, 2) for _ in range(ranks)]
    rows = [np.array(sorted(mine), np.int64) for mine in asked]
    load = np.array([chance.randint(0, 10**7) for _ in range(ranks)])
    schedule = make_schedule(catalog, rows, nodes, 4_000_000, readers, load)
    units = [unit for units in schedule.rounds for unit in units]
    shared = [row for unit in units for row in unit.rows]
    assert sorted(shared) == sorted(row for row in set().union(*asked) if catalog.raw[row])
    assert not any(map(len, schedule.alone))
    for unit in units:
        assert unit.reader not in unit.wanting
        for row in unit.rows:
            assert unit.reader in holders[readers.place[row]]
            assert {rank for rank, mine in enumerate(asked) if row in mine} == set(unit.wanting)
        for node, place in unit.places.items():
            assert place.decoder == unit.reader or place.decoder in unit.wanting
            assert schedule.nodes[place.decoder] == node
            assert schedule.staged(unit, node) or [r for r in unit.wanting if nodes[r] == node] == [place.decoder]
        assert {schedule.nodes[rank] for rank in unit.wanting} == set(unit.places)
    for of_round in schedule.rounds:
        busy = Counter[int]()
        for unit in of_round:
            for rank in {unit.reader, *(place.decoder for place in unit.places.values())}:
                busy[rank] += unit.size
        assert max(busy.values()) <= max(4_000_000, *(unit.size for unit in of_round))


def test_reading_is_shared_out_evenly_and_neighbours_stay_together() -> None:
    catalog = catalog_of([1000] * 4000 + [2_000_000] * 40)
    everything = np.arange(len(catalog))
    schedule = make_schedule(catalog, [everything] * 4, [0] * 4, 16_000_000)
    units = [unit for units in schedule.rounds for unit in units]
    load = Counter[int]()
    for unit in units:
        load[unit.reader] += unit.size
    assert max(load.values()) < 1.2 * min(load.values())
    assert len(units) < 60, "small chunks are read many at once"
    assert len(schedule.rounds) <= 3, "all ranks decode in each round"


def test_nodes_that_want_the_same_are_level_in_every_round() -> None:
    """A round ends when one decoder is full, so uneven ones would make many rounds."""
    catalog = catalog_of([1_200_000] * 960)
    everything = np.arange(len(catalog))
    nodes = [0] * 4 + [1] * 4 + [2] * 4
    schedule = make_schedule(catalog, [everything] * 12, nodes, 9_700_000)
    assert 960 / 4 / 8 <= len(schedule.rounds) <= 1.5 * 960 / 4 / 8


def test_rows_travel_as_runs() -> None:
    for rows in ([], [0], [5, 6, 7, 9, 2**27 - 1], list(range(1000))):
        encoded = exchange._encoded(np.array(rows, np.int64))
        assert exchange._decoded(encoded).tolist() == rows
    assert len(exchange._encoded(np.arange(10**6))) == 8


def test_ranks_that_do_not_all_see_each_other_are_nodes_of_their_own() -> None:
    assert exchange._nodes([[0, 1], [0, 1], [2, 3], [2, 3]]) == [0, 0, 2, 2]
    assert exchange._nodes([[0, 1], [1], [2]]) == [0, 1, 2]


# --- real ranks


def values() -> dict[str, torch.Tensor]:
    """Tensors that become many small chunks, some of more than a megabyte, and one with an uneven number of rows."""
    generator = torch.Generator().manual_seed(3)
    sizes = {f"small.{i}": (8 + i % 3, 16) for i in range(40)} | {"odd": (7, 30_000), "wide": (600, 500)}
    made = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return {
        **made,
        "large": torch.randn(1200, 1000, generator=generator),
        "narrow": torch.randn(3, generator=generator),
    }


def laid_out(layout: str) -> dict[str, torch.Tensor]:
    """Zeros in place of `values`: replicated, sharded by rows, or on a mesh of which one dimension replicates."""
    zeros = {key: torch.zeros_like(value) for key, value in values().items()}
    if layout == "replicated":
        return zeros
    if layout == "sharded":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in zeros.items()}
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    return {key: distribute_tensor(value, mesh, [Replicate(), Shard(value.ndim - 1)]) for key, value in zeros.items()}


def load_counted(store: Path, layout: str, nodes: list[str], room: int) -> list[tuple[str, int, int]]:
    """Loads, compares, and returns every read of a file: (name, offset, bytes)."""
    reads: list[tuple[str, int, int]] = []
    original, exchange.ROOM_BYTES = PosixInput.read_into, room

    def counted(self: PosixInput, offset: int, into: memoryview) -> None:
        reads.append((self._path, offset, into.nbytes))
        original(self, offset, into)

    os.environ["CKPTD_NODE"] = nodes[dist.get_rank()]
    PosixInput.read_into = counted  # type: ignore[method-assign]
    state = laid_out(layout)
    try:
        ckptd.load({"w": state}, store)
    finally:
        PosixInput.read_into = original  # type: ignore[method-assign]
        del os.environ["CKPTD_NODE"]
    for key, value in values().items():
        found = state[key].full_tensor() if isinstance(state[key], DTensor) else state[key]
        assert torch.equal(found, value), key
    return reads


def save_sharded(store: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in values().items()}
    ckptd.save({"w": state}, store)


def check_reads(reads: list[tuple[str, int, int]], store: Path) -> None:
    """Every byte of chunks was read once, by whichever rank, and the manifest by one."""
    data = [read for read in reads if read[0].endswith(".ckd")]
    whole = sum(path.stat().st_size for path in store.glob("step-*/data/*.ckd"))
    read = sum(size for _, _, size in data)
    own = 2 * 6000 * 4  # generators of each rank, and alignment
    assert whole - own <= read <= whole
    spans = sorted(data)
    for before, after in zip(spans, spans[1:], strict=False):
        assert before[0] != after[0] or before[1] + before[2] <= after[1], "read twice"
    others = Counter(path for path, _, _ in reads if not path.endswith((".ckd", "COMMIT")))
    assert set(others.values()) == {1}, "manifest and objects are passed on too"


@pytest.mark.parametrize("nodes", ["aa", "ab"])
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_two_ranks_read_what_one_saved_once(two_ranks: World, tmp_path: Path, layout: str, nodes: str) -> None:
    ckptd.save({"w": values()}, tmp_path)
    reads = succeeded(two_ranks.run(load_counted, tmp_path, layout, list(nodes), ROOM))
    check_reads([read for mine in reads for read in mine], tmp_path)
    assert all(any(path.endswith(".ckd") for path, _, _ in mine) for mine in reads), "both read"


@pytest.mark.parametrize(("nodes", "layout"), [("aaaa", "sharded"), ("aabb", "sharded"), ("abca", "mesh")])
def test_four_ranks_read_what_two_saved_once(
    two_ranks: World, four_ranks: World, tmp_path: Path, nodes: str, layout: str
) -> None:
    succeeded(two_ranks.run(save_sharded, tmp_path))
    reads = succeeded(four_ranks.run(load_counted, tmp_path, layout, list(nodes), ROOM))
    check_reads([read for mine in reads for read in mine], tmp_path)


def test_two_ranks_read_what_four_saved_once(two_ranks: World, four_ranks: World, tmp_path: Path) -> None:
    succeeded(four_ranks.run(save_sharded, tmp_path))
    reads = succeeded(two_ranks.run(load_counted, tmp_path, "sharded", ["a", "a"], ROOM))
    check_reads([read for mine in reads for read in mine], tmp_path)


def load_tied(store: Path) -> tuple[list[Any], int]:
    reads: list[Any] = []
    original = StoredCheckpoint.read_run

    def counted(self: StoredCheckpoint, rows: list[int], into: list[memoryview]) -> None:
        reads.extend(rows)
        original(self, rows, into)

    StoredCheckpoint.read_run = counted  # type: ignore[method-assign]
    name = ("first", "second")[dist.get_rank()]
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False)})
    try:
        ckptd.load({"model": model}, store, strict=False)
    finally:
        StoredCheckpoint.read_run = original  # type: ignore[method-assign]
    return reads, int(model[name].weight.sum())


def test_tied_weights_on_two_ranks_are_read_once(two_ranks: World, tmp_path: Path) -> None:
    """As on the first and last stage of a pipeline: two keys, one place."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in ("first", "second")})
    model["second"].weight = model["first"].weight
    torch.nn.init.ones_(model["first"].weight)
    ckptd.save({"model": model}, tmp_path)
    (one, first), (other, second) = succeeded(two_ranks.run(load_tied, tmp_path))
    assert (first, second) == (16, 16)
    assert len(one + other) == 1


# --- failures


def load_damaged(store: Path, nodes: list[str]) -> None:
    os.environ["CKPTD_NODE"] = nodes[dist.get_rank()]
    try:
        ckptd.load({"w": laid_out("replicated")}, store)
    finally:
        del os.environ["CKPTD_NODE"]


@pytest.mark.parametrize("nodes", ["aa", "ab"])
@pytest.mark.parametrize("key", ["w/large", "w/small.7"])
def test_a_damaged_chunk_is_an_error_on_every_rank(two_ranks: World, tmp_path: Path, key: str, nodes: str) -> None:
    """Whoever reads it; the others name it too, and know that their tensors are not what they were."""
    ckptd.save({"w": values()}, tmp_path)
    damage(tmp_path, key)
    for answer in two_ranks.run(load_damaged, tmp_path, list(nodes)):
        assert isinstance(answer, ckptd.CorruptionError)
        assert repr(key) in str(answer)
        assert str(answer).count(PARTLY_WRITTEN) == 1
    succeeded(two_ranks.run(save_sharded, tmp_path / "again"))


def test_a_file_that_is_gone_is_an_error_on_every_rank(two_ranks: World, tmp_path: Path) -> None:
    ckptd.save({"w": values()}, tmp_path)
    next(tmp_path.glob("step-*/data/*.ckd")).unlink()
    for answer in two_ranks.run(load_damaged, tmp_path, ["a", "b"]):
        assert isinstance(answer, ckptd.CorruptionError)
        assert "COMMIT lists it" in str(answer)


def load_changed(store: Path) -> None:
    """A load in which the bytes that rank 0 sends to the other node change on their way."""
    original = StoredCheckpoint.fetch

    def fetch(self: StoredCheckpoint, rows: list[int], stored: memoryview) -> None:
        original(self, rows, stored)
        stored[len(stored) // 2] ^= 1

    if dist.get_rank() == 0:
        StoredCheckpoint.fetch = fetch  # type: ignore[method-assign]
    try:
        load_damaged(store, ["a", "b"])
    finally:
        StoredCheckpoint.fetch = original  # type: ignore[method-assign]


def test_bytes_that_change_between_nodes_are_found(two_ranks: World, tmp_path: Path) -> None:
    ckptd.save({"w": {key: value for key, value in values().items() if key == "large"}}, tmp_path)
    for answer in two_ranks.run(_only_large, tmp_path):
        assert isinstance(answer, ckptd.CorruptionError)
        assert "'w/large'" in str(answer)


def _only_large(store: Path) -> None:
    original = laid_out
    globals()["laid_out"] = lambda layout: {"large": original(layout)["large"]}
    try:
        load_changed(store)
    finally:
        globals()["laid_out"] = original


def load_and_die(store: Path, nodes: list[str]) -> None:
    """Rank 1 is killed in its second step, when the others have messages for it and copy what it decoded."""
    original = exchange._Run._begin

    def begin(self: Any, step: int, work: list[Any]) -> None:
        if dist.get_rank() == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, step, work)

    exchange._Run._begin = begin  # type: ignore[method-assign]
    exchange.ROOM_BYTES = ROOM
    load_damaged(store, nodes)


def test_a_rank_that_is_killed_ends_the_load_of_all_others(tmp_path: Path) -> None:
    """Every other rank hears of it itself: none waits for the timeout, which is beyond that of this test."""
    ckptd.save({"w": values()}, tmp_path / "store")
    world = World(4, tmp_path)
    try:
        answers = world.run(load_and_die, tmp_path / "store", list("aabb"))
    finally:
        world.close()
    for rank in (0, 2, 3):
        assert isinstance(answers[rank], ckptd.DeadlineError), answers[rank]
        assert PARTLY_WRITTEN in str(answers[rank])
