"""Small checkpoints for the tests of the store: tensors as arrays, written by one or two writers, read back whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ckptd.core import native
from ckptd.core.box import Box, cut
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.types import Epoch, SnapshotId
from ckptd.format import objects
from ckptd.tiers.store import Part, Store, StoredCheckpoint
from ckptd.tiers.store.joint import Contribution, NodeWriter, Rows, commit
from ckptd.tiers.store.pipeline import copying
from ckptd.tiers.store.writer import Pace

JOB = "a job"
Tensors = dict[str, tuple[str, np.ndarray]]
"""key -> (dtype name, array whose bytes are the tensor's)."""


def identity(step: int, number: int = 1, nonce: str = "00000000000000aa") -> SnapshotId:
    return SnapshotId(Epoch(number, nonce), step)


def tensors(seed: int = 0) -> Tensors:
    """One of each kind of row: compressed, raw, zero-dimensional, empty."""
    generator = np.random.default_rng(seed)
    return {
        "model/weight": ("float32", np.linspace(seed, seed + 1, 192, dtype=np.float32).reshape(12, 16)),
        "model/noise": ("uint8", generator.integers(0, 256, 100, np.uint8)),
        "model/tokens": ("int64", np.arange(40) + seed),
        "model/step": ("int64", np.array(seed)),
        "model/empty": ("float32", np.zeros((0, 4), np.float32)),
    }


class Memory:
    """Tensors laid out one after the other, as an arena has them: a catalog, and `read` for it."""

    def __init__(
        self,
        held: Tensors,
        *,
        writer: int = 0,
        chunk_bytes: int = 1024,
        tied: dict[str, str] | None = None,
        ranks: dict[str, int] | None = None,
    ) -> None:
        infos, index, boxes, pieces = [], [], [], []
        places: dict[str, int] = {}
        offsets: list[int] = []
        position = 0
        for key, (dtype, array) in held.items():
            infos.append((key, dtype, array.shape))
            places[key] = position
            for box in cut(Box.whole(array.shape), array.itemsize, chunk_bytes):
                part = array[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
                index.append(len(infos) - 1)
                boxes.append(box)
                pieces.append(np.ascontiguousarray(part).tobytes())
                offsets.append(position)
                position += -(-len(pieces[-1]) // 64) * 64
        for key, source in (tied or {}).items():
            original = next(i for i, info in enumerate(infos) if info[0] == source)
            infos.append((key, *infos[original][1:]))
            for i in [i for i, tensor in enumerate(index) if tensor == original]:
                index.append(len(infos) - 1)
                boxes.append(boxes[i])
                pieces.append(pieces[i])
                offsets.append(offsets[i])
        width = max((len(info[2]) for info in infos), default=0)

        def padded(numbers: tuple[int, ...], fill: int) -> list[int]:
            return [*numbers, *[fill] * (width - len(numbers))]

        self.reads = 0
        self._pieces = {(o, len(p)): p for o, p in zip(offsets, pieces, strict=True)}
        self.catalog = Catalog.build(
            infos,
            index,
            np.array([padded(box.offsets, 0) for box in boxes]).reshape(len(boxes), width),
            np.array([padded(box.sizes, 1) for box in boxes]).reshape(len(boxes), width),
            writer=np.full(len(boxes), writer),
            file_offset=offsets,
            crc=[native.crc32c(piece) for piece in pieces],
            rank=[(ranks or {}).get(infos[tensor][0], ALL_RANKS) for tensor in index],
        )

    def read(self, row: int, into: memoryview) -> None:
        self.reads += 1
        into[:] = self._pieces[(int(self.catalog.file_offset[row]), int(self.catalog.raw[row]))]


def shared_objects(seed: int = 0) -> dict[str, bytes]:
    return {"scheduler": objects.encode({"last_epoch": seed, "betas": (0.9, 0.95)})}


def split(held: Tensors, writers: int) -> list[Tensors]:
    """The tensors dealt out to writers by key."""
    return [dict(list(held.items())[i::writers]) for i in range(writers)]


def write(store: Store, name: SnapshotId, held: Tensors, *, writers: int = 1, threads: int = 1) -> None:
    """Writes and commits a checkpoint."""
    writer = store.writer(name, JOB)
    parts: list[Part] = []
    for number, share in enumerate(split(held, writers)):
        memory = Memory(share, writer=number)
        parts.append(writer.part(number).write(memory.catalog, memory.read, threads=threads))
    writer.commit(parts, shared_objects(name.step))


OWN = "buffers/table"


def alike(node: int) -> Tensors:
    """What every rank has of its own, the same on all."""
    return {OWN: ("int16", np.arange(600, dtype=np.int16))}


def staged(node: int) -> Tensors:
    """Something more that no other rank has."""
    return alike(node) | {f"buffers/stage{node}": ("uint8", np.arange(node + 5, dtype=np.uint8))}


Own = Callable[[int], Tensors]


def contributions(name: SnapshotId, held: Tensors, nodes: int, own: Own = alike) -> list[Contribution]:
    """What each of `nodes` nodes, of one rank each, has of a snapshot: its share of the tensors, and its own; an object
    that all have alike, and one that differs."""
    found = []
    for node, share in enumerate(split(held, nodes)):
        rows = Memory(share, writer=node)
        mine = Memory(own(node), writer=node, ranks=dict.fromkeys(own(node), node))
        values = shared_objects(name.step) | {"loader": objects.encode(["position", node])}
        shared, differing = (Rows(memory.catalog, copying(memory.read)) for memory in (rows, mine))
        found.append(Contribution([node], shared, differing, {node: values}))
    return found


def jointly(held: Tensors, nodes: int, own: Own = alike) -> Tensors:
    """What is then in the checkpoint."""
    found = dict(held)
    for node in range(nodes):
        found |= own(node)
        value = np.frombuffer(objects.encode(["position", node]), np.uint8)
        found |= {f"objects/loader@{node}": ("uint8", value)} if node else {}
    return found


def write_jointly(
    stores: Sequence[Store], name: SnapshotId, held: Tensors, *, own: Own = alike, root: Store | None = None
) -> None:
    """Every node writes, through a store of its own, unless it has done so; then the root commits."""
    root = root or stores[0]
    for number, (store, given) in enumerate(zip(stores, contributions(name, held, len(stores), own), strict=True)):
        writer = NodeWriter(store, name, JOB, f"node-{number}", number, len(stores))
        if not writer.is_done():
            writer.write(given, Pace())
    if not root.committed(name):
        commit(root, name, JOB, len(stores))
    root.sweep(name)


def read(checkpoint: StoredCheckpoint) -> Tensors:
    """All tensors of a checkpoint."""
    catalog = checkpoint.catalog()
    found: Tensors = {}
    for info in catalog.tensors:
        rows = catalog.rows(info.key)
        itemsize = int(catalog.raw[rows[0]]) // max(catalog.box(rows[0]).elements, 1) or 1
        kind = np.dtype(info.dtype) if info.dtype in np.sctypeDict else np.dtype(f"V{itemsize}")
        array = np.zeros(info.shape, kind)
        for row in rows:
            box = catalog.box(row)
            data = bytearray(int(catalog.raw[row]))
            checkpoint.read(row, memoryview(data))
            place = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            array[place] = np.frombuffer(data, kind).reshape(box.sizes)
        found[info.key] = (info.dtype, array)
    return found


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[key][0] == other[key][0]
        and one[key][1].shape == other[key][1].shape
        and one[key][1].tobytes() == other[key][1].tobytes()
        for key in one
    )
