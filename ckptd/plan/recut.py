"""Recutting: from chunks as they are to chunks as a layout wants them, in parts that one writer each can write.

Owns three questions. Which chunks the target has: every shard of the layout, cut by the chunk rule; values of single
ranks and per-rank objects keep theirs. Which part a chunk is in: parts hold whole stages' tensors in order of their
keys, at most PART_BYTES, PART_CHUNKS and about PART_PIECES each, so that a killed run loses little and planning one
part takes little memory. And where the bytes of each chunk come from: `Assembly`, batches of target chunks that are put
together at a time, so that a source chunk is decoded once per batch that needs it and not once per target chunk.

Parts depend on the source and the layout alone, never on memory: another run finds the same ones. Pure.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.core.box import CHUNK_BYTES, Box, cut
from ckptd.core.catalog import ALL_RANKS, Catalog, TensorInfo
from ckptd.core.errors import FormatError
from ckptd.core.types import itemsize
from ckptd.plan.layout import Mesh, Placed, shards
from ckptd.plan.load import Want, plan_partially

Ints = npt.NDArray[np.int64]

PART_BYTES = 4 * 1024**3
PART_CHUNKS = 16_384
PART_PIECES = 32_768


class Unit(NamedTuple):
    """Chunks that belong together: of one tensor and its ties (`infos`, by key), of the values of one rank or of all.

    Its boxes follow from `placed`, or are those of the source rows `rows` (one of both is None)."""

    infos: tuple[TensorInfo, ...]
    rank: int
    stage: tuple[int, ...]
    placed: Placed | None
    rows: Ints | None


class Span(NamedTuple):
    """Chunks `start` to `stop` of one unit."""

    unit: int
    start: int
    stop: int


class PartPlan(NamedTuple):
    """What one writer writes: spans of units; distinct chunks and their bytes, rows (ties have one each)."""

    writer: int
    stage: tuple[int, ...]
    spans: tuple[Span, ...]
    chunks: int
    rows: int
    raw: int


def units_of(catalog: Catalog, placed: Sequence[Placed], mesh: Mesh) -> list[Unit]:
    """Everything the target has, in the order of its parts: by stage, then key; what is carried over comes last."""
    carried = _carried(catalog)
    made = [
        Unit(
            tuple(placed[i].info for i in group),
            ALL_RANKS,
            min(placed[i].first_stage for i in group),
            placed[group[0]],
            None,
        )
        for group in _groups(catalog, placed)
    ]
    made.sort(key=lambda unit: (unit.stage, unit.infos[0].key))
    last = tuple(mesh.sizes)  # behind every stage
    made += [
        Unit((catalog.tensors[tensor],), rank, last, None, rows) for (tensor, rank), rows in sorted(carried.items())
    ]
    return made


def placeable(catalog: Catalog) -> list[TensorInfo]:
    """The tensors that a layout places: those with values that serve every rank. Per-rank objects are not among them:
    they are named by a rank, and keep their chunks."""
    shared = np.zeros(len(catalog.tensors), bool)
    shared[catalog.tensor[catalog.rank == ALL_RANKS]] = True
    return [info for info, there in zip(catalog.tensors, shared, strict=True) if there and not _is_object(info.key)]


def boxes_of(unit: Unit, catalog: Catalog, mesh: Mesh) -> tuple[Ints, Ints]:
    """(offsets [n, D], sizes [n, D]) of the unit's chunks, D its tensor's dimensions, in row-major order."""
    dimensions = len(unit.infos[0].shape)
    if unit.placed is None:
        return catalog.offsets[unit.rows, :dimensions], catalog.sizes[unit.rows, :dimensions]
    offsets, sizes = shards(unit.placed, mesh)
    width = itemsize(unit.infos[0].dtype)
    # A product in floating point cannot wrap around.
    large = np.prod(sizes, axis=1, dtype=np.float64) * width > CHUNK_BYTES
    if not large.any():
        return offsets, sizes
    pieces = [
        box
        for low, size in zip(offsets[large].tolist(), sizes[large].tolist(), strict=True)
        for box in cut(Box(tuple(low), tuple(size)), width, CHUNK_BYTES)
    ]
    offsets = np.concatenate([offsets[~large], np.array([box.offsets for box in pieces], np.int64)])
    sizes = np.concatenate([sizes[~large], np.array([box.sizes for box in pieces], np.int64)])
    order = np.lexsort(offsets.T[::-1])
    return offsets[order], sizes[order]


def parts_of(units: Sequence[Unit], catalog: Catalog, mesh: Mesh) -> Iterator[PartPlan]:
    """The parts, by rising writer. A unit may go on in the next part."""
    part = _Growing(0)
    for number, unit in enumerate(units):
        if part.spans and unit.stage != part.stage:
            yield part.plan()
            part = _Growing(part.writer + 1)
        part.stage = unit.stage
        offsets, sizes = boxes_of(unit, catalog, mesh)
        sums = np.concatenate([[0], np.cumsum(np.prod(sizes, axis=1, dtype=np.int64) * itemsize(unit.infos[0].dtype))])
        pieces = _expected_pieces(unit, offsets, catalog) / len(offsets)
        start = 0
        while start < len(sizes):
            stop = part.room(start, sums, len(unit.infos), pieces)
            if stop <= start and part.spans:
                yield part.plan()
                part = _Growing(part.writer + 1)
                part.stage = unit.stage
                continue
            stop = max(stop, start + 1)
            part.add(Span(number, start, stop), len(unit.infos), int(sums[stop] - sums[start]), pieces)
            start = stop
    if part.spans:
        yield part.plan()


class _Growing:
    """A part while chunks are added to it."""

    def __init__(self, writer: int) -> None:
        self.writer = writer
        self.stage: tuple[int, ...] = ()
        self.spans: list[Span] = []
        self._chunks = self._rows = self._raw = 0
        self._pieces = 0.0

    def room(self, start: int, sums: Ints, ties: int, pieces: float) -> int:
        """Up to which chunk of a unit fits, from `start` on; `sums` are the bytes before each chunk."""
        fits = int(np.searchsorted(sums, sums[start] + PART_BYTES - self._raw, side="right")) - 1
        return min(
            fits,
            start + max((PART_CHUNKS - self._rows) // ties, 0),
            start + max(int((PART_PIECES - self._pieces) / pieces), 0),
            len(sums) - 1,
        )

    def add(self, span: Span, ties: int, raw: int, pieces: float) -> None:
        count = span.stop - span.start
        self.spans.append(span)
        self._chunks += count
        self._rows += count * ties
        self._raw += raw
        self._pieces += count * pieces

    def plan(self) -> PartPlan:
        return PartPlan(self.writer, self.stage, tuple(self.spans), self._chunks, self._rows, self._raw)


def _expected_pieces(unit: Unit, offsets: Ints, catalog: Catalog) -> int:
    """About how many boxes source and target chunks of a unit have in common: the cells that all their bounds make."""
    if unit.rows is not None:
        return len(unit.rows)
    source = catalog.rows(unit.infos[0].key)
    starts = catalog.offsets[source.start : source.stop]
    cells = 1
    for dimension in range(offsets.shape[1]):
        cells *= len(np.unique(np.concatenate([starts[:, dimension], offsets[:, dimension]])))
    return max(min(cells, len(source) * len(offsets)), len(source), len(offsets))


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """Parts of source chunks that are copied into a batch, ordered by batch, then by the place of the source chunk.

    Piece i is a box of `sizes[i]` elements of `itemsize[i]` bytes: from byte `source[i]` of source row `row[i]`
    decoded, with strides `source_strides[i]`, to byte `target[i]` of batch `batch[i]`, with `target_strides[i]`.
    `direct`: it is all of its source chunk, in one run of the target, and needs no copy.
    """

    batch: Ints
    row: Ints
    source: Ints
    target: Ints
    sizes: Ints
    source_strides: Ints
    target_strides: Ints
    itemsize: Ints
    direct: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Assembly:
    """One part: the target's rows, and how the chunk of each is put together.

    `catalog.file_offset` of a row is its chunk's number in the arrays below; ties have one chunk. `straight[c]`: the
    source row that is chunk c as it stands, or -1; otherwise it lies at `position[c]` of batch `batch[c]` (-1 for
    chunks that are straight or empty). `loads`: how many chunks of each batch are to be fetched from it.
    """

    catalog: Catalog
    straight: Ints
    batch: Ints
    position: Ints
    loads: Ints
    pieces: Pieces

    def decodes(self) -> Ints:
        """The source rows that are decoded, as often as they are."""
        pairs = np.unique(np.stack([self.pieces.batch, self.pieces.row], axis=1), axis=0)
        return np.concatenate([self.straight[self.straight >= 0], pairs[:, 1]])


def assembly_of(
    part: PartPlan, units: Sequence[Unit], catalog: Catalog, mesh: Mesh, batch_bytes: int, what: str
) -> Assembly:
    """How a part is put together in batches of at most `batch_bytes`. FormatError where the source, called `what` in
    messages, lacks elements of a tensor."""
    boxes = {number: boxes_of(units[number], catalog, mesh) for number in {span.unit for span in part.spans}}
    target = _target_catalog(part, units, boxes)
    straight = np.full(part.chunks, -1, np.int64)
    wants: list[Want] = []
    chunk_of_want: list[int] = []
    chunk = 0
    for number, start, stop in part.spans:
        unit = units[number]
        count = stop - start
        if unit.rows is not None:
            straight[chunk : chunk + count] = unit.rows[start:stop]
        else:
            info = unit.infos[0]
            pairs = zip(*(column[start:stop].tolist() for column in boxes[number]), strict=True)
            wants += [Want(info.key, info.dtype, info.shape, Box(tuple(low), tuple(size))) for low, size in pairs]
            chunk_of_want += range(chunk, chunk + count)
        chunk += count
    leaders = _leaders(target, part.chunks)
    raw = target.raw[leaders]
    straight[raw == 0] = -1
    cuts = _cuts(catalog, wants, np.array(chunk_of_want, np.int64), what)
    straight = _straighten(straight, cuts, catalog, target, leaders)
    batch, position, loads = _batches(raw, straight, batch_bytes)
    return Assembly(target, straight, batch, position, loads, _pieces(cuts, catalog, target, leaders, batch, position))


class _Cuts(NamedTuple):
    """Boxes (global coordinates) of source rows that go into chunks of the target."""

    chunk: Ints
    row: Ints
    offsets: Ints
    sizes: Ints


def _cuts(catalog: Catalog, wants: Sequence[Want], chunk_of_want: Ints, what: str) -> _Cuts:
    """The load plan of all wants."""
    plan, problems = plan_partially(catalog, wants, rank=ALL_RANKS)
    if problems:
        raise FormatError(f"{what}: not a whole checkpoint: {'; '.join(problems[:5])}")
    return _Cuts(chunk_of_want[plan.want], plan.row, plan.offsets, plan.sizes)


def _target_catalog(part: PartPlan, units: Sequence[Unit], boxes: dict[int, tuple[Ints, Ints]]) -> Catalog:
    """The rows of a part, numbered by chunk; checksums are not known yet."""
    infos: dict[TensorInfo, int] = {}
    width = max(len(units[span.unit].infos[0].shape) for span in part.spans)
    tensor: list[Ints] = []
    chunk: list[Ints] = []
    rank: list[Ints] = []
    offsets: list[Ints] = []
    sizes: list[Ints] = []
    first = 0
    for number, start, stop in part.spans:
        unit = units[number]
        low, size = (column[start:stop] for column in boxes[number])
        for info in unit.infos:
            tensor.append(np.full(stop - start, infos.setdefault(info, len(infos))))
            chunk.append(np.arange(first, first + stop - start))
            rank.append(np.full(stop - start, unit.rank))
            offsets.append(_widened(low, width, 0))
            sizes.append(_widened(size, width, 1))
        first += stop - start
    return Catalog.build(
        infos,
        np.concatenate(tensor),
        np.concatenate(offsets),
        np.concatenate(sizes),
        rank=np.concatenate(rank),
        writer=np.full(part.rows, part.writer),
        file_offset=np.concatenate(chunk),
    )


def _leaders(target: Catalog, chunks: int) -> Ints:
    """The first row of every chunk."""
    leaders = np.full(chunks, len(target), np.int64)
    np.minimum.at(leaders, target.file_offset, np.arange(len(target)))
    return leaders


def _straighten(straight: Ints, cuts: _Cuts, catalog: Catalog, target: Catalog, leaders: Ints) -> Ints:
    """`straight` with the chunks that are one whole source chunk."""
    made = straight.copy()
    counts = np.bincount(cuts.chunk, minlength=len(straight))
    width = min(catalog.sizes.shape[1], cuts.sizes.shape[1], target.sizes.shape[1])
    whole = (cuts.sizes[:, :width] == catalog.sizes[cuts.row, :width]).all(axis=1)
    whole &= (cuts.sizes[:, :width] == target.sizes[leaders[cuts.chunk], :width]).all(axis=1)
    whole &= counts[cuts.chunk] == 1
    made[cuts.chunk[whole]] = cuts.row[whole]
    return made


def _batches(raw: Ints, straight: Ints, batch_bytes: int) -> tuple[Ints, Ints, Ints]:
    """(batch, position in it, chunks per batch): runs of chunks that fit `batch_bytes`, each at a multiple of 64."""
    batch = np.full(len(raw), -1, np.int64)
    position = np.zeros(len(raw), np.int64)
    loads: list[int] = []
    end = batch_bytes
    for chunk in np.flatnonzero((straight < 0) & (raw > 0)).tolist():
        size = int(raw[chunk])
        if end + size > batch_bytes:
            loads.append(0)
            end = 0
        batch[chunk], position[chunk] = len(loads) - 1, end
        loads[-1] += 1
        end += -(-size // 64) * 64
    return batch, position, np.array(loads, np.int64)


def _pieces(cuts: _Cuts, catalog: Catalog, target: Catalog, leaders: Ints, batch: Ints, position: Ints) -> Pieces:
    """Every copy that the batches need."""
    used = batch[cuts.chunk] >= 0
    chunk, row, offsets, sizes = cuts.chunk[used], cuts.row[used], cuts.offsets[used], cuts.sizes[used]
    place = (catalog.file_offset[row], catalog.file[row], catalog.writer[row], batch[chunk])
    order = np.lexsort((row, *place))
    chunk, row, offsets, sizes = chunk[order], row[order], offsets[order], sizes[order]
    leader = leaders[chunk]
    width = sizes.shape[1]
    items = np.array([itemsize(info.dtype) for info in target.tensors], np.int64)
    item = items[target.tensor[leader]] if len(leader) else np.zeros(0, np.int64)
    source_sizes, target_sizes = _columns(catalog.sizes, row, width, 1), _columns(target.sizes, leader, width, 1)
    source_strides, target_strides = _strides(source_sizes, item), _strides(target_sizes, item)
    inside_source = offsets - _columns(catalog.offsets, row, width, 0)
    inside_target = offsets - _columns(target.offsets, leader, width, 0)
    pairs = np.stack([batch[chunk], row], axis=1)
    first = (np.diff(pairs, axis=0, prepend=-1) != 0).any(axis=1)
    alone = first & np.append(first[1:], True)[: len(first)]
    run = ((sizes == 1) | (source_strides == target_strides)).all(axis=1)
    return Pieces(
        batch[chunk],
        row,
        (inside_source * source_strides).sum(axis=1),
        (inside_target * target_strides).sum(axis=1) + position[chunk],
        np.ascontiguousarray(sizes),
        source_strides,
        target_strides,
        item,
        alone & run & (sizes == source_sizes).all(axis=1),
    )


def _columns(boxes: Ints, rows: Ints, width: int, fill: int) -> Ints:
    """The boxes of some rows, cut or padded to `width` dimensions."""
    return _widened(boxes[rows, :width], width, fill)


def _widened(boxes: Ints, width: int, fill: int) -> Ints:
    """Boxes padded to `width` dimensions."""
    return np.pad(boxes, ((0, 0), (0, width - boxes.shape[1])), constant_values=fill)


def _strides(sizes: Ints, item: Ints) -> Ints:
    """Row-major strides in bytes of packed boxes."""
    strides = np.empty_like(sizes)
    step = item.copy()
    for dimension in range(sizes.shape[1] - 1, -1, -1):
        strides[:, dimension] = step
        step = step * np.maximum(sizes[:, dimension], 1)
    return strides


def _is_object(key: str) -> bool:
    return key.startswith("objects/")


def _carried(catalog: Catalog) -> dict[tuple[int, int], Ints]:
    """(tensor, rank) -> source rows, in order, of what keeps its chunks: values of single ranks, per-rank objects."""
    named = np.array([_is_object(info.key) for info in catalog.tensors], bool)
    rows = np.flatnonzero((catalog.rank != ALL_RANKS) | (named[catalog.tensor] if len(named) else False))
    rows = rows[np.lexsort((rows, catalog.rank[rows], catalog.tensor[rows]))].astype(np.int64)
    pairs = np.stack([catalog.tensor[rows].astype(np.int64), catalog.rank[rows].astype(np.int64)], axis=1)
    starts = np.flatnonzero((np.diff(pairs, axis=0, prepend=-2) != 0).any(axis=1)).tolist()
    return {
        (int(pairs[start, 0]), int(pairs[start, 1])): rows[start:stop]
        for start, stop in itertools.pairwise([*starts, len(rows)])
    }


def _groups(catalog: Catalog, placed: Sequence[Placed]) -> Iterator[tuple[int, ...]]:
    """Indices into `placed`, by key, of tensors that share all their bytes and their layout: ties, or single ones."""
    by_place: dict[object, list[int]] = {}
    for index, one in enumerate(placed):
        rows = np.asarray(catalog.rows(one.info.key))
        rows = rows[catalog.rank[rows] == ALL_RANKS]
        columns = (catalog.writer, catalog.file, catalog.file_offset, catalog.stored, catalog.codec)
        identity: object = (one.info.dtype, one.info.shape, one.splits, *(int(column[rows[0]]) for column in columns))
        if not catalog.raw[rows].any():
            identity = index  # nothing is stored, so nothing is shared
        by_place.setdefault(identity, []).append(index)
    for group in by_place.values():
        while group:
            same = [index for index in group if _same_rows(catalog, placed[group[0]].info, placed[index].info)]
            yield tuple(same)
            group = [index for index in group if index not in same]


def _same_rows(catalog: Catalog, first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors have the same boxes at the same places."""
    if first.key == second.key:
        return True
    chosen = []
    for info in (first, second):
        rows = np.asarray(catalog.rows(info.key))
        rows = rows[catalog.rank[rows] == ALL_RANKS]
        columns = (catalog.writer, catalog.file, catalog.file_offset, catalog.crc)
        numbers = np.stack([column[rows].astype(np.int64) for column in columns], axis=1)
        table = np.concatenate([numbers, catalog.offsets[rows], catalog.sizes[rows]], axis=1)
        chosen.append(table[np.lexsort(table.T[::-1])])
    return bool(np.array_equal(chosen[0], chosen[1]))
