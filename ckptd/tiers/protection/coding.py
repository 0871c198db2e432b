"""Rows of pieces through the erasure code, with the checksums of what comes out. Pure: bytes in, bytes out.

A row is given as whole buffers; inside it is worked on piece by piece, as each has a checksum of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ckptd.core.native import address_of, erasure_decode, erasure_encode
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.tiers.protection.work import Bytes

Checksums = npt.NDArray[np.uint32]


def encode(sources: Sequence[Bytes], targets: Sequence[Bytes], length: int) -> list[Checksums]:
    """Fills the first `length` bytes of each target with its parity; the CRC-32C of each piece of each. Sources may be
    shorter."""
    starts = np.arange(0, length, PIECE_BYTES, dtype=np.int64)
    crc = np.zeros((len(starts), len(targets)), np.uint32)
    addresses, sizes, lengths = _columns(sources, starts, length)
    erasure_encode(addresses, sizes, _columns(targets, starts, length)[0], lengths, crc=crc)
    return [np.ascontiguousarray(crc[:, parity]) for parity in range(len(targets))]


def decode(present: Sequence[int], wanted: int, sources: Sequence[Bytes], target: Bytes) -> Checksums:
    """Fills the target with a data position from the present ones; the CRC-32C of each of its pieces."""
    starts = np.arange(0, len(target), PIECE_BYTES, dtype=np.int64)
    crc = np.zeros((len(starts), 1), np.uint32)
    addresses, sizes, lengths = _columns(sources, starts, len(target))
    targets = _columns([target], starts, len(target))[0]
    erasure_decode(present, [wanted], addresses, sizes, targets, lengths, crc=crc)
    return crc[:, 0]


def _columns(
    buffers: Sequence[Bytes], starts: npt.NDArray[np.int64], length: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Addresses [rows, buffers] of the parts of buffers, how much is there of each, and the lengths of the rows."""
    bases = np.array([address_of(buffer) if len(buffer) else 0 for buffer in buffers], np.uint64)
    there = np.array([min(len(buffer), length) for buffer in buffers], np.int64)
    sizes = np.clip(there[None, :] - starts[:, None], 0, PIECE_BYTES)
    return bases[None, :] + starts[:, None].astype(np.uint64), sizes, np.minimum(length - starts, PIECE_BYTES)
