"""The save plan: which rank captures which chunk, and where in its slot.

Owns deduplication of replicas, chunking, balance and slot layout. Invariants: pure and deterministic, so that every
rank computes the same plan from the same pieces; every element of every tensor is captured by one rank (per-rank
tensors: by each rank that holds them); no two chunks of a slot overlap. Knows nothing of values: which per-rank
tensors are equal is decided after their checksums are known (plan/share.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core.box import Box, cut
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.errors import ConfigError
from ckptd.core.types import itemsize
from ckptd.plan import cover

Ints = npt.NDArray[np.int64]

ALIGNMENT_BYTES = 64
PAGE_BYTES = 4096
PAGE_ALIGNED_FROM_BYTES = 2**20
"""Chunks start at multiples of ALIGNMENT_BYTES, from this size on at multiples of PAGE_BYTES."""

PER_RANK = "per_rank"


class Piece(msgspec.Struct, array_like=True, frozen=True):
    """What one rank holds of one tensor: the box (`offsets`, `sizes`) of `key`, whose global shape is `shape`.

    `share`: "replicated" and "sharded" pieces with one box are copies of each other; "per_rank" ones never are.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    share: str


class _Chunk(NamedTuple):
    """One chunk to place: its tensor, its box, its bytes and the rank whose own value it is (or ALL_RANKS)."""

    key: str
    box: Box
    raw: int
    rank: int


def plan_save(pieces: Sequence[Sequence[Piece]]) -> list[Catalog]:
    """The chunks that each rank captures, one catalog per rank, from the pieces that each rank holds.

    Columns: `writer` is the capturing rank, `file` 0, `file_offset` the place in its slot; `rank` is the capturing
    rank for per-rank tensors and ALL_RANKS for the others; checksums are zero. Raises ConfigError that lists every
    tensor on which the ranks disagree or of which no rank holds some elements.
    """
    infos = _agreed(pieces)
    holders = _holders(pieces)
    _check_coverage(infos, holders)
    mine: list[list[_Chunk]] = [[] for _ in pieces]
    for rank, held in enumerate(pieces):
        for piece in held:
            if piece.share == PER_RANK:
                mine[rank] += _chunks(infos[piece.key], Box(piece.offsets, piece.sizes), rank)
    _balance(infos, holders, mine)
    return [_catalog(infos, chunks, rank) for rank, chunks in enumerate(mine)]


