"""The save plan: which rank captures which chunk, and where in its slot.

Owns deduplication of replicas, chunking, balance and slot layout. Invariants: pure and deterministic, so that every
rank computes the same plan from the same pieces; every element of every tensor is captured by one rank (per-rank
tensors: by each rank that holds them); no two chunks of a slot overlap. Knows nothing of values: which per-rank
tensors are equal is decided after their checksums are known (plan/share.py).
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.core.box import cut_boxes, padded
from ckptd.core.catalog import ALL_RANKS, Catalog, TensorInfo
from ckptd.core.errors import ConfigError
from ckptd.core.types import itemsize
from ckptd.plan import cover, whole

Ints = npt.NDArray[np.int64]

ALIGNMENT_BYTES = 64
PAGE_BYTES = 4096
PAGE_ALIGNED_FROM_BYTES = 2**20
"""Chunks start at multiples of ALIGNMENT_BYTES, from this size on at multiples of PAGE_BYTES."""

PER_RANK = "per_rank"

_KEY_LIMIT = 2**62

_FEW_HOLDERS = 32
"""Up to so many holders Python finds the least loaded one faster than NumPy."""


class Piece(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one rank holds of one tensor: the box (`offsets`, `sizes`) of `key`, whose global shape is `shape`.

    `share`: "replicated" and "sharded" pieces with one box are copies of each other; "per_rank" ones never are.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    share: str


def plan_key(pieces: Sequence[Sequence[Piece]]) -> str:
    """A digest of all that `plan_save` goes by: keys, dtypes, shapes, shares and boxes of each rank, and how many ranks
    there are. Equal for equal questions only; so a plan may be kept under it."""
    digest = hashlib.sha256(msgspec.msgpack.encode(len(pieces)))
    for held in pieces:
        digest.update(msgspec.msgpack.encode(held))
    return digest.hexdigest()


def plan_save(pieces: Sequence[Sequence[Piece]]) -> list[Catalog]:
    """The chunks that each rank captures, one catalog per rank, from the pieces that each rank holds.

    Columns: `writer` is the capturing rank, `file` 0, `file_offset` the place in its slot; `rank` is the capturing
    rank for per-rank tensors and ALL_RANKS for the others; checksums are zero. Raises ConfigError that lists every
    tensor on which the ranks disagree or of which no rank holds some elements.
    """
    held = _Held.of(pieces)
    _check_agreement(held, pieces)
    shared = _shared_boxes(held)
    _check_coverage(held, shared)
    chunks = _own_chunks(held)
    free = _shared_chunks(held, shared)
    chunks = chunks.with_rank(free, _balanced(held, shared, free, chunks.loads(len(pieces))))
    return _catalogs(held, chunks, len(pieces))


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


class _Held(NamedTuple):
    """All pieces of all ranks as columns, ordered by rank; boxes are padded to one width with offset 0 and size 1.
    Tensors are numbered in the order of their keys; `infos` and `shared` describe each as its first piece does, and
    `agrees` tells which pieces do so too."""

    infos: list[TensorInfo]
    shared: npt.NDArray[np.bool_]
    items: Ints  # of each tensor the bytes of an element
    dimensions: Ints  # of each tensor
    shapes: Ints  # of each tensor, padded with 1
    rank: Ints
    tensor: Ints
    low: Ints
    sizes: Ints
    agrees: npt.NDArray[np.bool_]
    inside: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, pieces: Sequence[Sequence[Piece]]) -> _Held:
        every = list(itertools.chain.from_iterable(pieces))
        count = len(every)
        # Millions of pieces: what runs over each of them runs in C, and keeps no object of it.
        kinds: defaultdict[tuple[str, str, tuple[int, ...], str], int] = defaultdict(itertools.count().__next__)
        described = map(operator.attrgetter("key", "dtype", "shape", "share"), every)
        kind = np.fromiter(map(kinds.__getitem__, described), np.int64, count)
        names = list(kinds)
        first: dict[str, int] = {}
        for number, (key, *_) in enumerate(names):
            first.setdefault(key, number)
        order = {key: tensor for tensor, key in enumerate(sorted(first))}
        chosen = [names[first[key]] for key in order]
        width = max((len(shape) for _, _, shape, _ in names), default=0)
        tensor_of_kind = np.array([order[key] for key, *_ in names], np.int64)
        first_of_kind = np.array([first[key] for key, *_ in names], np.int64)
        shape_of_kind = padded([shape for _, _, shape, _ in names], width, 1)
        dimensions_of_kind = np.array([len(shape) for _, _, shape, _ in names], np.int64)
        offsets, sizes = [piece.offsets for piece in every], [piece.sizes for piece in every]
        lengths = dimensions_of_kind[kind]
        fits = np.ones(count, bool)
        for column in (offsets, sizes):
            fits &= np.fromiter(map(len, column), np.int64, count) == lengths
        if not fits.all():
            lengths[~fits] = 0
            offsets, sizes = (
                [c if f else () for c, f in zip(column, fits, strict=True)] for column in (offsets, sizes)
            )
        low, extent = padded(offsets, width, 0, lengths), padded(sizes, width, 1, lengths)
        inside = fits & ((low >= 0) & (extent >= 0) & (low <= shape_of_kind[kind] - extent)).all(axis=1)
        return cls(
            infos=[TensorInfo(key, dtype, shape) for key, dtype, shape, _ in chosen],
            shared=np.array([share != PER_RANK for *_, share in chosen], bool),
            items=np.array([itemsize(dtype) for _, dtype, _, _ in chosen], np.int64),
            dimensions=np.array([len(shape) for _, _, shape, _ in chosen], np.int64),
            shapes=padded([shape for _, _, shape, _ in chosen], width, 1),
            rank=np.repeat(np.arange(len(pieces)), [len(held) for held in pieces]),
            tensor=tensor_of_kind[kind],
            low=low,
            sizes=extent,
            agrees=first_of_kind[kind] == kind,
            inside=np.asarray(inside),
        )


def _check_agreement(held: _Held, pieces: Sequence[Sequence[Piece]]) -> None:
    """ConfigError where ranks contradict each other, or a piece is no part of its tensor."""
    wrong = np.flatnonzero(~(held.agrees & held.inside)).tolist()
    if not wrong:
        return
    every = list(itertools.chain.from_iterable(pieces))
    problems: dict[str, str] = {}
    for index in wrong:
        piece, rank = every[index], int(held.rank[index])
        if not held.agrees[index]:
            origin = int(np.argmax(held.tensor == held.tensor[index]))
            said = f"{_spoken(every[origin])} on rank {held.rank[origin]}, {_spoken(piece)} on rank {rank}"
        else:
            said = (
                f"rank {rank} holds offsets {list(piece.offsets)}, sizes {list(piece.sizes)}, "
                f"which lies outside shape {list(piece.shape)}"
            )
        problems.setdefault(piece.key, f"{piece.key}: {said}")
    raise ConfigError("the ranks disagree on tensors of the state:\n" + _listed(problems.values()))


def _spoken(piece: Piece) -> str:
    return f"{piece.share.replace('_', '-')} {piece.dtype} {list(piece.shape)}"


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


class _Shared(NamedTuple):
    """The distinct boxes of shared tensors, by tensor and box, and the ranks that hold each: those of box b are
    `holder[first[b]]` to `holder[first[b + 1]]`, ascending."""

    tensor: Ints
    low: Ints
    sizes: Ints
    first: Ints
    holder: Ints


def _shared_boxes(held: _Held) -> _Shared:
    """Copies of shards are one box. Empty shards count only for empty tensors, as the whole of them."""
    empty = (held.shapes == 0).any(axis=1)[held.tensor]
    chosen = np.flatnonzero(held.shared[held.tensor] & (empty | (held.sizes > 0).all(axis=1)))
    tensor, low, sizes, empty = (column[chosen] for column in (held.tensor, held.low, held.sizes, empty))
    if empty.any():
        low[empty], sizes[empty] = 0, held.shapes[tensor[empty]]
    order = _by([tensor, *low.T, *sizes.T])
    tensor, low, sizes, rank = (column[order] for column in (tensor, low, sizes, held.rank[chosen]))
    alike = np.ones(len(order), bool)
    alike[:1] = False
    for column in (tensor, *low.T, *sizes.T):
        alike[1:] &= column[1:] == column[:-1]
    again = np.flatnonzero(alike & (np.diff(rank, prepend=-1) == 0))  # twice on one rank
    if len(again):
        tensor, low, sizes, rank, alike = (np.delete(c, again, axis=0) for c in (tensor, low, sizes, rank, alike))
    box = np.flatnonzero(~alike)
    return _Shared(tensor[box], low[box], sizes[box], np.append(box, len(rank)), rank)


def _by(columns: Sequence[Ints]) -> Ints:
    """The stable order of rows by columns, the first one first. Columns that do not vary cost nothing, the others one
    sort of numbers made of them all, unless these would be too large."""
    if not len(columns[0]):
        return np.zeros(0, np.int64)
    key = np.zeros(len(columns[0]), np.int64)
    bound = 1
    for column in columns:
        least, most = int(column.min()), int(column.max())
        bound *= most - least + 1
        if bound > _KEY_LIMIT:
            return np.lexsort(columns[::-1])
        if most > least:
            key *= most - least + 1
            key += column - least
    return np.argsort(key, kind="stable")


def _check_coverage(held: _Held, shared: _Shared) -> None:
    """ConfigError that lists the tensors of which some elements are on no rank."""
    asked = np.flatnonzero(held.shared)
    asked = asked[(held.shapes[asked] != 0).all(axis=1)]
    first = np.concatenate([np.zeros(1, np.int64), np.searchsorted(shared.tensor, np.arange(len(held.infos)), "right")])
    shape = held.shapes[asked]
    boxes, begin = cover.runs(first, asked)
    low, high = shared.low[boxes], shared.low[boxes] + shared.sizes[boxes]
    tiled = cover.tiled(cover.Regions(np.zeros_like(shape), shape, begin, low, high))
    gaps = []
    for number in np.flatnonzero(~tiled).tolist():
        span = slice(int(begin[number]), int(begin[number + 1]))
        gap = whole.gap(np.zeros_like(shape[number]), shape[number], low[span], high[span])
        if gap is not None:
            info = held.infos[asked[number]]
            gaps.append(f"{info.key} {list(info.shape)}: elements {whole.spoken(gap, len(info.shape))}")
    if gaps:
        raise ConfigError("no rank holds some elements of the state:\n" + _listed(gaps))


class _Chunks(NamedTuple):
    """Chunks: of which tensor, which box, how many bytes; who captures them; and the piece or shared box they are of.
    `owned`: the value is its rank's own."""

    tensor: Ints
    low: Ints
    sizes: Ints
    raw: Ints
    rank: Ints
    origin: Ints
    owned: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, held: _Held, tensor: Ints, low: Ints, sizes: Ints, rank: Ints, *, owned: bool) -> _Chunks:
        """Boxes, cut by the chunk rule."""
        origin, offsets, extent = cut_boxes(low, sizes, held.items[tensor])
        number = tensor[origin]
        raw = np.prod(extent, axis=1, dtype=np.int64) * held.items[number]
        return cls(number, offsets, extent, raw, rank[origin], origin, np.full(len(raw), owned))

    def loads(self, ranks: int) -> Ints:
        """Bytes that each rank captures."""
        sums = np.zeros(ranks, np.int64)
        np.add.at(sums, self.rank, self.raw)
        return sums

    def take(self, chosen: Ints | slice) -> _Chunks:
        return _Chunks(
            self.tensor[chosen],
            self.low[chosen],
            self.sizes[chosen],
            self.raw[chosen],
            self.rank[chosen],
            self.origin[chosen],
            self.owned[chosen],
        )

    def with_rank(self, others: _Chunks, rank: Ints) -> _Chunks:
        """These and others, which get their ranks."""
        pairs = zip(self, others._replace(rank=rank), strict=True)
        return _Chunks(*(np.concatenate(columns) for columns in pairs))


