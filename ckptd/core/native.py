"""The native functions: checksums, copies of strided boxes, byte planes, erasure codes, population of memory.

The only importer of `ckptd._native`. Loads ISA-L once, on import: from the pyeclib wheel, else the system's; the CUDA
driver where a `Cuda` is made. All functions release the GIL and check what they can (ValueError); addresses cannot be
checked and are the caller's care.

`Cuda(library)` copies from devices: RuntimeError where the driver is not there, or says no. `copy` queues boxes of one
device into packed targets, as `copy_boxes` takes them, after what is queued on the streams `after`; its `CudaCopy` says
when they are there (`finished`, then `settle`), and lets streams wait for it (`hold`). csrc/cuda.hpp has the details.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckptd import _native
from ckptd._native import Cuda, CudaCopy
from ckptd.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ckptd._native import BufferLike

__all__ = [
    "Blocks",
    "Cuda",
    "CudaCopy",
    "address_of",
    "back_with_huge_pages",
    "byteplanes_join",
    "byteplanes_split",
    "copy_boxes",
    "copy_bytes",
    "crc32c",
    "crc32c_combine",
    "erasure_decode",
    "erasure_encode",
    "helpers_cpu_s",
    "populate",
]


def _libraries() -> Iterator[str]:
    """Where ISA-L may be, the likeliest first."""
    wheel = importlib.util.find_spec("pyeclib")
    if wheel is not None and wheel.origin is not None:
        yield from map(str, sorted(Path(wheel.origin).parents[1].glob("pyeclib.libs/libisal*.so*")))
    yield "libisal.so.2"


def _load_isal() -> None:
    failures = []
    for library in _libraries():
        try:
            return _native.load_isal(library)
        except RuntimeError as error:
            failures.append(f"{library}: {error}")
    raise ConfigError(
        "ISA-L, the library of checksums and erasure codes, cannot be loaded; install the pyeclib wheel (1.8 or later) "
        f"or the system's libisal2. Tried: {'; '.join(failures)}"
    )


_load_isal()


def crc32c(data: BufferLike, initial: int = 0) -> int:
    """CRC-32C of contiguous bytes, continuing `initial`, the CRC of what came before. Of nothing: `initial`."""
    return _native.crc32c(data, initial)


def crc32c_combine(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32C of two byte strings one after the other, from their CRCs and the length of the second."""
    return _native.crc32c_combine(first, second, second_bytes)


def copy_boxes(
    source: npt.NDArray[np.uint64],
    target: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.int64],
    source_strides: npt.NDArray[np.int64],
    target_strides: npt.NDArray[np.int64],
    itemsize: npt.NDArray[np.int64],
    *,
    crc: npt.NDArray[np.uint32] | None = None,
    threads: int = 1,
) -> None:
    """Copies n strided boxes of D dimensions, one a row, and optionally takes their checksums on the way.

    `source`, `target`, `itemsize` and `crc` are [n], `sizes` and the strides [n, D] (at most 64; D = 0 is one element).
    Addresses are of the first element, strides in bytes and not negative. `crc` receives the CRC-32C of each box's
    bytes in row-major order. A target of 0: only the checksum. Uses up to `threads` threads, the caller's included;
    big boxes are split among them. Raises ValueError for arrays of the wrong shape or dtype and for impossible jobs,
    before a byte is copied.

    A checksum is of the bytes that were copied, even if the source changes meanwhile.
    """
    _native.copy_boxes(source, target, sizes, source_strides, target_strides, itemsize, crc=crc, threads=threads)


def helpers_cpu_s() -> float:
    """CPU seconds of the threads that `copy_boxes` has started since the process began; its callers are not counted."""
    return _native.helpers_cpu_s()


def copy_bytes(source_address: int, target: BufferLike, crc: bool = True) -> int:
    """Fills the writable contiguous `target` from an address; returns the CRC-32C of what was copied (0 without `crc`),
    even if the source changes meanwhile."""
    return _native.copy_bytes(source_address, target, crc)


def address_of(buffer: BufferLike) -> int:
    """The address of the first byte of a contiguous buffer, good for as long as the buffer lives."""
    return _native.address_of(buffer)


