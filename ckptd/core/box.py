"""Boxes: rectangular parts of logical tensors, and the rule that cuts them into chunks.

Pure functions on tuples of ints, or on columns of many boxes (elements, not bytes). The chunking rule is part of the
format (docs/format.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

CHUNK_BYTES = 16 * 1024 * 1024
"""A chunk holds at most this many raw bytes."""


class Box(NamedTuple):
    """A rectangle inside a tensor: `offsets` of its first element and its `sizes`, one of each per dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that covers a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def elements(self) -> int:
        """How many elements it holds; 1 for a zero-dimensional tensor."""
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None where they share no element."""
        low = tuple(max(p, q) for p, q in zip(self.offsets, other.offsets, strict=True))
        high = tuple(
            min(p + s, q + t) for p, s, q, t in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(h - lo for lo, h in zip(low, high, strict=True))
        return Box(low, sizes) if all(s > 0 for s in sizes) else None

    def shifted(self, by: Sequence[int]) -> Box:
        """The same rectangle with `by` added to its offsets."""
        return Box(tuple(o + b for o, b in zip(self.offsets, by, strict=True)), self.sizes)

    def inside(self, shape: Sequence[int]) -> bool:
        """Whether it lies within a tensor of `shape`."""
        return len(shape) == len(self.offsets) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(self.offsets, self.sizes, shape, strict=True)
        )


def contiguous_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements, of a packed tensor of `sizes`."""
    strides = [1] * len(sizes)
    for dimension in range(len(sizes) - 2, -1, -1):
        strides[dimension] = strides[dimension + 1] * max(sizes[dimension + 1], 1)
    return tuple(strides)


def padded(rows: Sequence[Sequence[int]], width: int, fill: int, lengths: Ints | None = None) -> Ints:
    """Rows of up to `width` numbers as one array, filled up with `fill`. `lengths`: how many numbers, where known."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows)) if lengths is None else lengths
    numbers = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(lengths.sum()))
    if len(numbers) == len(rows) * width:
        return numbers.reshape(len(rows), width)
    array = np.full((len(rows), width), fill, np.int64)
    array[np.arange(width) < lengths[:, None]] = numbers
    return array


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The elements [start, stop) of a flattened row-major tensor of `shape` as disjoint boxes, in their flat order.

    Each box is one run of the flattened tensor, and there are at most 2 * len(shape) - 1 of them (one for a tensor
    without dimensions): runs grow outwards to the outermost dimension that the range crosses, then inwards again. An
    empty range has no boxes. Raises ValueError for a range that is not in the tensor.
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"range [{start}, {stop}) of a tensor of shape {tuple(shape)}, {math.prod(shape)} elements")
    strides = contiguous_strides(shape)
    boxes = []
    while start < stop:
        index = tuple(start // stride % size for stride, size in zip(strides, shape, strict=True))
        for split, stride in enumerate(strides):
            if start % stride == 0 and start + stride <= stop:
                run = min(shape[split] - index[split], (stop - start) // stride)
                boxes.append(Box(index, (1,) * split + (run, *shape[split + 1 :])))
                start += run * stride
                break
        else:
            boxes.append(Box((), ()))
            start += 1
    return boxes


def cut(box: Box, itemsize: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Box]:
    """Cuts `box` into chunks of at most `chunk_bytes`, each contiguous in the packed box, in row-major order.

    i = the smallest dimension whose inner block fits; run = floor(chunk_bytes / inner block); dimension i is cut into
    ceil(size_i / run) runs whose sizes differ by at most one (longer ones first). Dimensions before i are cut one by
    one. An empty box gives one chunk of zero bytes.
    """
    sizes = box.sizes
    if box.elements * itemsize <= chunk_bytes:
        yield box
        return
    inner = itemsize
    split = len(sizes) - 1
    while split > 0 and inner * sizes[split] <= chunk_bytes:
        inner *= sizes[split]
        split -= 1
    count = math.ceil(sizes[split] / (chunk_bytes // inner))
    base, longer = divmod(sizes[split], count)
    runs = [base + 1] * longer + [base] * (count - longer)
    starts = list(itertools.accumulate(runs, initial=0))
    for outer in itertools.product(*(range(size) for size in sizes[:split])):
        for start, run in zip(starts, runs, strict=False):
            local = (*outer, start) + (0,) * (len(sizes) - split - 1)
            yield Box(local, (1,) * split + (run, *sizes[split + 1 :])).shifted(box.offsets)


def cut_boxes(offsets: Ints, sizes: Ints, itemsize: Ints, chunk_bytes: int = CHUNK_BYTES) -> tuple[Ints, Ints, Ints]:
    """What `cut` makes of each box [n, D] of elements of `itemsize[i]` bytes: (index of the box, offsets, sizes) of
    every chunk, those of one box after the other. Boxes of fewer dimensions are padded with sizes of 1."""
    count, width = sizes.shape
    inner = itemsize.copy()
    split = np.full(count, width - 1)
    # In floating point no product wraps around; where it matters it is small and exact.
    whole = np.prod(sizes, axis=1, dtype=np.float64) * itemsize <= chunk_bytes
    if whole.all():
        return np.arange(count), offsets.copy(), sizes.copy()
    for dimension in range(width - 1, 0, -1):
        fits = ~whole & (split == dimension) & (inner.astype(np.float64) * sizes[:, dimension] <= chunk_bytes)
        inner[fits] *= sizes[fits, dimension]
        split[fits] = dimension - 1
    runs, outer = np.ones(count, np.int64), np.ones(count, np.int64)
    large = np.flatnonzero(~whole)
    runs[large] = -(-sizes[large, split[large]] // (chunk_bytes // inner[large]))
    for dimension in range(width):
        before = ~whole & (dimension < split)
        outer[before] *= sizes[before, dimension]
    source = np.repeat(np.arange(count), runs * outer)
    number = np.arange(len(source)) - np.repeat(np.cumsum(runs * outer) - runs * outer, runs * outer)
    chunk_offsets, chunk_sizes = offsets[source], sizes[source]
    rest, run = np.divmod(number, runs[source])
    for dimension in range(width - 1, -1, -1):
        here = np.flatnonzero(~whole[source] & (split[source] == dimension))
        base, longer = np.divmod(sizes[source[here], dimension], runs[source[here]])
        chunk_offsets[here, dimension] += run[here] * base + np.minimum(run[here], longer)
        chunk_sizes[here, dimension] = base + (run[here] < longer)
        before = np.flatnonzero(~whole[source] & (dimension < split[source]))
        rest[before], index = np.divmod(rest[before], sizes[source[before], dimension])
        chunk_offsets[before, dimension] += index
        chunk_sizes[before, dimension] = 1
    return source, chunk_offsets, chunk_sizes
