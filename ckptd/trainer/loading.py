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
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from ckptd.core.box import padded
from ckptd.core.catalog import COLUMNS, Catalog
from ckptd.core.native import copy_boxes
from ckptd.core.types import itemsize
from ckptd.plan.load import LoadPlan, Want, plan_load
from ckptd.plan.share import Read
from ckptd.tensors.values import torch_dtype
from ckptd.trainer.state_tensors import Source

Ints = npt.NDArray[np.int64]

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
        self._parts = _Parts.of(catalog, targets, plan)
        self.rows, first = np.unique(self._parts.row, return_index=True)
        self._first = np.append(first, len(self._parts.row))
        self._local = threading.local()
        self._for_cuda = any(target.tensor.is_cuda for target in targets)

    def read(self, reader: RunReader, run: Sequence[int]) -> None:
        """Reads a run into its targets."""
        self.receive(run, lambda into: reader.read_run(run, into))

    def receive(self, run: Sequence[int], get: Callable[[list[memoryview]], None]) -> None:
        """Has `get` fill a buffer per row of `run`, the target's own memory where it can be, and fills the targets."""
        rows = np.asarray(run, np.int64)
        addresses, raw = self._straight(rows), self.catalog.raw[rows]
        staged = np.flatnonzero(addresses == 0)
        starts, total = packed(raw[staged].tolist())
        staging = self._staging(total)
        addresses[staged] = staging.data_ptr() + np.array(starts, np.int64)
        get([memory_at(*place) for place in zip(addresses.tolist(), raw.tolist(), strict=True)])
        self.place(rows[staged], addresses[staged])

    def place(self, rows: npt.ArrayLike, addresses: npt.ArrayLike) -> None:
        """Copies all parts of some rows, of which there may be none, out of their decoded bytes, which are at these
        addresses."""
        first, counts = self._spans(np.asarray(rows, np.int64))
        ends = np.cumsum(counts)
        parts = np.arange(int(counts.sum())) + np.repeat(first - (ends - counts), counts)
        sources = np.repeat(np.asarray(addresses, np.int64), counts)
        near = self._parts.target[parts] != 0
        self._parts.copy(parts[near], sources[near])
        with torch.no_grad():
            for part, source in zip(parts[~near].tolist(), sources[~near].tolist(), strict=True):
                self._parts.convert(part, memory_at(source, int(self.catalog.raw[self._parts.row[part]])))

    def _straight(self, rows: Ints) -> Ints:
        """The address of the target's own memory for each row that has one part, which is the whole chunk in one
        contiguous run of it; 0 for the others."""
        first, counts = self._spans(rows)
        single = counts == 1
        addresses = np.zeros(len(rows), np.int64)
        parts = first[single]
        addresses[single] = np.where(self._parts.whole[parts], self._parts.target[parts], 0)
        return addresses

    def _spans(self, rows: Ints) -> tuple[Ints, Ints]:
        """The first part of each row, and how many it has."""
        if not len(self.rows):
            return np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        index = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        found = self.rows[index] == rows
        return self._first[index], np.where(found, self._first[index + 1] - self._first[index], 0)

    def _staging(self, size: int) -> torch.Tensor:
        """This thread's buffer; pinned where a CUDA device will read from it, which is then one direct copy."""
        buffer: torch.Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._for_cuda)
        return buffer


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """The parts of a load plan by `row`, as copies from a decoded chunk to a target.

    `source`: bytes from the beginning of the chunk to the part's first element; `target`: the address of that element
    in the target, 0 where copying by address is not possible; strides are in bytes; `whole`: it is all of the chunk,
    and contiguous in the target.
    """

    catalog: Catalog
    targets: Sequence[Source]
    want: Ints
    row: Ints
    offsets: Ints
    sizes: Ints
    source: Ints
    target: Ints
    source_strides: Ints
    target_strides: Ints
    width: Ints
    whole: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, catalog: Catalog, targets: Sequence[Source], plan: LoadPlan) -> _Parts:
        row = _untied(catalog)[plan.row] if len(plan) else plan.row
        order = np.argsort(row, kind="stable")
        row, offsets, sizes = row[order], plan.offsets[order], plan.sizes[order]
        used, want = np.unique(plan.want[order], return_inverse=True)
        filled = [targets[index] for index in used.tolist()]
        low, strides, address, width = _memory_of(catalog, filled)
        chunk_strides = _contiguous(catalog.sizes[row]) * width[want, None]
        target_strides = strides[want]
        own_strides = _contiguous(sizes) * width[want, None]
        target = address[want] + ((offsets - low[want]) * target_strides).sum(axis=1)
        return cls(
            catalog=catalog,
            targets=filled,
            want=want,
            row=row,
            offsets=offsets,
            sizes=sizes,
            source=((offsets - catalog.offsets[row]) * chunk_strides).sum(axis=1),
            target=np.where(address[want] != 0, target, 0),
            source_strides=chunk_strides,
            target_strides=target_strides,
            width=width[want],
            whole=((sizes == catalog.sizes[row]) & ((sizes <= 1) | (target_strides == own_strides))).all(axis=1),
        )

    def copy(self, parts: Ints, sources: Ints) -> None:
        """Copies by address, out of chunks at `sources`."""
        if len(parts):
            copy_boxes(
                (sources + self.source[parts]).astype(np.uint64),
                self.target[parts].astype(np.uint64),
                self.sizes[parts],
                self.source_strides[parts],
                self.target_strides[parts],
                self.width[parts],
            )

    def convert(self, part: int, chunk: memoryview) -> None:
        """Copies one part out of its chunk by means of torch: into another dtype, or onto a device."""
        row, target = self.row[part], self.targets[self.want[part]]
        dimensions = len(target.shape)
        sizes, offsets = self.sizes[part, :dimensions], self.offsets[part, :dimensions]
        dtype = torch_dtype(self.catalog.tensors[self.catalog.tensor[row]].dtype)
        shape = self.catalog.sizes[row, :dimensions].tolist()
        decoded = torch.frombuffer(chunk, dtype=torch.uint8).view(dtype).view(shape)
        inside = offsets - self.catalog.offsets[row, :dimensions]
        target.tensor[_slices(offsets - np.array(target.box.offsets, np.int64), sizes)].copy_(
            decoded[_slices(inside, sizes)]
        )


def _memory_of(catalog: Catalog, targets: Sequence[Source]) -> tuple[Ints, Ints, Ints, Ints]:
    """Of each target: the offsets of its box, its strides in bytes, its address (0 where its memory cannot be written
    by address as what the catalog has), and the bytes of an element in the catalog."""
    dtypes = [catalog.tensors[catalog.index[target.key]].dtype for target in targets]
    near = [target.tensor.is_cpu and target.dtype == dtype for target, dtype in zip(targets, dtypes, strict=True)]
    address = [target.tensor.data_ptr() if by else 0 for target, by in zip(targets, near, strict=True)]
    width = np.array([itemsize(dtype) for dtype in dtypes], np.int64)
    low = padded([target.box.offsets for target in targets], catalog.offsets.shape[1], 0)
    strides = padded([target.tensor.stride() for target in targets], catalog.offsets.shape[1], 0)
    return low, strides * width[:, None], np.array(address, np.int64), width


def _contiguous(sizes: Ints) -> Ints:
    """The strides, in elements, of row-major boxes of these sizes."""
    strides = np.ones_like(sizes)
    if sizes.shape[1] > 1:
        strides[:, :-1] = np.cumprod(sizes[:, :0:-1], axis=1)[:, ::-1]
    return strides


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


def _slices(offsets: Ints, sizes: Ints) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True))
