"""Small stores for the tests of operations and commands, written through the Store as the daemon does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ckptd.core.box import Box, cut
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.native import crc32c
from ckptd.core.types import Epoch, SnapshotId
from ckptd.format.objects import encode
from ckptd.tiers.store import Store

Array = npt.NDArray[np.generic]

FIRST = Epoch(1, "0" * 15 + "1")
SECOND = Epoch(2, "0" * 15 + "2")


def write(
    store: Path | str,
    step: int,
    tensors: Mapping[str, Array | tuple[str, Array]],
    objects: Mapping[str, object] | None = None,
    *,
    epoch: Epoch = FIRST,
    job: str = "job-1",
    own: Mapping[tuple[str, int], Array] | None = None,
    chunk_bytes: int = 1 << 24,
) -> SnapshotId:
    """Commits a checkpoint. A tensor is an array, or (dtype name, array of the same item size) for dtypes that NumPy
    lacks; `own` holds values of single ranks, by key and rank."""
    rows: list[tuple[str, int, Box, bytes]] = []
    infos: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for key, rank, value in [
        *((key, ALL_RANKS, value) for key, value in tensors.items()),
        *((key, rank, value) for (key, rank), value in (own or {}).items()),
    ]:
        dtype, array = value if isinstance(value, tuple) else (str(value.dtype), value)
        infos[key] = (key, dtype, array.shape)
        for box in cut(Box.whole(array.shape), array.itemsize, chunk_bytes):
            inside = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            rows.append((key, rank, box, array[inside].tobytes()))
    id = SnapshotId(epoch, step)
    writer = Store.open(str(store), create=True).writer(id, job)
    catalog, data = _catalog(list(infos.values()), rows)
    part = writer.part(0).write(catalog, lambda row, into: into.__setitem__(slice(None), data[row]))
    writer.commit([part], {path: encode(value) for path, value in (objects or {}).items()})
    return id


def _catalog(
    infos: list[tuple[str, str, tuple[int, ...]]], rows: list[tuple[str, int, Box, bytes]]
) -> tuple[Catalog, list[bytes]]:
    """The catalog of `rows`, and their bytes in its order."""
    rows = sorted(rows, key=lambda row: row[0])
    index = {info[0]: position for position, info in enumerate(infos)}
    width = max((len(info[2]) for info in infos), default=0)
    offsets = [[*row[2].offsets, *[0] * (width - len(row[2].offsets))] for row in rows]
    sizes = [[*row[2].sizes, *[1] * (width - len(row[2].sizes))] for row in rows]
    catalog = Catalog.build(
        infos,
        [index[row[0]] for row in rows],
        np.array(offsets, np.int64).reshape(len(rows), width),
        np.array(sizes, np.int64).reshape(len(rows), width),
        rank=[row[1] for row in rows],
        crc=[crc32c(row[3]) for row in rows],
        file_offset=np.cumsum([0, *(len(row[3]) + 64 for row in rows)])[:-1],
    )
    return catalog, [row[3] for row in rows]
