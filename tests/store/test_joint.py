"""One checkpoint written by several nodes: what a reader finds, what is refused, and what happens again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from ckptd.core.errors import StoreError
from ckptd.core.native import crc32c
from ckptd.tiers.store import Store, joint
from ckptd.tiers.store.files import FileBackEnd
from ckptd.tiers.store.joint import Contribution, NodeWriter, Rows
from ckptd.tiers.store.names import checkpoint, data_file, lists, manifest_part
from ckptd.tiers.store.pipeline import copying
from ckptd.tiers.store.writer import Pace
from tests.simulated_disk import SimulatedDisk
from tests.store.samples import (
    JOB,
    OWN,
    Memory,
    contributions,
    equal,
    identity,
    jointly,
    read,
    shared_objects,
    tensors,
    write,
    write_jointly,
)

NAME = identity(1)
DIRECTORY = checkpoint(NAME)


@pytest.fixture
def stores(every_store: Store) -> list[Store]:
    """One place as three nodes see it."""
    return [every_store, *(Store(every_store.back_end, every_store.uri) for _ in range(2))]


@pytest.fixture
def disk() -> list[Store]:
    """The same, in memory."""
    return [Store(FileBackEnd(SimulatedDisk()), "simulated")] * 3


def put(stores: list[Store], number: int, parts: int = 3, node: str = "", **changes: object) -> None:
    """Node `number` writes."""
    given = contributions(NAME, tensors(), len(stores))[number]._replace(**changes)
    writer = NodeWriter(stores[number], NAME, JOB, node or f"node-{number}", number, parts)
    writer.write(given, Pace())


def files(store: Store) -> set[str]:
    """All of a checkpoint but the directories."""
    found = set()
    for name, is_directory in store.back_end.list((DIRECTORY,)):
        inner = store.back_end.list((DIRECTORY, name)) if is_directory else []
        found |= {f"{name}/{entry.name}" for entry in inner} if is_directory else {name}
    return found


def test_it_is_a_checkpoint_like_any_other(stores: list[Store]) -> None:
    write_jointly(stores, NAME, tensors())
    with stores[1].reader(NAME) as stored:
        assert equal(read(stored), jointly(tensors(), 3))
        assert stored.verify() == []
        assert stored.objects().keys() == {*shared_objects(), "loader"}
        assert [part.writer for part in stored.commit.parts] == [0, 1, 2, 3, 6]
        assert set(stored.catalog().rank.tolist()) == {-1}
    assert (stores[0].checkpoints(), stores[0].broken()) == ([NAME], [])
    listed = {f"manifest.parquet/w0000{n}.parquet" for n in (0, 1, 2, 3, 6)} | {"COMMIT", "objects.msgpack"}
    assert files(stores[0]) == listed | {f"data/w0000{n}-00000.ckd" for n in (0, 1, 2, 3, 6)}
    assert stores[0].clean() == []
    write(stores[0], identity(2), {})
    assert stores[0].prune(keep=1) == [NAME]
    assert {entry.name for entry in stores[0].back_end.list(())} == {checkpoint(identity(2))}


def test_all_nodes_write_at_once(every_store: Store) -> None:
    """Each makes the directories that are missing, and finds those that another was faster to make."""
    if every_store.uri == "simulated":
        pytest.skip("of one thread")
    nodes = 6
    given = contributions(NAME, tensors(), nodes)
    begin = threading.Barrier(nodes, timeout=30)

    def write_one(number: int) -> None:
        store = Store(every_store.back_end, every_store.uri)
        begin.wait()
        writer = NodeWriter(store, NAME, JOB, f"node-{number}", number, nodes)
        writer.write(given[number], Pace())

    with ThreadPoolExecutor(nodes) as pool:
        assert list(pool.map(write_one, range(nodes), timeout=60)) == [None] * nodes
    joint.commit(every_store, NAME, JOB, nodes)
    with every_store.reader(NAME) as stored:
        assert equal(read(stored), jointly(tensors(), nodes))
        assert stored.verify() == []


def test_nothing_exists_before_commit_and_a_leftover_goes(stores: list[Store]) -> None:
    for number in range(3):
        put(stores, number)
    assert stores[2].checkpoints() == []
    assert not stores[2].committed(NAME)
    assert stores[0].clean() == [DIRECTORY]
    assert stores[0].broken() == []
    with pytest.raises(StoreError, match="node number 0 of 3 has left no list"):
        joint.commit(stores[0], NAME, JOB, 3)


def test_again_costs_nothing_and_changes_nothing(stores: list[Store]) -> None:
    for number in range(3):
        put(stores, number)
    before = {name: stores[0].back_end.open((DIRECTORY, *name.split("/"))).modified for name in files(stores[0])}
    assert all(NodeWriter(stores[n], NAME, JOB, f"node-{n}", n, 3).is_done() for n in range(3))
    assert not NodeWriter(stores[1], NAME, JOB, "another machine", 1, 3).is_done()
    assert not NodeWriter(stores[1], NAME, JOB, "node-1", 1, 4).is_done()
    write_jointly(stores, NAME, tensors())
    after = {name: stores[0].back_end.open((DIRECTORY, *name.split("/"))).modified for name in files(stores[0])}
    data = {name for name in after if name.startswith("data") and name in before}
    assert len(data) == 4
    assert {name: after[name] for name in data} == {name: before[name] for name in data}
    for number in range(3):
        assert NodeWriter(stores[number], NAME, JOB, "another machine", number, 3).is_done(), "COMMIT is there"
    with pytest.raises(StoreError, match="left no list"):
        joint.commit(stores[0], NAME, JOB, 3)
    assert stores[0].committed(NAME)


def test_what_another_number_of_nodes_has_left_is_no_part_of_it(stores: list[Store]) -> None:
    for number in range(3):
        put(stores, number)
    write_jointly(stores[:2], NAME, tensors())
    with stores[0].reader(NAME) as stored:
        assert equal(read(stored), jointly(tensors(), 2))
        assert stored.verify() == []
    assert {name for name in files(stores[0]) if "w00005" in name or name.startswith("written")} == set()


def test_lists_that_a_killed_root_has_left_are_swept(stores: list[Store]) -> None:
    for number in range(3):
        put(stores, number)
    joint.commit(stores[0], NAME, JOB, 3)
    assert any(name.startswith("written/") for name in files(stores[0]))
    assert stores[1].reader(NAME).verify() == []
    assert all(NodeWriter(stores[n], NAME, JOB, f"node-{n}", n, 3).is_done() for n in range(3))
    assert stores[1].clean() == ["/".join(lists(DIRECTORY))]
    assert not [name for name in files(stores[0]) if name.startswith("written/")]
    assert not [name for name in files(stores[0]) if "w00004" in name], "nothing of it was needed"
    assert stores[1].reader(NAME).verify() == []


Change = Callable[[Contribution, Contribution], Contribution]


def _without_a_chunk(mine: Contribution, _: Contribution) -> Contribution:
    catalog, view, _ = mine.rows
    kept = [row for row in catalog if row != catalog.rows("long")[1]]
    return mine._replace(rows=Rows(catalog.select(kept), lambda row, buffer: view(kept[row], buffer)))


def _of_another_shape(mine: Contribution, _: Contribution) -> Contribution:
    wrong = Memory({"model/weight": ("int16", np.zeros(3, np.int16))}, writer=1)
    return mine._replace(rows=Rows(wrong.catalog, copying(wrong.read)))


REFUSED: dict[str, tuple[Change, str]] = {
    "a rank twice": (
        lambda mine, _: mine._replace(ranks=[1, 2]),
        "nodes node-1, node-2: rank 2 is listed 2 times",
    ),
    "a rank of none": (
        lambda mine, _: mine._replace(ranks=[4]),
        r"ranks \[1, 3\] are in no list \(node-0: \[0\]; node-1: \[4\]; node-2: \[2\]\)",
    ),
    "a chunk twice": (
        lambda mine, other: mine._replace(rows=other.rows),
        r"nodes node-0, node-1: the chunk of tensor '-' at \[\] is written twice",
    ),
    "a chunk of none": (
        _without_a_chunk,
        "nodes node-0, node-1, node-2: tensor 'long': its chunks hold 3072 of 4096 bytes",
    ),
    "another shape": (_of_another_shape, "nodes node-0, node-1, node-2: tensor 'model/weight': listed as"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_whole_is_refused(disk: list[Store], kind: str) -> None:
    change, expected = REFUSED[kind]
    held = {"-": ("int64", np.array(0)), "long": ("uint8", np.zeros(4096, np.uint8)), **tensors()}
    given = contributions(NAME, held, 3)
    given[1] = change(given[1], given[0])
    for number in range(3):
        put(disk, number, **given[number]._asdict())
    with pytest.raises(StoreError, match=expected):
        joint.commit(disk[0], NAME, JOB, 3)
    assert disk[0].checkpoints() == []


@pytest.mark.parametrize("damage", ["data shorter", "data gone", "own data gone", "manifest", "list", "another list"])
def test_what_is_not_as_listed_is_refused_and_written_again(disk: list[Store], damage: str) -> None:
    for number in range(3):
        put(disk, number)
    back_end = disk[0].back_end
    path = {
        "data shorter": data_file(DIRECTORY, 1, 0),
        "data gone": data_file(DIRECTORY, 1, 0),
        "own data gone": data_file(DIRECTORY, 3, 0),
        "manifest": manifest_part(DIRECTORY, 1),
        "list": (*lists(DIRECTORY), "w00001"),
        "another list": (*lists(DIRECTORY), "w00001"),
    }[damage]
    file = back_end.open(path)
    content = bytearray(file.size)
    file.read_into(0, memoryview(content))
    file.close()
    back_end.discard(path)
    if damage == "data shorter":
        back_end.write(path, bytes(content[:-1]))
    elif damage == "manifest":
        back_end.write(path, bytes(content[:100] + b"?" + content[101:]))
    elif damage == "another list":
        disk[0].back_end.discard((*lists(DIRECTORY), "w00001"))
        NodeWriter(disk[1], NAME, "another job", "node-1", 1, 3).write(contributions(NAME, tensors(), 3)[1], Pace())
    guilty = "node node-0" if damage == "own data gone" else "node number 1" if damage == "list" else "node node-1"
    with pytest.raises(StoreError, match=guilty):
        joint.commit(disk[0], NAME, JOB, 3)
    assert disk[0].checkpoints() == []
    put(disk, 0 if damage == "own data gone" else 1)
    joint.commit(disk[0], NAME, JOB, 3)
    assert disk[0].reader(NAME).verify() == []


def test_what_differs_is_kept_for_its_rank(disk: list[Store]) -> None:
    own = contributions(NAME, tensors(), 3)[1].own
    assert own is not None
    catalog, view_own, _ = own

    def changed(row: int, buffer: memoryview) -> memoryview:
        found = bytearray(view_own(row, buffer))
        found[0] ^= 255 * (row == 0)
        return memoryview(found)

    first = changed(0, memoryview(bytearray(int(catalog.raw[0]))))
    put(disk, 0)
    put(disk, 1, own=Rows(catalog.replaced(crc=[crc32c(first), *catalog.crc[1:].tolist()]), changed))
    put(disk, 2)
    joint.commit(disk[0], NAME, JOB, 3)
    with disk[0].reader(NAME) as stored:
        catalog = stored.catalog()
        assert {int(catalog.rank[row]) for row in catalog.rows(OWN)} == {-1, 1}
        assert [part.writer for part in stored.commit.parts] == [0, 1, 2, 3, 4, 6]
        assert stored.verify() == []


def test_cancelled_and_failed_writes_leave_no_files(stores: list[Store]) -> None:
    given = contributions(NAME, tensors(), 3)[1]
    writer = NodeWriter(stores[1], NAME, JOB, "node-1", 1, 3)
    with pytest.raises(StoreError, match="cancelled"):
        writer.write(given, Pace(cancelled=lambda: True))
    assert not writer.is_done()
    put(stores, 0)
    assert {name for name in files(stores[0]) if "w00001" in name or "w00004" in name} == set()


def test_fencing(disk: list[Store]) -> None:
    for number in range(3):
        put(disk, number)

    def fenced() -> None:
        raise StoreError("fenced off")

    with pytest.raises(StoreError, match="fenced off"):
        joint.commit(disk[0], NAME, JOB, 3, fenced)
    assert disk[0].checkpoints() == []
    joint.commit(disk[0], NAME, JOB, 3)
    assert disk[0].checkpoints() == [NAME]


def test_a_list_is_strict(disk: list[Store]) -> None:
    """What has a right digest and is no list is none."""
    put(disk, 0)
    joint.Journal(disk[0].back_end, lists(DIRECTORY)).put(0, msgspec.msgpack.encode({"part": 0}))
    assert not NodeWriter(disk[0], NAME, JOB, "node-0", 0, 1).is_done()
    with pytest.raises(StoreError, match="left no list"):
        joint.commit(disk[0], NAME, JOB, 1)


def test_a_list_that_would_be_too_long_is_named(disk: list[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptd.tiers.store.journal.MAX_ENTRY_BYTES", 100)
    with pytest.raises(StoreError, match=r"written/w00000: \d+ bytes; at most 68"):
        put(disk, 0)
    assert not [name for name in files(disk[0]) if "w00000" in name]
