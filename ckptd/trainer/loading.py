"""Filling tensors from a tier: the load plan carried out by one process.

Owns the way of bytes from a tier into tensors: decoded straight into the target's memory where a whole chunk lands in
one contiguous run of CPU memory, else through a staging buffer. Works for every tier, since all have `read(row, into)`;
one that can read several neighbouring chunks at once (`RunReader`) is asked to.

Invariants: each row is read at most once, tied rows (same bytes under two keys) together once; nothing is written
before the whole plan exists, so a mismatch changes no tensor; a read that fails afterwards leaves the targets partly
written, and the caller must say so. Staging memory is at most one run, of 16 MiB at most, per thread.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from ckptd.core.box import contiguous_strides
from ckptd.core.catalog import COLUMNS, Catalog
from ckptd.core.native import copy_boxes
from ckptd.core.types import itemsize
from ckptd.plan.load import LoadPlan, Want, plan_load
from ckptd.tensors.values import torch_dtype
from ckptd.trainer.state_tensors import Source

Ints = npt.NDArray[np.int64]
Read = Callable[[int, memoryview], None]

MAX_THREADS = 8
ALIGNMENT_BYTES = 64
"""Chunks in a staging buffer start at multiples of it, so that they can be viewed as any dtype."""

_PLACE = ("writer", "file", "file_offset")


@runtime_checkable
class RunReader(Protocol):
    """A tier that reads runs of neighbouring rows at once, as `StoredCheckpoint` does; safe in threads."""

    @property
    def parallel(self) -> int: ...

    def runs(self, rows: npt.ArrayLike) -> list[list[int]]: ...

    def expect(self, rows: Sequence[int]) -> None: ...

    def read_run(self, rows: Sequence[int], into: Sequence[memoryview]) -> None: ...


class RowReader:
    """Any tier as a RunReader: every row is a run of its own."""

    parallel = 1

    def __init__(self, catalog: Catalog, read: Read) -> None:
        self._catalog = catalog
        self._read = read

    def runs(self, rows: npt.ArrayLike) -> list[list[int]]:
        given = np.unique(np.asarray(rows, np.int64))
        order = np.lexsort([getattr(self._catalog, name)[given] for name in reversed(_PLACE)])
        return [[row] for row in given[order].tolist()]

    def expect(self, rows: Sequence[int]) -> None:
        """Nothing is further away than memory."""

    def read_run(self, rows: Sequence[int], into: Sequence[memoryview]) -> None:
        for row, target in zip(rows, into, strict=True):
            self._read(row, target)


def plan_fill(catalog: Catalog, targets: Sequence[Source], *, rank: int, cast: bool = False) -> LoadPlan:
    """The plan that fills `targets`; raises MismatchError that lists every difference. Writes nothing."""
    wants = [Want(target.key, target.dtype, target.shape, target.box) for target in targets]
    return plan_load(catalog, wants, rank=rank, cast=cast)


def fill(
    catalog: Catalog,
    tier: Read | RunReader,
    targets: Sequence[Source],
    *,
    rank: int,
    cast: bool = False,
    threads: int | None = None,
    plan: LoadPlan | None = None,
) -> None:
    """Fills every target from `tier`, which several threads call at once.

    `rank`: whose values of per-rank tensors (ALL_RANKS: those that serve every rank). `cast` converts dtypes that
    differ from the checkpoint's. `plan`: of `plan_fill` for the same arguments, where it is made already. Raises
    MismatchError before anything is written, and what the tier raises after.
    """
    made = plan_fill(catalog, targets, rank=rank, cast=cast) if plan is None else plan
    reader = tier if isinstance(tier, RunReader) else RowReader(catalog, tier)
    fill_alone(Filling(catalog, targets, made), reader, threads)


def fill_alone(filling: Filling, reader: RunReader, threads: int | None = None) -> None:
    """Reads everything into the targets; after the first run that fails no other begins."""
    runs = reader.runs(filling.rows)
    workers = min(threads or threads_for(reader), len(runs))
    stopped = threading.Event()

    def work(remaining: Iterator[int]) -> None:
        try:
            for number in remaining:
                if stopped.is_set():
                    return
                if number + workers < len(runs):
                    reader.expect(runs[number + workers])
                filling.read(reader, runs[number])
        except BaseException:
            stopped.set()
            raise

    remaining = iter(range(len(runs)))  # of a range: threads may share it
    if workers <= 1:
        work(remaining)
        return
    with concurrent.futures.ThreadPoolExecutor(workers, "ckptd-load") as pool:
        working = [pool.submit(work, remaining) for _ in range(workers)]
        try:
            for done in working:
                done.result()
        finally:
            stopped.set()  # also where the wait was interrupted


def default_threads() -> int:
    """Threads that use the cores."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def threads_for(reader: RunReader, ranks: int = 1) -> int:
    """Threads that read at the same time where so many `ranks` load on this node: as many as this rank has cores to
    itself, more where each waits for a network."""
    return max(1, default_threads() // ranks, min(MAX_THREADS, reader.parallel))


class Filling:
    """The targets of one load, and where the parts of each row go in them. Safe in threads that take different rows.

    `rows`: what must be read, ascending, of tied rows the first alone.
    """

    def __init__(self, catalog: Catalog, targets: Sequence[Source], plan: LoadPlan) -> None:
        self.catalog = catalog
        self._targets = targets
        self._plan = dataclasses.replace(plan, row=_untied(catalog)[plan.row]) if len(plan) else plan
        self._order = np.argsort(self._plan.row, kind="stable")
        self.rows, first = np.unique(self._plan.row[self._order], return_index=True)
        bounds = np.append(first, len(self._order)).tolist()
        self._spans = dict(zip(self.rows.tolist(), itertools.pairwise(bounds), strict=True))
        self._local = threading.local()

    def read(self, reader: RunReader, run: Sequence[int]) -> None:
        """Reads a run into its targets."""
        self.receive(run, lambda into: reader.read_run(run, into))

    def receive(self, run: Sequence[int], get: Callable[[list[memoryview]], None]) -> None:
        """Has `get` fill a buffer per row of `run`, the target's own memory where it can be, and fills the targets."""
        straight = [self.straight(row) for row in run]
        raw = [0 if found is not None else self._raw(row) for row, found in zip(run, straight, strict=True)]
        starts, total = packed(raw)
        staging = self._staging(total)
        memory = staging.numpy().data
        get(
            [
                memory[start : start + size] if found is None else found
                for found, start, size in zip(straight, starts, raw, strict=True)
            ]
        )
        for row, found, start in zip(run, straight, starts, strict=True):
            if found is None:
                self.place(row, staging[start : start + self._raw(row)])

    def straight(self, row: int) -> memoryview | None:
        """The target's own memory, where the row has one part that is the whole chunk in one contiguous run of it."""
        start, stop = self._spans.get(row, (0, 0))
        if stop - start != 1:
            return None
        part = int(self._order[start])
        target = self._targets[int(self._plan.want[part])]
        dimensions = len(target.shape)
        sizes = self._plan.sizes[part, :dimensions].tolist()
        if not self._by_address(target, row) or sizes != self.catalog.sizes[row, :dimensions].tolist():
            return None
        for size, stride, expected in zip(sizes, target.tensor.stride(), contiguous_strides(sizes), strict=True):
            if size > 1 and stride != expected:
                return None
        return memory_at(self._address(target, part), self._raw(row))

    def place(self, row: int, staged: torch.Tensor) -> None:
        """Copies all parts of a row, of which there may be none, out of its decoded bytes."""
        start, stop = self._spans.get(row, (0, 0))
        with torch.no_grad():
            for part in self._order[start:stop].tolist():
                self._place(part, row, staged)

    def _raw(self, row: int) -> int:
        return int(self.catalog.raw[row])

    def _staging(self, size: int) -> torch.Tensor:
        """This thread's buffer."""
        buffer: torch.Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = torch.empty(size, dtype=torch.uint8)
        return buffer

    def _by_address(self, target: Source, row: int) -> bool:
        tensor = target.tensor
        return tensor.device.type == "cpu" and target.dtype == self.catalog.tensors[self.catalog.tensor[row]].dtype

    def _address(self, target: Source, part: int) -> int:
        """Where the part's first element lies in the target."""
        steps = zip(self._inside(target, part), target.tensor.stride(), strict=True)
        return target.tensor.data_ptr() + sum(start * stride for start, stride in steps) * target.tensor.element_size()

    def _inside(self, target: Source, part: int) -> list[int]:
        """The part's offsets in the target tensor."""
        offsets = self._plan.offsets[part].tolist()
        return [offset - first for offset, first in zip(offsets, target.box.offsets, strict=False)]

    def _place(self, part: int, row: int, staged: torch.Tensor) -> None:
        target = self._targets[int(self._plan.want[part])]
        dimensions = len(target.shape)
        sizes = self._plan.sizes[part, :dimensions]
        chunk_sizes = self.catalog.sizes[row, :dimensions].tolist()
        inside = self._plan.offsets[part, :dimensions] - self.catalog.offsets[row, :dimensions]
        if not self._by_address(target, row):
            dtype = torch_dtype(self.catalog.tensors[self.catalog.tensor[row]].dtype)
            chunk = staged.view(dtype).view(chunk_sizes)
            target.tensor[_slices(self._inside(target, part), sizes.tolist())].copy_(
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


def packed(raw: Sequence[int]) -> tuple[list[int], int]:
    """Aligned starts for buffers of `raw` bytes one after the other, and the bytes they take together."""
    starts, end = [], 0
    for size in raw:
        starts.append(end)
        end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return starts, end


def memory_at(address: int, size: int) -> memoryview:
    """Memory, of a tensor for instance, as writable bytes; the caller keeps it alive."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _untied(catalog: Catalog) -> Ints:
    """For every row the first that has the same bytes of the same box: itself, but where keys are tied."""
    columns = [getattr(catalog, name) for name in (*COLUMNS, "offsets", "sizes")]
    order = np.lexsort([getattr(catalog, name) for name in reversed(_PLACE)])
    same = np.zeros(len(order), bool)
    same[1:] = catalog.raw[order[1:]] > 0
    for column in columns:
        equal = column[order[1:]] == column[order[:-1]]
        same[1:] &= equal if equal.ndim == 1 else equal.all(axis=1)
    for index in np.flatnonzero(same).tolist():  # ties are few; their dtypes may differ by name only
        one, other = (catalog.tensors[catalog.tensor[order[i]]].dtype for i in (index - 1, index))
        same[index] = one == other
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    untied = np.empty(len(order), np.int64)
    untied[order] = order[first]
    return untied


def _slices(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