def place(raw: npt.ArrayLike) -> tuple[Ints, int]:
    """Aligned, disjoint offsets for chunks of `raw` bytes, and the bytes they take together.

    Page-aligned chunks come first, so that one running sum places each kind.
    """
    sizes = np.asarray(raw, np.int64)
    large = sizes >= PAGE_ALIGNED_FROM_BYTES
    padded = np.where(large, -(-sizes // PAGE_BYTES) * PAGE_BYTES, -(-sizes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    order = np.argsort(~large, kind="stable")
    ends = np.cumsum(padded[order])
    offsets = np.empty(len(sizes), np.int64)
    offsets[order] = ends - padded[order]
    return offsets, int(ends[-1]) if len(ends) else 0


def slot_bytes(catalog: Catalog) -> int:
    """Bytes of slot that the chunks of one rank's catalog take."""
    return int((catalog.file_offset + catalog.raw).max()) if len(catalog) else 0


def _agreed(pieces: Sequence[Sequence[Piece]]) -> dict[str, Piece]:
    """One piece per key that speaks for its dtype, shape and share; ConfigError where ranks contradict each other."""
    first: dict[str, tuple[int, Piece]] = {}
    problems: dict[str, str] = {}
    for rank, held in enumerate(pieces):
        for piece in held:
            origin, other = first.setdefault(piece.key, (rank, piece))
            if (piece.dtype, piece.shape, piece.share) != (other.dtype, other.shape, other.share):
                problems.setdefault(
                    piece.key, f"{piece.key}: {_spoken(other)} on rank {origin}, {_spoken(piece)} on rank {rank}"
                )
            if not Box(piece.offsets, piece.sizes).inside(piece.shape):
                problems.setdefault(
                    piece.key,
                    f"{piece.key}: rank {rank} holds offsets {list(piece.offsets)}, sizes {list(piece.sizes)}, "
                    f"which lies outside shape {list(piece.shape)}",
                )
    if problems:
        raise ConfigError("the ranks disagree on tensors of the state:\n" + _listed(problems.values()))
    return {key: piece for key, (_, piece) in first.items()}


def _spoken(piece: Piece) -> str:
    return f"{piece.share.replace('_', '-')} {piece.dtype} {list(piece.shape)}"


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _holders(pieces: Sequence[Sequence[Piece]]) -> dict[str, dict[Box, list[int]]]:
    """Ranks that hold each box of each shared tensor, ascending. Empty shards count only for empty tensors."""
    holders: dict[str, dict[Box, list[int]]] = {}
    for rank, held in enumerate(pieces):
        for piece in held:
            if piece.share == PER_RANK:
                continue
            box = Box(piece.offsets, piece.sizes)
            boxes = holders.setdefault(piece.key, {})
            if not box.elements:
                if 0 not in piece.shape:
                    continue
                box = Box.whole(piece.shape)
            ranks = boxes.setdefault(box, [])
            if not ranks or ranks[-1] != rank:
                ranks.append(rank)
    return holders


def _check_coverage(infos: dict[str, Piece], holders: dict[str, dict[Box, list[int]]]) -> None:
    """ConfigError that lists the tensors of which some elements are on no rank."""
    gaps = []
    for key, boxes in holders.items():
        shape = infos[key].shape
        if 0 in shape or Box.whole(shape) in boxes:
            continue
        width = len(shape)
        low = np.array([box.offsets for box in boxes], np.int64).reshape(-1, width)
        high = low + np.array([box.sizes for box in boxes], np.int64).reshape(-1, width)
        region = np.zeros(width, np.int64), np.array(shape, np.int64)
        if cover.tiles(*region, low, high):
            continue
        _, (left, end) = cover.disjoint(*region, low, high)
        if len(left):
            span = ", ".join(f"{lo}:{hi}" for lo, hi in zip(left[0], end[0], strict=True))
            gaps.append(f"{key} {list(shape)}: elements [{span}]")
    if gaps:
        raise ConfigError("no rank holds some elements of the state:\n" + _listed(gaps))


def _chunks(info: Piece, box: Box, rank: int) -> list[_Chunk]:
    size = itemsize(info.dtype)
    return [_Chunk(info.key, chunk, chunk.elements * size, rank) for chunk in cut(box, size)]


def _balance(infos: dict[str, Piece], holders: dict[str, dict[Box, list[int]]], mine: list[list[_Chunk]]) -> None:
    """Gives each chunk to one holder: those without a choice first, then largest first to the least loaded."""
    loads = np.array([sum(chunk.raw for chunk in chunks) for chunks in mine], np.int64)
    free: list[tuple[_Chunk, Ints]] = []
    for key, boxes in holders.items():
        for box, ranks in boxes.items():
            chunks = _chunks(infos[key], box, ALL_RANKS)
            if len(ranks) == 1:
                mine[ranks[0]] += chunks
                loads[ranks[0]] += sum(chunk.raw for chunk in chunks)
            else:
                candidates = np.array(ranks, np.int64)
                free += [(chunk, candidates) for chunk in chunks]
    free.sort(key=lambda item: (-item[0].raw, item[0].key, item[0].box))
    for chunk, candidates in free:
        rank = int(candidates[np.argmin(loads[candidates])])
        mine[rank].append(chunk)
        loads[rank] += chunk.raw


def _catalog(infos: dict[str, Piece], chunks: list[_Chunk], rank: int) -> Catalog:
    """The catalog of one rank's chunks, each tensor's in row-major order, with their places in the slot."""
    chunks.sort(key=lambda chunk: (chunk.key, chunk.box))
    index: dict[str, int] = {}
    for chunk in chunks:
        index.setdefault(chunk.key, len(index))
    width = max((len(infos[key].shape) for key in index), default=0)
    offsets = np.zeros((len(chunks), width), np.int64)
    sizes = np.ones((len(chunks), width), np.int64)
    for row, chunk in enumerate(chunks):
        offsets[row, : len(chunk.box.offsets)] = chunk.box.offsets
        sizes[row, : len(chunk.box.sizes)] = chunk.box.sizes
    places, _ = place([chunk.raw for chunk in chunks])
    return Catalog.build(
        [(key, infos[key].dtype, infos[key].shape) for key in index],
        [index[chunk.key] for chunk in chunks],
        offsets,
        sizes,
        rank=[chunk.rank for chunk in chunks],
        writer=np.full(len(chunks), rank),
        file_offset=places,
    )
