"""How two checkpoints differ: keys, dtypes and shapes, bytes of tensors, objects by path.

Chunks that cover the same box are compared by the CRC32C in the two manifests and not read at all where it is equal;
everything else is decoded and compared element by element, in pieces of a chunk, so memory stays bounded however
large a tensor is. Equal means the same bits: -0.0 differs from 0.0, a NaN equals itself. A tensor that ranks hold
values of their own for is compared rank by rank. Prints nothing, changes nothing.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptd.core.box import Box
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.types import itemsize, join_key
from ckptd.format import objects as object_format
from ckptd.operations.describe import describe
from ckptd.operations.inspect import is_object, read_objects
from ckptd.tiers.store import StoredCheckpoint

Progress = Callable[[int, int], None]
_CACHED_CHUNKS = 8


@dataclasses.dataclass(frozen=True)
class TensorChange:
    """A tensor of both checkpoints whose dtype or shape is not the same."""

    key: str
    source_dtype: str
    source_shape: tuple[int, ...]
    target_dtype: str
    target_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """A tensor whose bytes differ. `elements` counts them, over the values of all ranks that were compared;
    `max_abs` is the largest absolute difference, NaN where only one side is a number, None for dtypes without
    arithmetic; `ranks` are those whose own value differs."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    max_abs: float | None
    ranks: list[int]


@dataclasses.dataclass(frozen=True)
class ObjectDifference:
    """A value inside an object, by path, that differs; in words, None where it does not exist."""

    path: str
    source: str | None
    target: str | None


@dataclasses.dataclass
class Difference:
    """Everything in which two checkpoints differ; `compared` tensors were in both with one dtype and shape."""

    only_source: list[str] = dataclasses.field(default_factory=list)
    only_target: list[str] = dataclasses.field(default_factory=list)
    changed: list[TensorChange] = dataclasses.field(default_factory=list)
    tensors: list[TensorDifference] = dataclasses.field(default_factory=list)
    objects: list[ObjectDifference] = dataclasses.field(default_factory=list)
    compared: int = 0

    @property
    def equal(self) -> bool:
        """Whether nothing differs at all."""
        return not (self.only_source or self.only_target or self.changed or self.tensors or self.objects)


@dataclasses.dataclass
class _Tally:
    """Elements of one tensor that differ, so far."""

    elements: int = 0
    max_abs: float | None = None

    def add(self, elements: int, max_abs: float | None) -> None:
        self.elements += elements
        if max_abs is not None:
            # np.maximum keeps a NaN, as the result must.
            self.max_abs = max_abs if self.max_abs is None else float(np.maximum(self.max_abs, max_abs))


def diff(source: StoredCheckpoint, target: StoredCheckpoint, progress: Progress | None = None) -> Difference:
    """Compares two checkpoints; CorruptionError where one cannot be read."""
    result = Difference()
    left, right = _Side(source), _Side(target)
    left_keys = {info.key for info in left.catalog.tensors if not is_object(info.key)}
    right_keys = {info.key for info in right.catalog.tensors if not is_object(info.key)}
    result.only_source = sorted(left_keys - right_keys)
    result.only_target = sorted(right_keys - left_keys)
    sums = np.concatenate([[0], np.cumsum(left.catalog.raw)])
    for key in sorted(left_keys & right_keys):
        _compare_key(key, left, right, result)
        if progress is not None:
            progress(int(sums[left.catalog.rows(key).stop]), int(sums[-1]))
    result.objects = list(_compare_objects(read_objects(source), read_objects(target)))
    return result


def _compare_key(key: str, left: _Side, right: _Side, result: Difference) -> None:
    before, after = left.catalog.info(key), right.catalog.info(key)
    if before != after:
        result.changed.append(TensorChange(key, before.dtype, before.shape, after.dtype, after.shape))
        return
    result.compared += 1
    if _same_rows(left.catalog, right.catalog, key):
        return
    tally, differing = _Tally(), []
    for rank in sorted(left.ranks(key) | right.ranks(key)):
        found = _Tally()
        _compare_views(left, left.view(key, rank), right, right.view(key, rank), before.dtype, found)
        tally.add(found.elements, found.max_abs)
        if found.elements and rank != ALL_RANKS:
            differing.append(rank)
    if tally.elements:
        result.tensors.append(
            TensorDifference(key, before.dtype, before.shape, tally.elements, tally.max_abs, differing)
        )


class _Side:
    """One of the two checkpoints: its catalog, and its chunks decoded, the last few of them kept."""

    def __init__(self, checkpoint: StoredCheckpoint) -> None:
        self._checkpoint = checkpoint
        self.catalog = checkpoint.catalog()
        self._cache: collections.OrderedDict[int, npt.NDArray[np.uint8]] = collections.OrderedDict()

    def ranks(self, key: str) -> set[int]:
        """Whose values of `key` there are; ALL_RANKS for the common one."""
        rows = self.catalog.rows(key)
        return {int(rank) for rank in np.unique(self.catalog.rank[rows.start : rows.stop])}

    def view(self, key: str, rank: int) -> list[int]:
        """The rows that `rank` would load: its own where it has any, else the common ones."""
        rows = self.catalog.rows(key)
        own = [row for row in rows if self.catalog.rank[row] == rank]
        return own or [row for row in rows if self.catalog.rank[row] == ALL_RANKS]

    def part(self, row: int, box: Box) -> npt.NDArray[np.uint8]:
        """The bytes of the elements of `box`, which lies inside the chunk: uint8 [*box.sizes, itemsize]."""
        chunk = self.catalog.box(row)
        itembytes = itemsize(self.catalog.tensors[self.catalog.tensor[row]].dtype)
        whole = self._decoded(row).reshape((*chunk.sizes, itembytes))
        return whole[
            tuple(slice(o - c, o - c + s) for o, c, s in zip(box.offsets, chunk.offsets, box.sizes, strict=True))
        ]

    def _decoded(self, row: int) -> npt.NDArray[np.uint8]:
        if row not in self._cache:
            data = bytearray(int(self.catalog.raw[row]))
            self._checkpoint.read(row, memoryview(data))
            self._cache[row] = np.frombuffer(data, np.uint8)
            if len(self._cache) > _CACHED_CHUNKS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(row)
        return self._cache[row]


