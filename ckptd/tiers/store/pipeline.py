"""Encoding chunks on several threads, in order, in bounded memory.

Rows are opened and encoded in batches of up to one chunk's bytes, so that small chunks cost no thread hand-over each.
What is encoded next is opened meanwhile, by threads that do nothing else: they wait for disks and networks.
Memory: `threads` + 2 pairs of buffers of one batch, raw (used only where rows cannot be read where they are) and
stored. Does no I/O of its own.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from ckptd.core.box import CHUNK_BYTES
from ckptd.core.catalog import Catalog
from ckptd.core.errors import CorruptionError, FormatError
from ckptd.format.chunk import encode_chunk
from ckptd.plan.share import Read, View
from ckptd.tiers.throttle import Throttle

_BATCH_ROWS = 1024


class EncodedRow(NamedTuple):
    """One chunk, ready to be written; `stored` is only valid until the next one is asked for."""

    row: int
    codec: int
    stored: memoryview


class _Buffers:
    """Memory for one batch."""

    def __init__(self) -> None:
        self.raw, self.stored = (memoryview(mmap.mmap(-1, CHUNK_BYTES, mmap.MAP_PRIVATE)) for _ in range(2))


def copying(read: Read) -> View:
    """A view of rows that `read(row, into)` copies."""

    def view(row: int, buffer: memoryview) -> memoryview:
        read(row, buffer)
        return buffer

    return view


def encoded_rows(
    catalog: Catalog,
    rows: Sequence[int],
    view: View,
    threads: int,
    cancelled: Callable[[], bool],
    throttle: Throttle | None = None,
) -> Generator[EncodedRow, None, None]:
    """The chunks of `rows`, in this order, as fast as `throttle` lets their stored bytes pass; `writer` of `catalog` is
    the rank that captured each.

    Raises CorruptionError if what was encoded does not have the checksum in the catalog. Ends early if `cancelled()`.
    Closing it, early or not, waits for its threads.
    """

    def opened(batch: list[int], buffers: _Buffers) -> list[tuple[int, memoryview]]:
        found, position = [], 0
        for row in batch:
            if cancelled():
                break
            size = int(catalog.raw[row])
            found.append((row, view(row, buffers.raw[position : position + size])))
            position += size
        return found

    def encode(opening: Future[list[tuple[int, memoryview]]], buffers: _Buffers) -> list[EncodedRow]:
        found, position = [], 0
        for row, raw in opening.result():
            into = buffers.stored[position : position + raw.nbytes]
            encoded = encode_chunk(raw, catalog.tensors[catalog.tensor[row]].dtype, into)
            _check(catalog, row, encoded.crc)
            found.append(EncodedRow(row, encoded.codec, encoded.stored))
            position += raw.nbytes
        return found

    def passing(encoded: list[EncodedRow]) -> Iterator[EncodedRow]:
        for row in encoded:
            if throttle is not None and not throttle.admit(row.stored.nbytes, cancelled):
                return
            yield row

    free = [_Buffers() for _ in range(threads + 2)]
    pending: deque[tuple[Future[list[EncodedRow]], _Buffers]] = deque()
    openers = ThreadPoolExecutor(len(free), thread_name_prefix="ckptd-read")
    encoders = ThreadPoolExecutor(threads, thread_name_prefix="ckptd-encode")
    try:
        for batch in _batches(catalog, rows):
            if not free:
                future, buffers = pending.popleft()
                yield from passing(future.result())
                free.append(buffers)
            if cancelled():
                return
            buffers = free.pop()
            pending.append((encoders.submit(encode, openers.submit(opened, batch, buffers), buffers), buffers))
        for future, _ in pending:
            yield from passing(future.result())
    finally:
        encoders.shutdown(wait=False, cancel_futures=True)
        openers.shutdown(wait=True)  # not cancelled: an encoder may wait for what is opened
        encoders.shutdown(wait=True)


def _batches(catalog: Catalog, rows: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for row in rows:
        raw = int(catalog.raw[row])
        if raw > CHUNK_BYTES:
            raise FormatError(f"{_name(catalog, row)}: {raw} bytes; a chunk has at most {CHUNK_BYTES}")
        if batch and (size + raw > CHUNK_BYTES or len(batch) == _BATCH_ROWS):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += raw
    if batch:
        yield batch


def _check(catalog: Catalog, row: int, found: int) -> None:
    expected = int(catalog.crc[row])
    if found != expected:
        raise CorruptionError(
            f"{_name(catalog, row)}: captured with CRC32C {expected:08x}, read back with {found:08x}; "
            "the snapshot in memory was damaged"
        )


def _name(catalog: Catalog, row: int) -> str:
    return f"tensor {catalog.tensors[catalog.tensor[row]].key!r}, {catalog.box(row)} of rank {catalog.writer[row]}"
