"""Filling tensors from a tier: the load plan carried out.

Owns the way of bytes from `read(row, into)` into tensors: straight into the target's memory where a whole chunk lands
in one contiguous run of CPU memory, else through a staging buffer. Works for every tier, since all have that `read`.

Invariants: each row is read at most once; nothing is written before the whole plan exists, so a mismatch changes no
tensor; a read that fails afterwards leaves the targets partly written, and the caller must say so. Staging memory is
at most one chunk per thread.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ckptd.core.box import contiguous_strides
from ckptd.core.catalog import Catalog
from ckptd.core.native import copy_boxes
from ckptd.core.types import itemsize
from ckptd.plan.load import LoadPlan, Want, plan_load
from ckptd.trainer.state_tensors import Source, torch_dtype

Read = Callable[[int, memoryview], None]

MAX_THREADS = 8


def plan_fill(catalog: Catalog, targets: Sequence[Source], *, rank: int, cast: bool = False) -> LoadPlan:
    """The plan that fills `targets`; raises MismatchError that lists every difference. Writes nothing."""
    wants = [Want(target.key, target.dtype, target.shape, target.box) for target in targets]
    return plan_load(catalog, wants, rank=rank, cast=cast)


def fill(
    catalog: Catalog,
    read: Read,
    targets: Sequence[Source],
    *,
    rank: int,
    cast: bool = False,
    threads: int | None = None,
    plan: LoadPlan | None = None,
) -> None:
    """Fills every target from `read(row, into)`, which several threads call at once.

    `rank`: whose values of per-rank tensors (ALL_RANKS: those that serve every rank). `cast` converts dtypes that
    differ from the checkpoint's. `plan`: of `plan_fill` for the same arguments, where it is made already. Raises
    MismatchError before anything is written, and what `read` raises after.
    """
    made = plan_fill(catalog, targets, rank=rank, cast=cast) if plan is None else plan
    if len(made):
        _Filling(catalog, read, targets, made).run(threads or default_threads())


def default_threads() -> int:
    """Threads that read at the same time."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


class _Filling:
    """One load in progress: threads take rows from a common list until it is empty or one of them fails."""

    def __init__(self, catalog: Catalog, read: Read, targets: Sequence[Source], plan: LoadPlan) -> None:
        self._catalog = catalog
        self._read = read
        self._targets = targets
        self._plan = plan
        self._stopped = False
        where = (catalog.file_offset[plan.row], catalog.file[plan.row], catalog.writer[plan.row])
        self._order = np.lexsort((plan.row, *where))
        rows = plan.row[self._order]
        self._starts = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)]

    def run(self, threads: int) -> None:
        spans = iter(list(itertools.pairwise(self._starts)))  # of a list: threads may share it
        threads = min(threads, len(self._starts) - 1)
        if threads == 1:
            self._work(spans)
            return
        with concurrent.futures.ThreadPoolExecutor(threads, "ckptd-load") as pool:
            working = [pool.submit(self._work, spans) for _ in range(threads)]
            try:
                for done in working:
                    done.result()
            finally:
                self._stopped = True  # also where the wait was interrupted

    def _work(self, spans: Iterator[tuple[int, int]]) -> None:
        staging = torch.empty(0, dtype=torch.uint8)
        try:
            with torch.no_grad():
                for start, stop in spans:
                    if self._stopped:
                        return
                    staging = self._fill_row(self._order[start:stop].tolist(), staging)
        except BaseException:
            self._stopped = True
            raise

    def _fill_row(self, parts: list[int], staging: torch.Tensor) -> torch.Tensor:
        """Reads the one row that `parts` are of and puts them into their targets; returns the staging buffer."""
        row = int(self._plan.row[parts[0]])
        straight = self._straight(parts[0], row) if len(parts) == 1 else None
        if straight is not None:
            self._read(row, straight)
            return staging
        raw = int(self._catalog.raw[row])
        if len(staging) < raw:
            staging = torch.empty(raw, dtype=torch.uint8)
        self._read(row, staging.numpy().data[:raw])
        for part in parts:
            self._place(part, row, staging[:raw])
        return staging

    def _straight(self, part: int, row: int) -> memoryview | None:
        """The target's own memory, where the part is the whole chunk and one contiguous run of it."""
        target = self._targets[int(self._plan.want[part])]
        dimensions = len(target.shape)
        sizes = self._plan.sizes[part, :dimensions].tolist()
        if not self._by_address(target, row) or sizes != self._catalog.sizes[row, :dimensions].tolist():
            return None
        packed = contiguous_strides(sizes)
        for size, stride, expected in zip(sizes, target.tensor.stride(), packed, strict=True):
            if size > 1 and stride != expected:
                return None
        return _memory(self._address(target, part), int(self._catalog.raw[row]))

    def _by_address(self, target: Source, row: int) -> bool:
        tensor = target.tensor
        return tensor.device.type == "cpu" and target.dtype == self._catalog.tensors[self._catalog.tensor[row]].dtype

    def _address(self, target: Source, part: int) -> int:
        """Where the part's first element lies in the target."""
        address = target.tensor.data_ptr()
        local = self._local(target, part)
        steps = zip(local, target.tensor.stride(), strict=True)
        return address + sum(start * stride for start, stride in steps) * target.tensor.element_size()

    def _local(self, target: Source, part: int) -> list[int]:
        """The part's offsets in the target tensor."""
        offsets = self._plan.offsets[part].tolist()
        return [offset - first for offset, first in zip(offsets, target.box.offsets, strict=False)]

    def _place(self, part: int, row: int, staged: torch.Tensor) -> None:
        """Copies one part of a chunk out of the staging buffer."""
        target = self._targets[int(self._plan.want[part])]
        dimensions = len(target.shape)
        sizes = self._plan.sizes[part, :dimensions]
        chunk_sizes = self._catalog.sizes[row, :dimensions].tolist()
        inside = self._plan.offsets[part, :dimensions] - self._catalog.offsets[row, :dimensions]
        if not self._by_address(target, row):
            dtype = torch_dtype(self._catalog.tensors[self._catalog.tensor[row]].dtype)
            chunk = staged.view(dtype).view(chunk_sizes)
            target.tensor[_slices(self._local(target, part), sizes.tolist())].copy_(
                chunk[_slices(inside.tolist(), sizes.tolist())]
            )
            return
        width = itemsize(target.dtype)
        strides = np.array(contiguous_strides(chunk_sizes), np.int64) * width
        copy_boxes(
            np.array([staged.data_ptr() + int(inside @ strides)], np.uint64),
            np.array([self._address(target, part)], np.uint64),
            np.ascontiguousarray(sizes[None]),
            strides[None],
            np.array([target.tensor.stride()], np.int64).reshape(1, dimensions) * width,
            np.array([width], np.int64),
        )


def _slices(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def _memory(address: int, size: int) -> memoryview:
    """Memory of a tensor as writable bytes; the caller keeps the tensor alive."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
