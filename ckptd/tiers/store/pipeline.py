"""Encoding chunks on several threads, in order, in bounded memory.

Rows are read and encoded in batches of up to one chunk's bytes, so that small chunks cost no thread hand-over each.
What is encoded next is read meanwhile, by threads that do nothing else.
Memory: `threads` + 2 buffers of one batch, and what they compress to. Does no I/O of its own.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from ckptd.core import native
from ckptd.core.box import CHUNK_BYTES
from ckptd.core.catalog import Catalog
from ckptd.core.errors import CorruptionError, FormatError
from ckptd.format.chunk import Stored, encode_chunk
from ckptd.tiers.throttle import Throttle

Read = Callable[[int, memoryview], None]

_BATCH_ROWS = 1024


class EncodedRow(NamedTuple):
    """One chunk, ready to be written; `stored` is only valid until the next one is asked for."""

    row: int
    codec: int
    stored: Stored


def encoded_rows(
    catalog: Catalog,
    rows: Sequence[int],
    read: Read,
    threads: int,
    cancelled: Callable[[], bool],
    throttle: Throttle | None = None,
) -> Generator[EncodedRow, None, None]:
    """The chunks of `rows`, in this order, as fast as `throttle` lets their stored bytes pass. `read(row, into)` is
    called on any thread, for several rows at once.

    Raises CorruptionError if what was read does not have the checksum in the catalog. Ends early if `cancelled()`.
    Closing it, early or not, waits for its threads.
    """

    def filled(batch: list[int], buffer: memoryview) -> list[tuple[int, memoryview]]:
        found, position = [], 0
        for row in batch:
            if cancelled():
                break
            raw = buffer[position : position + int(catalog.raw[row])]
            position += raw.nbytes
            read(row, raw)
            _check(catalog, row, raw)
            found.append((row, raw))
        return found

    def encode(reading: Future[list[tuple[int, memoryview]]]) -> list[EncodedRow]:
        dtypes = catalog.tensors
        return [EncodedRow(row, *encode_chunk(raw, dtypes[catalog.tensor[row]].dtype)) for row, raw in reading.result()]

    def passing(encoded: list[EncodedRow]) -> Iterator[EncodedRow]:
        for row in encoded:
            if throttle is not None and not throttle.admit(len(row.stored), cancelled):
                return
            yield row

    free = [memoryview(mmap.mmap(-1, CHUNK_BYTES)) for _ in range(threads + 2)]
    pending: deque[tuple[Future[list[EncodedRow]], memoryview]] = deque()
    readers = ThreadPoolExecutor(len(free), thread_name_prefix="ckptd-read")
    encoders = ThreadPoolExecutor(threads, thread_name_prefix="ckptd-encode")
    try:
        for batch in _batches(catalog, rows):
            if not free:
                future, buffer = pending.popleft()
                yield from passing(future.result())
                free.append(buffer)
            if cancelled():
                return
            buffer = free.pop()
            pending.append((encoders.submit(encode, readers.submit(filled, batch, buffer)), buffer))
        for future, _ in pending:
            yield from passing(future.result())
    finally:
        encoders.shutdown(wait=False, cancel_futures=True)
        readers.shutdown(wait=True)  # not cancelled: an encoder may wait for what is read
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


def _check(catalog: Catalog, row: int, raw: memoryview) -> None:
    found, expected = native.crc32c(raw), int(catalog.crc[row])
    if found != expected:
        raise CorruptionError(
            f"{_name(catalog, row)}: captured with CRC32C {expected:08x}, read back with {found:08x}; "
            "the snapshot in memory was damaged"
        )


def _name(catalog: Catalog, row: int) -> str:
    return f"tensor {catalog.tensors[catalog.tensor[row]].key!r}, {catalog.box(row)}"
