"""Rows of pieces through the erasure code, with the checksums of what comes out. Pure: bytes in, bytes out.

Checksums are of halves of pieces where parities are made (tiers/protection/area.py) and of pieces where strings are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ckptd.core.native import address_of, crc32c_combine, erasure_decode, erasure_encode
from ckptd.plan.stripe import PIECE_BYTES
from ckptd.tiers.peers.wire import BATCH_BYTES
from ckptd.tiers.protection.work import Bytes

Checksums = npt.NDArray[np.uint32]


def encode(sources: Sequence[Bytes], targets: Sequence[Bytes], length: int) -> list[Checksums]:
    """Fills the first `length` bytes of each target with its parity; the CRC-32C of each half piece of each. Sources
    may be shorter."""
    starts = np.arange(0, length, BATCH_BYTES, dtype=np.int64)
    crc = np.zeros((len(starts), len(targets)), np.uint32)
    addresses, sizes, lengths = _columns(sources, starts, BATCH_BYTES, length)
    erasure_encode(addresses, sizes, _columns(targets, starts, BATCH_BYTES, length)[0], lengths, crc=crc)
    return [np.ascontiguousarray(crc[:, parity]) for parity in range(len(targets))]


def decode(present: Sequence[int], wanted: int, sources: Sequence[Bytes], target: Bytes) -> Checksums:
    """Fills the target with a data position from the present ones; the CRC-32C of each of its pieces."""
    starts = np.arange(0, len(target), PIECE_BYTES, dtype=np.int64)
    crc = np.zeros((len(starts), 1), np.uint32)
    addresses, sizes, lengths = _columns(sources, starts, PIECE_BYTES, len(target))
    targets = _columns([target], starts, PIECE_BYTES, len(target))[0]
    erasure_decode(present, [wanted], addresses, sizes, targets, lengths, crc=crc)
    return crc[:, 0]


def of_pieces(halves: Checksums, size: int) -> Checksums:
    """The CRC-32C of each piece of `size` bytes from those of their halves."""
    found = halves[::2].copy()
    for piece, second in enumerate(halves[1::2]):
        rest = min(BATCH_BYTES, size - (2 * piece + 1) * BATCH_BYTES)
        found[piece] = crc32c_combine(int(found[piece]), int(second), rest)
    return found


def _columns(
    buffers: Sequence[Bytes], starts: npt.NDArray[np.int64], step: int, length: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Addresses [rows, buffers] of the parts of buffers, how much is there of each, and the lengths of the rows."""
    bases = np.array([address_of(buffer) if len(buffer) else 0 for buffer in buffers], np.uint64)
    there = np.array([min(len(buffer), length) for buffer in buffers], np.int64)
    sizes = np.clip(there[None, :] - starts[:, None], 0, step)
    return bases[None, :] + starts[:, None].astype(np.uint64), sizes, np.minimum(length - starts, step)
