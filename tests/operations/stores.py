"""Small stores for the tests of operations and commands, written through the Store as the daemon does."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ckptd.core.box import CHUNK_BYTES, Box, cut
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.native import crc32c
from ckptd.core.types import Epoch, SnapshotId
from ckptd.format.objects import encode
from ckptd.tiers.store import Store

Array = npt.NDArray[np.generic]

FIRST = Epoch(1, "0" * 15 + "1")
SECOND = Epoch(2, "0" * 15 + "2")


Tensor = Array | tuple[str, Array]
"""A value, or (dtype name, values of the same item size) for dtypes that NumPy lacks."""


def write(
    store: Path | str,
    step: int,
    tensors: Mapping[str, Tensor],
    objects: Mapping[str, object] | None = None,
    *,
    epoch: Epoch = FIRST,
    job: str = "job-1",
    own: Mapping[tuple[str, int], Tensor] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Path:
    """Commits a checkpoint; its directory. `own` holds values of single ranks, by key and rank."""
    identity = SnapshotId(epoch, step)
    opened = Store.open(str(store), create=True)
    writer = opened.writer(identity, job)
    catalog, data = chunks(tensors, own or {}, chunk_bytes)
    part = writer.part(0).write(catalog, lambda row, into: into.__setitem__(slice(None), data[row]))
    writer.commit([part], {path: encode(value) for path, value in (objects or {}).items()})
    return Path(opened.reader(identity).location)


class Memory:
    """A checkpoint that was never stored: what `diff` asks of one, without a disk."""

    def __init__(self, tensors: Mapping[str, Tensor], own: Mapping[tuple[str, int], Tensor], chunk_bytes: int) -> None:
        self._catalog, self._data = chunks(tensors, own, chunk_bytes)

    def catalog(self) -> Catalog:
        return self._catalog

    def objects(self) -> dict[str, bytes]:
        return {}

    def read(self, row: int, into: memoryview) -> None:
        into[:] = self._data[row]


def chunks(
    tensors: Mapping[str, Tensor], own: Mapping[tuple[str, int], Tensor], chunk_bytes: int
) -> tuple[Catalog, list[bytes]]:
    """The catalog of all values, cut into chunks, and the bytes of each chunk in its order."""
    values = [*((key, ALL_RANKS, value) for key, value in tensors.items())]
    values += [(key, rank, value) for (key, rank), value in own.items()]
    infos: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    rows: list[tuple[str, int, Box, bytes]] = []
    for key, rank, value in sorted(values, key=lambda value: value[0]):
        dtype, array = value if isinstance(value, tuple) else (str(value.dtype), value)
        infos[key] = (key, dtype, array.shape)
        for box in cut(Box.whole(array.shape), array.itemsize, chunk_bytes):
            inside = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            rows.append((key, rank, box, array[inside].tobytes()))
    index = {key: position for position, key in enumerate(infos)}
    width = max((len(info[2]) for info in infos.values()), default=0)
    offsets = [[*row[2].offsets, *[0] * (width - len(row[2].offsets))] for row in rows]
    sizes = [[*row[2].sizes, *[1] * (width - len(row[2].sizes))] for row in rows]
    catalog = Catalog.build(
        infos.values(),
        [index[row[0]] for row in rows],
        np.array(offsets, np.int64).reshape(len(rows), width),
        np.array(sizes, np.int64).reshape(len(rows), width),
        rank=[row[1] for row in rows],
        crc=[crc32c(row[3]) for row in rows],
        file_offset=np.cumsum([0, *(len(row[3]) + 64 for row in rows)])[:-1],
    )
    return catalog, [row[3] for row in rows]


def flip(path: Path, position: int) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def newer(directory: Path) -> None:
    """Makes a checkpoint one of format version 2, whole and undamaged."""
    body = (directory / "COMMIT").read_bytes().rpartition(b',"sha256":')[0]
    body = body.replace(b'"version":1', b'"version":2')
    digest = hashlib.sha256(body).hexdigest()
    (directory / "COMMIT").write_bytes(body + b',"sha256":"' + digest.encode() + b'"}\n')
