"""A snapshot of several ranks in real slots, without processes that train: what each rank holds, and how it is found
again in a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ckptd.core.box import Box
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.native import crc32c
from ckptd.core.types import Epoch, SnapshotId
from ckptd.format import objects
from ckptd.format.objects import pack_table
from ckptd.plan.load import Want, plan_load
from ckptd.plan.save import PER_RANK, Piece, plan_save
from ckptd.plan.share import objects_for, serving_rank
from ckptd.tiers.arena import Slot, layout
from ckptd.tiers.store import StoredCheckpoint

JOB = "a job on several nodes"
EPOCH = Epoch(3, "00000000000000bb")
SNAPSHOT = SnapshotId(EPOCH, 40)


def state_of(rank: int, world: int) -> tuple[dict[str, tuple[str, np.ndarray, Box]], dict[str, bytes]]:
    """(key -> share, values that this rank has, their box; objects by path)."""
    full = np.arange(world * 3 * 50, dtype=np.float32).reshape(world * 3, 50)
    noise = np.random.default_rng(7).integers(0, 256, 70_000, np.uint8)
    tensors = {
        "model/replicated": ("replicated", noise, Box.whole(noise.shape)),
        "model/sharded": ("sharded", full[rank * 3 : rank * 3 + 3], Box((rank * 3, 0), (3, 50))),
        "model/step": ("replicated", np.array(40), Box((), ())),
        "buffers/table": (PER_RANK, np.arange(3000, dtype=np.int32), Box.whole((3000,))),
        "buffers/mean": (PER_RANK, np.full(300, rank, np.float32), Box.whole((300,))),
        "buffers/pair": (PER_RANK, np.full(20, rank // 2, np.int64), Box.whole((20,))),
    }
    if rank >= world // 2:
        tensors["buffers/late"] = (PER_RANK, np.arange(9, dtype=np.int16), Box.whole((9,)))
    values = {
        "rng/torch": objects.encode(bytes([rank]) * 40),
        "scheduler": objects.encode({"last_epoch": 40}),
        "loader": objects.encode({"position": [rank, 40]}),
        "optimizer/param_groups": objects.encode([{"stage": rank // 2}]),
    }
    return tensors, values


def slots_of(world: int, snapshot: SnapshotId = SNAPSHOT) -> list[Slot]:
    """The slots of all ranks, by rank; close them."""
    states = [state_of(rank, world) for rank in range(world)]
    pieces = [
        [
            Piece(key, array.dtype.name, _shape(key, array, world), box.offsets, box.sizes, share)
            for key, (share, array, box) in tensors.items()
        ]
        for tensors, _ in states
    ]
    slots = []
    for rank, (catalog, (tensors, values)) in enumerate(zip(plan_save(pieces), states, strict=True)):
        packed = pack_table(values)
        slot = Slot.create(*layout(rank, catalog, len(packed)))
        crcs = []
        for row in catalog:
            _, array, box = tensors[catalog.tensors[catalog.tensor[row]].key]
            data = _part(array, box, catalog.box(row))
            crcs.append(crc32c(data))
            with open(f"/proc/self/fd/{slot.descriptor}", "r+b", buffering=0) as file:
                file.seek(slot.geometry.data_offset + int(catalog.file_offset[row]))
                file.write(data)
        slot.commit(snapshot, np.array(crcs, np.uint32), packed)
        slots.append(slot)
    return slots


def on_nodes(slots: Sequence[Slot], nodes: int) -> list[list[Slot]]:
    """The slots of each node, by descriptors of their own."""
    each = len(slots) // nodes
    return [[slot.duplicate() for slot in slots[node * each : (node + 1) * each]] for node in range(nodes)]


@contextlib.contextmanager
def captured(world: int) -> Iterator[list[Slot]]:
    """`slots_of`, closed afterwards."""
    slots = slots_of(world)
    try:
        yield slots
    finally:
        for slot in slots:
            slot.close()


def check_ranks(checkpoint: StoredCheckpoint, world: int) -> None:
    """Every rank finds its own state, to the bit; another world that of rank 0 and what is shared."""
    catalog = checkpoint.catalog()
    for rank in range(world):
        tensors, values = state_of(rank, world)
        serving = serving_rank(catalog, rank, world)
        assert serving == rank
        for key, (_, array, box) in tensors.items():
            assert read_box(checkpoint, catalog, key, box, serving) == array.tobytes(), (rank, key)
        found = objects_for(rank, checkpoint.objects(), catalog, checkpoint.read)
        assert {path: found[path] for path in values} == values
    tensors, _ = state_of(0, world)
    for key in ("buffers/mean", "buffers/pair"):
        assert read_box(checkpoint, catalog, key, tensors[key][2], ALL_RANKS) == tensors[key][1].tobytes()


def read_box(checkpoint: StoredCheckpoint, catalog: Catalog, key: str, box: Box, rank: int) -> bytes:
    """The elements of a box, as a load plan finds them."""
    info = catalog.info(key)
    plan = plan_load(catalog, [Want(key, info.dtype, info.shape, box)], rank=rank)
    target = np.zeros(box.sizes, info.dtype)
    dimensions = len(box.sizes)
    for index, row in enumerate(plan.row.tolist()):
        whole = catalog.box(row)
        chunk = bytearray(int(catalog.raw[row]))
        checkpoint.read(row, memoryview(chunk))
        low, size = plan.offsets[index][:dimensions].tolist(), plan.sizes[index][:dimensions].tolist()
        values = np.frombuffer(chunk, info.dtype).reshape(whole.sizes)
        inner = tuple(slice(o - b, o - b + s) for o, s, b in zip(low, size, whole.offsets, strict=True))
        outer = tuple(slice(o - b, o - b + s) for o, s, b in zip(low, size, box.offsets, strict=True))
        target[outer] = values[inner]
    return target.tobytes()


def files(directory: Path) -> dict[str, tuple[int, int]]:
    """All files of a checkpoint: inode and time of change."""
    found = {}
    for path in directory.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[str(path.relative_to(directory))] = (status.st_ino, status.st_mtime_ns)
    return found


def _shape(key: str, array: np.ndarray, world: int) -> tuple[int, ...]:
    return (world * 3, 50) if key == "model/sharded" else array.shape


def _part(array: np.ndarray, held: Box, wanted: Box) -> bytes:
    inner = tuple(slice(o - b, o - b + s) for o, s, b in zip(wanted.offsets, wanted.sizes, held.offsets, strict=True))
    return array[inner].tobytes()
