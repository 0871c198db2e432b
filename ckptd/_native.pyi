from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

# numpy declares the buffer protocol only for Python 3.12 and later.
BufferLike: TypeAlias = Buffer | npt.NDArray[Any]

def load_isal(path: str) -> None: ...
def crc32c(data: BufferLike, initial: int = 0) -> int: ...
def crc32c_combine(first: int, second: int, second_bytes: int) -> int: ...
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
) -> None: ...
def helpers_cpu_s() -> float: ...
def copy_bytes(source_address: int, target: BufferLike, crc: bool = True) -> int: ...
def address_of(buffer: BufferLike) -> int: ...
def byteplanes_split(
    source: BufferLike,
    planes: BufferLike,
    itemsize: int,
    blocks: BufferLike | None = None,
    leading: int = 0,
    block: int = 0,
    gap: int = 0,
) -> int: ...
def byteplanes_join(
    planes: BufferLike,
    target: BufferLike,
    itemsize: int,
    blocks: BufferLike | None = None,
    leading: int = 0,
    block: int = 0,
    gap: int = 0,
) -> int: ...
def erasure_encode(
    sources: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.int64],
    targets: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.int64],
    *,
    crc: npt.NDArray[np.uint32] | None = None,
    threads: int = 1,
    portable: bool = False,
) -> None: ...
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
) -> None: ...
def populate(address: int, size: int, *, write: bool = True) -> None: ...
def back_with_huge_pages(descriptor: int, offset: int, size: int, most_slow: int) -> int: ...

class CudaCopy:
    @property
    def error(self) -> str: ...
    def hold(self, stream: int) -> bool: ...
    def finished(self, seconds: float) -> bool: ...
    def settle(self) -> None: ...

class Cuda:
    def __init__(self, library: str) -> None: ...
    def pin(self, device: int, address: int, size: int) -> None: ...
    def unpin(self, device: int, address: int) -> None: ...
    def copy(
        self,
        device: int,
        after: Sequence[int],
        source: npt.NDArray[np.uint64],
        target: npt.NDArray[np.uint64],
        sizes: npt.NDArray[np.int64],
        source_strides: npt.NDArray[np.int64],
        itemsize: npt.NDArray[np.int64],
    ) -> CudaCopy: ...
    def close(self) -> None: ...
