"""Population and huge pages of memory, as the kernel reports them."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from ckptd.core import native

HUGE = 2 * 1024 * 1024


def resident_pages(address: int) -> int:
    """Kilobytes resident of the mapping that begins at `address`, in pages."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            break
    return next(int(line.split()[1]) * 1024 // mmap.PAGESIZE for line in lines if line.startswith("Rss:"))


@pytest.mark.parametrize("write", [True, False])
def test_populate_maps_every_page_that_the_range_touches(write: bool) -> None:
    """A range of parts of pages counts as whole pages. The mapping is shared, as an arena's is."""
    with mmap.mmap(-1, 8 * mmap.PAGESIZE) as memory:
        address = native.address_of(memory)
        assert resident_pages(address) == 0
        native.populate(address + 2 * mmap.PAGESIZE - 1, mmap.PAGESIZE + 2, write=write)
        assert resident_pages(address) == 3
        native.populate(address, 0)
        assert resident_pages(address) == 3


def test_populate_of_what_is_not_mapped_is_an_os_error() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        address = native.address_of(memory)
    with pytest.raises(OSError, match=r"allocate|argument") as caught:
        native.populate(address, 2**46)
    assert caught.value.errno in (errno.ENOMEM, errno.EINVAL)


def test_huge_pages_leave_bytes_and_size_as_they_are() -> None:
    """Whole huge pages within the range are backed, nothing outside it; where the kernel has none, nothing is."""
    size = 3 * HUGE + 5 * mmap.PAGESIZE
    descriptor = os.memfd_create("test")
    try:
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, b"before", HUGE - 3)
        os.pwrite(descriptor, b"end", size - 3)
        backed = native.back_with_huge_pages(descriptor, mmap.PAGESIZE, size - mmap.PAGESIZE, 100)
        assert backed in (0, 2 * HUGE)
        assert os.pread(descriptor, 6, HUGE - 3) == b"before"
        assert os.pread(descriptor, 3, size - 3) == b"end"
        assert os.pread(descriptor, HUGE, 2 * HUGE) == bytes(HUGE)
        resident = os.fstat(descriptor).st_blocks * 512
        assert resident >= backed
        assert resident <= backed + 4 * mmap.PAGESIZE + (HUGE if backed == 0 else 0)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("size", [0, 4096, HUGE - 1])
def test_less_than_a_huge_page_is_not_backed(size: int) -> None:
    descriptor = os.memfd_create("test")
    try:
        os.ftruncate(descriptor, max(size, 1))
        assert native.back_with_huge_pages(descriptor, 0, size, 100) == 0
        assert os.fstat(descriptor).st_blocks == 0
    finally:
        os.close(descriptor)


def test_no_huge_pages_of_what_is_no_memory() -> None:
    """Never an error."""
    reading, writing = os.pipe()
    try:
        for descriptor in (-1, reading):
            assert native.back_with_huge_pages(descriptor, 0, 2 * HUGE, 100) == 0
    finally:
        os.close(reading)
        os.close(writing)
