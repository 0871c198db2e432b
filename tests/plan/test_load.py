"""The load plan, checked by carrying it out on real arrays: any layout that was saved fills any layout wanted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.box import Box, cut
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.errors import FormatError, MismatchError
from ckptd.plan import cover, load, meet
from ckptd.plan.load import LoadPlan, Want, plan_boxes, plan_load, plan_partially


def catalog_of(*entries: tuple[str, str, tuple[int, ...], Box, int]) -> Catalog:
    """A catalog with one row per (key, dtype, shape, box, rank)."""
    tensors = list(dict.fromkeys((key, dtype, shape) for key, dtype, shape, _, _ in entries))
    width = max((len(shape) for _, _, shape in tensors), default=0)
    pad = [width - len(shape) for _, _, shape, _, _ in entries]
    return Catalog.build(
        tensors,
        [tensors.index(entry[:3]) for entry in entries],
        np.array([(*e[3].offsets, *(0,) * p) for e, p in zip(entries, pad, strict=True)], np.int64),
        np.array([(*e[3].sizes, *(1,) * p) for e, p in zip(entries, pad, strict=True)], np.int64),
        rank=[entry[4] for entry in entries],
    )


def slices(offsets: np.ndarray, sizes: np.ndarray, dimensions: int) -> tuple[slice, ...]:
    return tuple(slice(int(o), int(o + s)) for o, s in zip(offsets[:dimensions], sizes[:dimensions], strict=True))


def reads_of(plan: LoadPlan, catalog: Catalog, want: int, shape: tuple[int, ...]) -> np.ndarray:
    """How often the plan writes each element of a want, on the global grid; checks parts against their chunks."""
    grid = np.zeros(shape, int)
    for index in np.flatnonzero(plan.want == want):
        row = plan.row[index]
        assert (plan.offsets[index] >= catalog.offsets[row]).all()
        assert (plan.offsets[index] + plan.sizes[index] <= catalog.offsets[row] + catalog.sizes[row]).all()
        grid[slices(plan.offsets[index], plan.sizes[index], len(shape))] += 1
    return grid


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that tile `shape`: repeated cuts of random boxes along random dimensions; empty boxes now and then."""
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dimension = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.sizes[dimension]))
        for start, size in ((0, at), (at, box.sizes[dimension] - at)):
            sizes = (*box.sizes[:dimension], size, *box.sizes[dimension + 1 :])
            offsets = (*box.offsets[:dimension], box.offsets[dimension] + start, *box.offsets[dimension + 1 :])
            boxes.append(Box(offsets, sizes))
    return boxes


@st.composite
def resharding(draw: st.DrawFn) -> tuple[Catalog, list[Want]]:
    """Tensors saved as one partition (cut into small chunks, replicas of some) and wanted as another."""
    entries, wants = [], []
    for number in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        key = f"t{number}"
        for box in draw(partitions(shape)):
            if not box.elements and 0 not in shape:
                continue
            for chunk in cut(box, 4, draw(st.sampled_from([4, 8, 20, 100]))):
                entries += [(key, "float32", shape, chunk, ALL_RANKS)] * draw(st.sampled_from([1, 1, 1, 2]))
        wants += [Want(key, "float32", shape, box) for box in draw(partitions(shape))]
    return catalog_of(*entries), wants


@settings(max_examples=200, deadline=None)
@given(resharding())
def test_any_layout_fills_any_other(case: tuple[Catalog, list[Want]]) -> None:
    catalog, wants = case
    plan = plan_load(catalog, wants, rank=0)
    assert (np.diff(plan.want) >= 0).all()
    for index, want in enumerate(wants):
        expected = np.zeros(want.shape, int)
        expected[tuple(slice(o, o + s) for o, s in zip(*want.box, strict=True))] = 1
        assert np.array_equal(reads_of(plan, catalog, index, want.shape), expected)


@settings(max_examples=100, deadline=None)
@given(resharding(), st.data())
def test_a_missing_chunk_is_always_found(case: tuple[Catalog, list[Want]], data: st.DataObject) -> None:
    """Without one chunk that is not stored twice, each want that needs it is named."""
    catalog, wants = case
    lost = data.draw(st.integers(0, len(catalog) - 1))
    places = [(int(t), *catalog.box(row)) for row, t in enumerate(catalog.tensor)]
    box, key = catalog.box(lost), catalog.tensors[catalog.tensor[lost]].key
    rest = catalog.select(np.array([row for row in catalog if row != lost], np.int64))
    needed = [w for w in wants if w.key == key and w.box.intersect(box)] if box.elements else []
    if places.count(places[lost]) > 1 or not needed:
        return
    with pytest.raises(MismatchError) as caught:
        plan_load(rest, wants, rank=0)
    assert str(caught.value).count(f"{key}: ") == len([w for w in wants if w.key == key and key not in rest] or needed)