class Blocks(NamedTuple):
    """Where the `leading` planes of items lie: in `memory`, one after the other, each cut into blocks of `block` bytes
    with `gap` bytes before each one that are somebody else's."""

    memory: memoryview
    leading: int
    block: int
    gap: int

    @staticmethod
    def plane_bytes(items: int, block: int, gap: int) -> int:
        """Bytes that one plane takes so."""
        return items + -(-items // block) * gap


def byteplanes_split(source: BufferLike, planes: BufferLike, itemsize: int, blocks: Blocks | None = None) -> int:
    """Puts bytes of equal significance together: plane p is byte p of every item of `source`. The leading planes go to
    `blocks`, if given, the others to `planes`, one after the other. Returns the CRC-32C of what was taken apart, even
    if `source` changes meanwhile.

    All are contiguous, of exactly the bytes needed, and do not overlap; ValueError for other lengths and for an
    `itemsize` that is not 1 to 64.
    """
    return _native.byteplanes_split(source, planes, itemsize, *(blocks or ()))


def byteplanes_join(planes: BufferLike, target: BufferLike, itemsize: int, blocks: Blocks | None = None) -> int:
    """The inverse of `byteplanes_split`; returns the CRC-32C of `target`."""
    return _native.byteplanes_join(planes, target, itemsize, *(blocks or ()))


def erasure_encode(
    sources: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.int64],
    targets: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.int64],
    *,
    crc: npt.NDArray[np.uint32] | None = None,
    threads: int = 1,
    portable: bool = False,
) -> None:
    """The m parities of k data segments, for n rows at once; the code of docs/erasure.md, section 4.

    `sources` and `sizes` are [n, k]: addresses, and bytes that are there; a source shorter than its row is as if zeros
    followed, and is not read beyond its end. `targets` are [n, m], `lengths` [n]: each target receives that many bytes.
    No alignment is needed. `crc` [n, m] receives the CRC-32C of each target. Uses up to `threads` threads, the caller's
    included; long rows are split among them. `portable`: without ISA-L, slowly, the same bytes.

    Raises ValueError, before a byte is read or written, for arrays of the wrong shape or dtype, k < 1, k + m > 256,
    sizes beyond their row, null addresses, and targets that overlap a source or each other in one row.
    """
    _native.erasure_encode(sources, sizes, targets, lengths, crc=crc, threads=threads, portable=portable)


def erasure_decode(
    present: Sequence[int],
    wanted: Sequence[int],
    sources: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.int64],
    targets: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.int64],
    *,
    crc: npt.NDArray[np.uint32] | None = None,
    threads: int = 1,
    portable: bool = False,
) -> None:
    """The wanted positions of stripes from any k present ones; arrays and errors as in `erasure_encode`.

    Column i of `sources` and `sizes` is position present[i], column i of `targets` position wanted[i]: 0 to k - 1 are
    data, k + t is parity t, where k = len(present). Also ValueError for positions that are none, given twice, or both
    present and wanted.
    """
    _native.erasure_decode(
        present, wanted, sources, sizes, targets, lengths, crc=crc, threads=threads, portable=portable
    )


def populate(address: int, size: int, *, write: bool = True) -> None:
    """Maps all pages of a range at once, for writing or only for reading; raises OSError.

    EINVAL: the kernel is older than 5.14; EFAULT: a page cannot be had, ENOMEM: part of the range is not mapped.
    """
    _native.populate(address, size, write=write)


def back_with_huge_pages(descriptor: int, offset: int, size: int, most_slow: int) -> int:
    """Backs a range of a memfd with pages of 2 MiB as far as they are to be had; returns the bytes that now lie there.

    The bytes stay as they are, and what is not backed stays as it was: nothing depends on it but speed, so this is
    never an error, and it stops after `most_slow` that took the kernel longer than 2 ms to make. Whole pages within the
    range only. Linux 6.1 and newer, whatever transparent huge pages are set to (MADV_COLLAPSE, madvise(2)).
    """
    return _native.back_with_huge_pages(descriptor, offset, size, most_slow)