def _own_chunks(held: _Held) -> _Chunks:
    """The chunks of per-rank tensors, captured by each rank that holds them."""
    own = np.flatnonzero(~held.shared[held.tensor])
    return _Chunks.of(held, held.tensor[own], held.low[own], held.sizes[own], held.rank[own], owned=True)


def _shared_chunks(held: _Held, shared: _Shared) -> _Chunks:
    """The chunks of shared tensors, captured by one holder each: the first, until `_balanced` says otherwise."""
    return _Chunks.of(held, shared.tensor, shared.low, shared.sizes, shared.holder[shared.first[:-1]], owned=False)


def _balanced(held: _Held, shared: _Shared, chunks: _Chunks, loads: Ints) -> Ints:
    """One holder for each chunk: those without a choice first, then largest first to the least loaded."""
    rank = chunks.rank.copy()
    choice = np.diff(shared.first)[chunks.origin] > 1
    np.add.at(loads, rank[~choice], chunks.raw[~choice])
    free = np.flatnonzero(choice)
    columns = (-chunks.raw, chunks.tensor, *chunks.low.T, *chunks.sizes.T)
    free = free[_by([column[free] for column in columns])]
    holders: dict[int, tuple[Ints, list[int] | None]] = {}
    heights = loads.tolist()
    for chunk, origin, raw in zip(free.tolist(), chunks.origin[free].tolist(), chunks.raw[free].tolist(), strict=True):
        if origin not in holders:
            ranks = shared.holder[shared.first[origin] : shared.first[origin + 1]]
            holders[origin] = ranks, ranks.tolist() if len(ranks) <= _FEW_HOLDERS else None
        candidates, few = holders[origin]
        chosen = min(few, key=heights.__getitem__) if few else int(candidates[np.argmin(loads[candidates])])
        rank[chunk] = chosen
        heights[chosen] += raw
        loads[chosen] += raw
    return rank


