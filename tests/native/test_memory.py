"""Population of mapped memory, as the kernel reports it."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import pytest

from ckptd.core import native


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
