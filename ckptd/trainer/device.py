"""CUDA devices as PyTorch has them, and the engine that copies from them.

Owns the only places where the trainer asks PyTorch about devices and streams (`platform`, which tests replace by one
whose devices are in main memory), the engine, and which memory is pinned. Where the CUDA driver cannot be loaded, as
under ROCm, tensors on devices are OTHER: PyTorch copies them, and the loop waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from ckptd.core.native import Cuda

log = logging.getLogger("ckptd.capture")

HOST, OTHER = -1, -2
"""Instead of the number of a CUDA device: memory of the CPU; memory that PyTorch alone can copy from."""

Streams = Mapping[int, Iterable[int]]
"""Handles of streams, by device."""


class Platform(Protocol):
    """Where tensors are, and which streams are in use."""

    library: str

    def devices(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """The number of each tensor's device, HOST or OTHER."""

    def streams(self) -> dict[int, int]:
        """This thread's current stream on each device."""


class PyTorch:
    """What PyTorch says."""

    library = "libcuda.so.1"

    def devices(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        return [
            HOST if tensor.is_cpu else tensor.get_device() if tensor.is_cuda else OTHER  # ROCm's say `is_cuda` too
            for tensor in tensors
        ]

    def streams(self) -> dict[int, int]:
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return {}
        return {device: torch.cuda.current_stream(device).cuda_stream for device in range(torch.cuda.device_count())}


platform: Platform = PyTorch()
_engines: dict[str, Cuda | None] = {}
_pinned: dict[int, int] = {}
_warned: set[str] = set()


def engine() -> Cuda | None:
    """Copies from devices; None, and a warning, where there is no CUDA driver."""
    library = platform.library
    if library not in _engines:
        try:
            _engines[library] = Cuda(library)
        except RuntimeError as error:
            log.warning("tensors on devices are copied by PyTorch, and the loop waits for it: %s", error)
            _engines[library] = None
    return _engines[library]


def close() -> None:
    """Lets go of what the engine holds on devices; it may be used again."""
    cuda = _engines.get(platform.library)
    if cuda is not None:
        cuda.close()


def devices_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The number of the CUDA device of each tensor, HOST, or OTHER."""
    found = platform.devices(tensors)
    if any(device >= 0 for device in found) and engine() is None:
        return [OTHER if device >= 0 else device for device in found]
    return found


def pin(device: int, address: int, size: int) -> None:
    """Lets devices copy into this memory directly; a warning where that cannot be."""
    cuda = engine()
    if cuda is None:
        return
    try:
        cuda.pin(device, address, size)
        _pinned[address] = device
    except RuntimeError as error:
        if platform.library not in _warned:
            _warned.add(platform.library)
            log.warning(
                "snapshot memory cannot be pinned, so copies from devices are slow and hold the loop (is locked memory "
                "limited? `ulimit -l`): %s",
                error,
            )


def unpin(address: int) -> None:
    """Before memory is unmapped; of memory that is not pinned nothing is done."""
    device = _pinned.pop(address, None)
    if device is None:
        return
    cuda = engine()
    assert cuda is not None
    try:
        cuda.unpin(device, address)
    except RuntimeError as error:
        log.warning("snapshot memory stays pinned: %s", error)


class Writers:
    """The streams that write the state: those current before optimizer steps and at boundaries."""

    def __init__(self) -> None:
        self._seen: dict[int, set[int]] = {}

    def note(self) -> dict[int, list[int]]:
        """The streams that are current now, which count until the next boundary."""
        now = platform.streams()
        for device, stream in now.items():
            self._seen.setdefault(device, set()).add(stream)
        return {device: [stream] for device, stream in now.items()}

    def since_boundary(self) -> dict[int, list[int]]:
        """Those noted and those current now; a new list begins."""
        self.note()
        seen, self._seen = self._seen, {}
        return {device: sorted(streams) for device, streams in seen.items()}