def _catalogs(held: _Held, chunks: _Chunks, ranks: int) -> list[Catalog]:
    """Each rank's chunks, every tensor's in row-major order, with their places in the slot."""
    order = _by([chunks.rank, chunks.tensor, *chunks.low.T, *chunks.sizes.T])
    chunks = chunks.take(order)
    first = np.searchsorted(chunks.rank, np.arange(ranks + 1)).tolist()
    return [
        _catalog(held, chunks.take(slice(start, stop)), rank)
        for rank, (start, stop) in enumerate(itertools.pairwise(first))
    ]


def _catalog(held: _Held, chunks: _Chunks, rank: int) -> Catalog:
    """The catalog of one rank's sorted chunks. It is not built from scratch: the invariants hold already, and checking
    them tensor by tensor on each of many ranks would take longer than all else."""
    count = len(chunks.tensor)
    begins = np.diff(chunks.tensor, prepend=-1) != 0
    tensors = chunks.tensor[begins]
    width = int(held.dimensions[tensors].max(initial=0))
    places, _ = place(chunks.raw)
    return Catalog(
        tensors=[held.infos[number] for number in tensors.tolist()],
        tensor=(np.cumsum(begins) - 1).astype(np.int32),
        offsets=np.ascontiguousarray(chunks.low[:, :width]),
        sizes=np.ascontiguousarray(chunks.sizes[:, :width]),
        rank=np.where(chunks.owned, rank, ALL_RANKS).astype(np.int32),
        raw=chunks.raw.copy(),
        crc=np.zeros(count, np.uint32),
        writer=np.full(count, rank, np.int32),
        file=np.zeros(count, np.int32),
        file_offset=places,
        stored=chunks.raw.copy(),
        codec=np.zeros(count, np.uint8),
    )