COLUMNS = ("want", "row", "offsets", "sizes")


def same(one: LoadPlan, other: LoadPlan) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in COLUMNS)


def test_blocks_of_tensors_give_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(f"t{i}", "int64", (6,), Box((o,), (2,)), ALL_RANKS) for i in range(5) for o in (0, 2, 4)]
    wants = [Want(f"t{i % 5}", "int64", (6,), Box((1,), (4 - i // 5,))) for i in range(10)]
    whole = plan_load(catalog_of(*entries), wants, rank=0)
    monkeypatch.setattr(load, "_AT_ONCE", 4)
    assert same(whole, plan_load(catalog_of(*entries), wants, rank=0))
    assert len(whole) == 5 * 3 + 5 * 2


def test_runs_of_wants_give_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where wants meet very many chunks, as here of two kinds many times over, they are planned a few at a time."""
    entries = [("t", "uint8", (90,), Box((o,), (60,)), ALL_RANKS) for o in (0, 30)] * 100
    entries += [("u", "uint8", (90,), Box((o,), (1,)), ALL_RANKS) for o in range(89)]
    wants = [Want(key, "uint8", (90,), Box((i // 9,), (80,))) for i in range(99) for key in "tu"]
    whole, lacks = plan_partially(catalog_of(*entries), wants, rank=0)
    monkeypatch.setattr(load, "_PAIRS_AT_ONCE", 1)
    parts, same_lacks = plan_partially(catalog_of(*entries), wants, rank=0)
    assert same(whole, parts)
    assert lacks == same_lacks == ["u: no chunk holds elements [89:90]"] * 9
    assert set(whole.row[whole.want % 2 == 0].tolist()) == {0, 1}


def test_own_rows_override_shared_ones_key_by_key() -> None:
    whole = Box.whole((4,))
    catalog = catalog_of(
        ("b", "float32", (4,), whole, ALL_RANKS),
        ("b", "float32", (4,), Box((0,), (2,)), 1),
        ("b", "float32", (4,), Box((2,), (2,)), 1),
        ("w", "float32", (4,), whole, ALL_RANKS),
    )
    wants = [Want("b", "float32", (4,), whole), Want("w", "float32", (4,), whole)]
    for rank, rows in ((0, [0, 3]), (1, [1, 2, 3]), (ALL_RANKS, [0, 3])):
        assert sorted(plan_load(catalog, wants, rank=rank).row.tolist()) == rows


def test_a_value_of_other_ranks_only_is_missing() -> None:
    catalog = catalog_of(("b", "float32", (4,), Box.whole((4,)), 3))
    with pytest.raises(MismatchError, match=r"b: no chunk holds a value for this rank \(only for rank 3\)"):
        plan_load(catalog, [Want("b", "float32", (4,), Box.whole((4,)))], rank=0)


def test_overlapping_chunks_are_read_once_first_one_first() -> None:
    catalog = catalog_of(
        ("w", "float32", (10,), Box((0,), (6,)), ALL_RANKS),
        ("w", "float32", (10,), Box((4,), (6,)), ALL_RANKS),
        ("w", "float32", (10,), Box((1,), (3,)), ALL_RANKS),
    )
    plan = plan_load(catalog, [Want("w", "float32", (10,), Box.whole((10,)))], rank=0)
    assert (plan.row.tolist(), plan.offsets.tolist(), plan.sizes.tolist()) == ([0, 1], [[0], [6]], [[6], [4]])


def test_all_differences_in_one_message() -> None:
    catalog = catalog_of(
        ("gap", "float32", (4, 2), Box((0, 0), (3, 2)), ALL_RANKS),
        ("shape", "float32", (4, 2), Box.whole((4, 2)), ALL_RANKS),
        ("type", "bfloat16", (2,), Box.whole((2,)), ALL_RANKS),
    )
    wants = [
        Want("absent", "float32", (1,), Box.whole((1,))),
        Want("gap", "float32", (4, 2), Box.whole((4, 2))),
        Want("shape", "float32", (2, 4), Box.whole((2, 4))),
        Want("type", "float32", (2,), Box.whole((2,))),
    ]
    with pytest.raises(MismatchError) as caught:
        plan_load(catalog, wants, rank=0)
    assert str(caught.value).splitlines() == [
        "the checkpoint does not fit the state it is loaded into, 4 differences:",
        "  absent: not in the checkpoint",
        "  shape: shape [4, 2] in the checkpoint, [2, 4] here",
        "  type: bfloat16 in the checkpoint, float32 here (cast=True converts it)",
        "  gap: no chunk holds elements [3:4, 0:2]",
    ]
    assert len(plan_load(catalog, wants[3:], rank=0, cast=True)) == 1
    plan, differences = plan_partially(catalog, wants, rank=0, cast=True)
    assert (plan.want.tolist(), len(differences)) == ([3], 3)


def test_an_empty_catalog_lacks_everything_and_serves_nobody() -> None:
    nothing = Catalog.merge([])
    assert len(plan_load(nothing, [], rank=0)) == 0
    with pytest.raises(MismatchError, match="not in the checkpoint"):
        plan_load(nothing, [Want("w", "float32", (1,), Box.whole((1,)))], rank=0)


def test_a_quarter_million_chunks_of_one_tensor() -> None:
    """Two-dimensional shards of a large tensor: linear, not quadratic."""
    side = 512
    rows, columns = np.divmod(np.arange(side * side), side)
    catalog = Catalog.build(
        [("w", "uint8", (side * 4, side * 4))],
        np.zeros(side * side),
        np.stack([rows, columns], 1) * 4,
        np.full((side * side, 2), 4),
    )
    halves = [Box((0, 0), (side * 4, side * 2 + 1)), Box((0, side * 2 + 1), (side * 4, side * 2 - 1))]
    plan = plan_load(catalog, [Want("w", "uint8", (side * 4, side * 4), half) for half in halves], rank=0)
    assert len(plan) == side * side + side
    assert int(np.prod(plan.sizes, axis=1).sum()) == (side * 4) ** 2


def test_cuts_in_every_dimension() -> None:
    """Eight-dimensional boxes: two per dimension."""
    shape = (2,) * 8
    corners = itertools.product(range(2), repeat=8)
    entries = [("w", "uint8", shape, Box(corner, (1,) * 8), ALL_RANKS) for corner in corners]
    plan = plan_load(catalog_of(*entries), [Want("w", "uint8", shape, Box.whole(shape))], rank=0)
    assert len(plan) == 256


@settings(max_examples=100, deadline=None)
@given(resharding())
def test_wants_as_columns_get_the_same_plan(case: tuple[Catalog, list[Want]]) -> None:
    catalog, wants = case
    width = catalog.offsets.shape[1]
    offsets = [(*want.box.offsets, *(0,) * (width - len(want.shape))) for want in wants]
    sizes = [(*want.box.sizes, *(1,) * (width - len(want.shape))) for want in wants]
    tensor = [catalog.index[want.key] for want in wants]
    assert same(plan_boxes(catalog, tensor, offsets, sizes, rank=3), plan_load(catalog, wants, rank=3))


def test_columns_that_cannot_be_filled() -> None:
    catalog = catalog_of(("w", "float32", (4, 2), Box((0, 0), (3, 2)), ALL_RANKS))
    with pytest.raises(
        MismatchError, match=r"there does not fit .* 1 difference:\n  w: no chunk holds elements \[3:4, 1:2"
    ):
        plan_boxes(catalog, [0, 0, 0], [[0, 0], [3, 0], [2, 1]], [[2, 2], [0, 2], [2, 1]], what="there")


@st.composite
def bad_catalogs(draw: st.DrawFn) -> tuple[Catalog, list[Want], int]:
    """Chunks anywhere: over each other, twice, empty, with gaps between them, some of single ranks; and any wants."""

    def box(shape: tuple[int, ...]) -> Box:
        low = tuple(draw(st.integers(0, size)) for size in shape)
        return Box(low, tuple(draw(st.integers(0, size - start)) for start, size in zip(low, shape, strict=True)))

    entries, wants = [], []
    for number in range(draw(st.integers(1, 3))):
        name = (f"t{number}", "int16", tuple(draw(st.lists(st.integers(1, 5), max_size=3))))
        for _ in range(draw(st.integers(1, 9))):
            chunk = draw(st.sampled_from([Box.whole(name[2]), box(name[2]), box(name[2])]))
            rank = draw(st.sampled_from([ALL_RANKS, ALL_RANKS, ALL_RANKS, 0, 1]))
            entries += [(*name, chunk, rank)] * draw(st.sampled_from([1, 1, 2]))
        wants += [Want(*name, box(name[2])) for _ in range(draw(st.integers(0, 4)))]
    return catalog_of(*entries), draw(st.permutations(wants)), draw(st.sampled_from([ALL_RANKS, 0, 1]))


@settings(max_examples=300, deadline=None)
@given(bad_catalogs())
def test_what_can_be_filled_is_and_the_rest_is_named(case: tuple[Catalog, list[Want], int]) -> None:
    catalog, wants, rank = case
    plan, differences = plan_partially(catalog, wants, rank=rank)
    lacking = 0
    for index, want in enumerate(wants):
        rows = np.asarray(catalog.rows(want.key))
        served = (
            rows[catalog.rank[rows] == rank] if (catalog.rank[rows] == rank).any() else rows[catalog.rank[rows] == -1]
        )
        held = np.zeros(want.shape, int)
        for row in served.tolist():
            held[slices(catalog.offsets[row], catalog.sizes[row], len(want.shape))] = 1
        inside = np.zeros(want.shape, int)
        inside[slices(*(np.array(column, np.int64) for column in want.box), len(want.shape))] = 1
        filled = bool((held >= inside).all())
        lacking += not filled
        assert np.array_equal(reads_of(plan, catalog, index, want.shape), inside * filled)
        assert np.isin(plan.row[plan.want == index], served).all()
    assert len(differences) == lacking
    assert (np.diff(plan.want) >= 0).all()


def test_more_chunks_over_each_other_than_are_sorted_out() -> None:
    """Chunks that a checkpoint of ours never has: refused, whether they are wanted by one or by many."""
    count = cover.MAX_OVERLAPPING + 1
    number = np.arange(count)[:, None]
    catalog = Catalog.build([("w", "uint8", (count + 9,))], np.zeros(count), number, np.full((count, 1), 10))
    want = Want("w", "uint8", (count + 9,), Box.whole((count + 9,)))
    for wants in ([want], [want] * 50):
        with pytest.raises(FormatError, match="overlapping chunks"):
            plan_load(catalog, wants, rank=0)


def test_heaps_of_chunks_are_refused_before_all_their_pairs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many wants is covered by very many different chunks: their pairs are not even listed."""
    count = 3 * cover.MAX_OVERLAPPING
    number = np.arange(count)[:, None]
    catalog = Catalog.build([("w", "uint8", (2 * count,))], np.zeros(count), number, 2 * count - number)
    wants = [Want("w", "uint8", (2 * count,), Box((count + i,), (8,))) for i in range(200)]
    monkeypatch.setattr(load, "_PAIRS_AT_ONCE", 1)
    with pytest.raises(FormatError, match=r"overlapping chunks: a tensor's chunks lie \d+-fold over each other"):
        plan_load(catalog, wants, rank=0)


def test_one_chunk_of_very_many_is_missing() -> None:
    """It is named, and nobody speaks of chunks over each other."""
    side = 2 * cover.MAX_OVERLAPPING
    number = np.delete(np.arange(side), 4321)[:, None] * 2
    catalog = Catalog.build([("w", "uint8", (side * 2,))], np.zeros(side - 1), number, np.full((side - 1, 1), 2))
    with pytest.raises(MismatchError, match=r"w: no chunk holds elements \[8642:8644\]$"):
        plan_load(catalog, [Want("w", "uint8", (side * 2,), Box.whole((side * 2,)))], rank=0)


def test_every_chunk_twice() -> None:
    """Copies of chunks at other places: the first of each is read, and no want is looked at by itself."""
    side = 128
    rows, columns = np.divmod(np.arange(side * side), side)
    low = np.repeat(np.stack([rows, columns], 1) * 4, 2, axis=0)
    catalog = Catalog.build([("w", "uint8", (side * 4,) * 2)], np.zeros(len(low)), low, np.full(low.shape, 4))
    starts = np.stack(np.divmod(np.arange(64 * 64), 64), axis=1) * 8
    plan = plan_boxes(catalog, np.zeros(len(starts)), starts, np.full(starts.shape, 8))
    assert (plan.row % 2 == 0).all()
    assert len(plan) == side * side
    assert np.array_equal(plan.want, np.repeat(np.arange(len(starts)), 4))


def test_300_thousand_tiny_chunks_wanted_by_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor in columns and rows: what is looked at grows with the chunks, not with their square."""
    rows, columns = 500, 600
    low = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1) * 2
    catalog = Catalog.build([("w", "uint8", (rows * 2, columns * 2))], np.zeros(len(low)), low, np.full(low.shape, 2))
    looked: list[int] = []
    look = meet._look

    def counting(wants: meet.Boxes, chunks: meet.Boxes, asked: meet._Items, held: meet._Items) -> object:
        ends = (np.searchsorted(held.task, asked.task, side) for side in ("right", "left"))
        looked.append(int(np.subtract(*ends).sum()))
        return look(wants, chunks, asked, held)

    monkeypatch.setattr(meet, "_look", counting)
    low = np.stack(np.divmod(np.arange(rows * columns), rows), axis=1) * 2
    wanted = plan_boxes(catalog, np.zeros(len(low)), low[:, ::-1], np.full(low.shape, 2))
    assert np.array_equal(np.sort(wanted.row), np.arange(len(low)))
    assert sum(looked) <= 40 * len(low)
