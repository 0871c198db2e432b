"""The catalog: which chunks of which logical tensors exist, and where in one tier their bytes lie.

Columnar, so that ten million chunks are a few arrays. The same columns describe the slots of an arena (codec raw,
`writer` = the capturing rank, `file` = 0, `file_offset` = offset in the slot's data) and the data files of a store.

Invariants: rows are grouped by tensor, tensors are sorted by key; every box lies inside its tensor's shape and
`raw` is its size in bytes. `Catalog.build` establishes them and raises FormatError for rows that break them.
Overlap, gaps and coverage are questions for the planner, since replicas and per-rank rows are legitimate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ckptd.core.box import Box
from ckptd.core.errors import FormatError, NotFoundError
from ckptd.core.types import itemsize

ALL_RANKS = -1
"""Value of the `rank` column for rows that serve every rank; others hold only that rank's own value."""

MAX_CHUNKS = 2**27
MAX_DIMENSIONS = 64

RAW, ZSTD, BYTEPLANES_ZSTD = 0, 1, 2
"""Codecs of stored bytes, as numbered in the format."""

Ints = npt.NDArray[np.int64]


class TensorInfo(tuple[str, str, tuple[int, ...]]):
    """(key, dtype name, global shape) of a logical tensor."""

    __slots__ = ()

    def __new__(cls, key: str, dtype: str, shape: Sequence[int]) -> TensorInfo:
        return super().__new__(cls, (key, dtype, tuple(int(s) for s in shape)))

    @property
    def key(self) -> str:
        return self[0]

    @property
    def dtype(self) -> str:
        return self[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self[2]


COLUMNS = {
    "rank": np.int32,
    "raw": np.int64,
    "crc": np.uint32,
    "writer": np.int32,
    "file": np.int32,
    "file_offset": np.int64,
    "stored": np.int64,
    "codec": np.uint8,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Catalog:
    """Chunks of one snapshot or checkpoint. All arrays have one entry per chunk.

    `tensor` indexes `tensors`; `offsets` and `sizes` are [chunks, D] with D the largest number of dimensions, padded
    with offset 0 and size 1; `rank` is ALL_RANKS or the rank whose own value the row holds; `raw`/`stored` are bytes
    before and after `codec`; `crc` is the CRC32C of the raw bytes; `writer`, `file`, `file_offset` say where.
    """

    tensors: list[TensorInfo]
    tensor: npt.NDArray[np.int32]
    offsets: Ints
    sizes: Ints
    rank: npt.NDArray[np.int32]
    raw: Ints
    crc: npt.NDArray[np.uint32]
    writer: npt.NDArray[np.int32]
    file: npt.NDArray[np.int32]
    file_offset: Ints
    stored: Ints
    codec: npt.NDArray[np.uint8]

    @functools.cached_property
    def first(self) -> Ints:
        """The rows of tensor t are `first[t]` to `first[t + 1]`."""
        return np.asarray(np.searchsorted(self.tensor, np.arange(len(self.tensors) + 1)), np.int64)

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """The number of each key's tensor."""
        return {info[0]: number for number, info in enumerate(self.tensors)}

    @classmethod
    def build(
        cls,
        tensors: Iterable[tuple[str, str, Sequence[int]]],
        tensor: npt.ArrayLike,
        offsets: npt.ArrayLike,
        sizes: npt.ArrayLike,
        **columns: npt.ArrayLike,
    ) -> Catalog:
        """A catalog from columns in any row order; `columns` may leave out those that a tier does not need (zero;
        `rank` ALL_RANKS; `raw` and `stored` from the box). Raises FormatError where the invariants do not hold."""
        infos = [TensorInfo(*t) for t in tensors]
        for info in infos:
            if not info.key or len(info.shape) > MAX_DIMENSIONS or any(s < 0 for s in info.shape):
                raise FormatError(f"tensor {info.key!r}: shape {info.shape} is not a shape")
        order = sorted(range(len(infos)), key=lambda i: infos[i].key)
        if any(infos[p].key == infos[q].key for p, q in zip(order, order[1:], strict=False)):
            raise FormatError("catalog: a key is listed twice")
        position = np.empty(len(infos), np.int32)
        position[order] = np.arange(len(infos), dtype=np.int32)
        given = np.asarray(tensor, np.int64)
        if given.ndim != 1 or len(given) > MAX_CHUNKS:
            raise FormatError(f"catalog: {given.size} chunks; at most {MAX_CHUNKS}")
        if given.size and not (0 <= given.min() and given.max() < len(infos)):
            raise FormatError("catalog: a chunk names a tensor that is not listed")
        infos = [infos[i] for i in order]
        width = max((len(t.shape) for t in infos), default=0)
        mapped = position[given]
        rows = np.argsort(mapped, kind="stable")
        mapped = mapped[rows]
        given_width = -1 if len(rows) else width
        low = np.asarray(offsets, np.int64).reshape(len(rows), given_width)[rows]
        extent = np.asarray(sizes, np.int64).reshape(len(rows), given_width)[rows]
        shapes = np.ones((len(infos), width), np.int64)
        for i, info in enumerate(infos):
            shapes[i, : len(info.shape)] = info.shape
        if low.shape != (len(rows), width) or extent.shape != low.shape:
            raise FormatError(f"catalog: boxes have {low.shape[1]} dimensions, tensors {width}")
        inside = (low >= 0) & (extent >= 0) & (extent <= shapes[mapped]) & (low <= shapes[mapped] - extent)
        if not inside.all():
            row = int(np.flatnonzero(~inside.all(axis=1))[0])
            raise FormatError(
                f"tensor {infos[mapped[row]].key!r}: box {low[row].tolist()} + {extent[row].tolist()} "
                f"lies outside shape {infos[mapped[row]].shape}"
            )
        items = np.array([itemsize(t.dtype) for t in infos], np.int64)
        raw = np.prod(extent, axis=1, dtype=np.int64) * items[mapped] if len(rows) else np.zeros(0, np.int64)
        unknown = set(columns) - set(COLUMNS)
        if unknown:
            raise TypeError(f"unknown columns {sorted(unknown)}")
        made: dict[str, npt.NDArray[np.generic]] = {}
        for name, dtype in COLUMNS.items():
            if name in columns:
                made[name] = np.asarray(columns[name]).astype(dtype)[rows]
            else:
                made[name] = np.full(len(rows), ALL_RANKS if name == "rank" else 0, dtype)
        if "raw" in columns and not np.array_equal(made["raw"], raw):
            row = int(np.flatnonzero(made["raw"] != raw)[0])
            raise FormatError(
                f"tensor {infos[mapped[row]].key!r}: a chunk says {made['raw'][row]} bytes, its box has {raw[row]}"
            )
        made["raw"] = raw
        if "stored" not in columns:
            made["stored"] = raw.copy()
        return cls(infos, mapped, low, extent, **made)  # type: ignore[arg-type]

    @classmethod
    def merge(cls, parts: Sequence[Catalog]) -> Catalog:
        """One catalog of all parts' rows; a tensor listed by several must have one dtype and shape (FormatError)."""
        tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for info in part.tensors:
                if tensors.setdefault(info.key, info) != info:
                    raise FormatError(f"tensor {info.key!r}: listed as {tensors[info.key][1:]} and as {info[1:]}")
        index = {key: i for i, key in enumerate(tensors)}
        width = max((p.offsets.shape[1] for p in parts), default=0)

        def widened(array: Ints, fill: int) -> Ints:
            return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)

        if not parts:
            return cls.build([], [], np.zeros((0, 0)), np.zeros((0, 0)))
        return cls.build(
            tensors.values(),
            np.concatenate([np.array([index[t.key] for t in p.tensors], np.int32)[p.tensor] for p in parts]),
            np.concatenate([widened(p.offsets, 0) for p in parts]),
            np.concatenate([widened(p.sizes, 1) for p in parts]),
            **{name: np.concatenate([getattr(p, name) for p in parts]) for name in COLUMNS},
        )

    def __len__(self) -> int:
        return len(self.tensor)

    def __contains__(self, key: str) -> bool:
        return key in self.index

    def info(self, key: str) -> TensorInfo:
        """dtype and shape of `key`; raises NotFoundError."""
        try:
            return self.tensors[self.index[key]]
        except KeyError:
            raise NotFoundError(f"no tensor {key!r}; {len(self.tensors)} others exist") from None

    def rows(self, key: str) -> range:
        """The rows that hold parts of `key`; raises NotFoundError."""
        self.info(key)
        i = self.index[key]
        return range(int(self.first[i]), int(self.first[i + 1]))

    def box(self, row: int) -> Box:
        """The box of one chunk."""
        n = len(self.tensors[self.tensor[row]].shape)
        return Box(tuple(self.offsets[row, :n].tolist()), tuple(self.sizes[row, :n].tolist()))

    def select(self, rows: npt.ArrayLike) -> Catalog:
        """The catalog of a subset of rows (indices or mask); tensors without rows are dropped."""
        chosen = np.asarray(rows)
        kept, tensor = np.unique(self.tensor[chosen], return_inverse=True)
        infos = [self.tensors[i] for i in kept]
        width = max((len(t.shape) for t in infos), default=0)
        return Catalog.build(
            infos,
            tensor,
            self.offsets[chosen][:, :width],
            self.sizes[chosen][:, :width],
            **{name: getattr(self, name)[chosen] for name in COLUMNS},
        )

    def replaced(self, **columns: npt.ArrayLike) -> Catalog:
        """The same rows with some columns replaced."""
        made = {name: np.asarray(value).astype(COLUMNS[name]) for name, value in columns.items()}
        return dataclasses.replace(self, **made)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))