def _same_rows(source: Catalog, target: Catalog, key: str) -> bool:
    """Whether both hold `key` in the same chunks with the same checksums; nothing needs to be read then."""
    columns = []
    for catalog in (source, target):
        rows = slice(catalog.rows(key).start, catalog.rows(key).stop)
        dimensions = len(catalog.info(key).shape)
        made = np.column_stack(
            [
                catalog.rank[rows].astype(np.int64),
                catalog.offsets[rows, :dimensions],
                catalog.sizes[rows, :dimensions],
                catalog.crc[rows].astype(np.int64),
            ]
        )
        columns.append(made[np.lexsort(made.T[::-1])])
    return bool(np.array_equal(columns[0], columns[1]))


def _compare_views(
    left: _Side, left_rows: list[int], right: _Side, right_rows: list[int], dtype: str, tally: _Tally
) -> None:
    """Adds to `tally` what differs between two views of one tensor. An element that only one of them holds differs."""
    boxes = {right.catalog.box(row): row for row in right_rows}
    low = right.catalog.offsets[right_rows]
    high = low + right.catalog.sizes[right_rows]
    met = 0
    for row in left_rows:
        box = left.catalog.box(row)
        same = boxes.get(box)
        if same is not None:
            met += box.elements
            if left.catalog.crc[row] != right.catalog.crc[same]:
                tally.add(*_compare_elements(left.part(row, box), right.part(same, box), dtype))
            continue
        start, stop = _padded(box, low.shape[1])
        inside = 0
        for position in np.flatnonzero(((low < stop) & (high > start)).all(axis=1)):
            other = right_rows[int(position)]
            common = box.intersect(right.catalog.box(other))
            if common is not None:
                inside += common.elements
                tally.add(*_compare_elements(left.part(row, common), right.part(other, common), dtype))
        met += inside
        tally.add(max(box.elements - inside, 0), None)
    tally.add(max(sum(right.catalog.box(row).elements for row in right_rows) - met, 0), None)


def _padded(box: Box, width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First element and the one after the last of `box`, padded as the columns of a catalog are."""
    missing = width - len(box.offsets)
    low = np.array([*box.offsets, *[0] * missing], np.int64)
    return low, low + np.array([*box.sizes, *[1] * missing], np.int64)


def _compare_elements(
    source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8], dtype: str
) -> tuple[int, float | None]:
    """How many elements differ in any bit, and by how much at most. Both are uint8 [..., itemsize]."""
    itembytes = source.shape[-1]
    before = np.ascontiguousarray(source).reshape(-1, itembytes)
    after = np.ascontiguousarray(target).reshape(-1, itembytes)
    differ = (before != after).any(axis=1)
    count = int(differ.sum())
    if not count:
        return 0, None
    numbers = _numbers(before[differ], dtype), _numbers(after[differ], dtype)
    if numbers[0] is None or numbers[1] is None:
        return count, None
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(numbers[0] - numbers[1])
    # Two NaNs with different payloads differ in bits; as numbers they are as near as they can be.
    distance[np.isnan(numbers[0]) & np.isnan(numbers[1])] = 0
    return count, float(distance.max())


def _numbers(elements: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[Any] | None:
    """Elements (uint8 [n, itemsize]) of a floating dtype, widened so that a difference is exact enough; else None."""
    flat = elements.reshape(-1)
    if dtype == "bfloat16":
        return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in ("float16", "float32", "float64"):
        return flat.view(np.dtype(dtype).newbyteorder("<")).astype(np.float64)
    if dtype in ("complex64", "complex128"):
        return flat.view(np.dtype(dtype).newbyteorder("<")).astype(np.complex128)
    return None


def _compare_objects(source: dict[str, bytes], target: dict[str, bytes]) -> Iterator[ObjectDifference]:
    for path in sorted(source.keys() | target.keys()):
        before, after = source.get(path), target.get(path)
        if before == after:
            continue
        if before is None or after is None:
            yield ObjectDifference(
                path,
                None if before is None else describe(object_format.decode(before)),
                None if after is None else describe(object_format.decode(after)),
            )
            continue
        yield from _compare_values(path, object_format.decode(before), object_format.decode(after))


def _compare_values(path: str, source: object, target: object) -> Iterator[ObjectDifference]:
    """The innermost places in which two decoded values differ."""
    before, after = _children(source), _children(target)
    if type(source) is type(target) and before is not None and after is not None:
        for name in [*before, *(name for name in after if name not in before)]:
            where = f"{path}/{join_key(name)}"
            if name not in before:
                yield ObjectDifference(where, None, describe(after[name]))
            elif name not in after:
                yield ObjectDifference(where, describe(before[name]), None)
            else:
                yield from _compare_values(where, before[name], after[name])
    elif type(source) is not type(target) or object_format.encode(source) != object_format.encode(target):
        yield ObjectDifference(path, describe(source), describe(target))


def _children(value: object) -> dict[Any, Any] | None:
    """What a container holds, by key or position; None for a leaf."""
    if isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return None
