"""The save plan: every element once, replicas balanced, per-rank tensors by everybody, slots without overlaps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.box import CHUNK_BYTES
from ckptd.core.catalog import ALL_RANKS, COLUMNS, Catalog
from ckptd.core.errors import ConfigError
from ckptd.plan import save
from ckptd.plan.save import (
    ALIGNMENT_BYTES,
    PAGE_ALIGNED_FROM_BYTES,
    PAGE_BYTES,
    Piece,
    place,
    plan_key,
    plan_save,
    slot_bytes,
)


def replica(key: str, shape: tuple[int, ...], dtype: str = "float32") -> Piece:
    return Piece(key, dtype, shape, (0,) * len(shape), shape, "replicated")


def own(key: str, shape: tuple[int, ...], dtype: str = "float32") -> Piece:
    return Piece(key, dtype, shape, (0,) * len(shape), shape, "per_rank")


def rows_of(key: str, shape: tuple[int, ...], start: int, stop: int) -> Piece:
    """A shard of rows start:stop."""
    return Piece(key, "float32", shape, (start,) + (0,) * (len(shape) - 1), (stop - start, *shape[1:]), "sharded")


def same(one: Catalog, other: Catalog) -> bool:
    columns = ("tensor", "offsets", "sizes", "rank", "raw", "writer", "file", "file_offset")
    return one.tensors == other.tensors and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in columns
    )


def assert_slot_is_sound(catalog: Catalog) -> None:
    order = np.argsort(catalog.file_offset)
    ends = (catalog.file_offset + catalog.raw)[order]
    held = catalog.raw[order] > 0
    assert (ends[:-1] <= catalog.file_offset[order][1:])[held[:-1]].all()
    assert (catalog.file_offset % ALIGNMENT_BYTES == 0).all()
    assert (catalog.file_offset[catalog.raw >= PAGE_ALIGNED_FROM_BYTES] % PAGE_BYTES == 0).all()
    assert slot_bytes(catalog) >= int(catalog.raw.sum())


def test_replicas_are_captured_once_and_evenly() -> None:
    pieces = [[replica(f"w{i}", (1000 + i, 10)) for i in range(40)] for _ in range(4)]
    plan = plan_save(pieces)
    keys = [info.key for catalog in plan for info in catalog.tensors]
    assert sorted(keys) == sorted(f"w{i}" for i in range(40))
    loads = [int(catalog.raw.sum()) for catalog in plan]
    assert max(loads) - min(loads) <= 1040 * 10 * 4
    for rank, catalog in enumerate(plan):
        assert (catalog.writer == rank).all()
        assert (catalog.rank == ALL_RANKS).all()


def test_one_large_replica_is_spread_by_chunks() -> None:
    plan = plan_save([[replica("w", (16, CHUNK_BYTES // 4))]] * 4)
    assert [len(catalog) for catalog in plan] == [4, 4, 4, 4]


def test_shards_stay_where_they_are_and_balance_the_replicas() -> None:
    shards = [rows_of("s", (10, 100), 0, 9), rows_of("s", (10, 100), 9, 10)]
    first, second = plan_save([[shard, replica("w", (50,))] for shard in shards])
    assert [info.key for info in first.tensors] == ["s"]
    assert [info.key for info in second.tensors] == ["s", "w"]


def test_replicated_shards_are_captured_once() -> None:
    """Hybrid sharding: ranks 0 and 2 hold one half, 1 and 3 the other."""
    halves = [rows_of("s", (8, 4), 0, 4), rows_of("s", (8, 4), 4, 8)]
    plan = plan_save([[halves[rank % 2]] for rank in range(4)])
    merged = Catalog.merge(plan)
    assert sorted(merged.offsets[:, 0].tolist()) == [0, 4]


def test_per_rank_tensors_are_captured_by_each() -> None:
    plan = plan_save([[own("b", (3,))], [own("b", (3,))], []])
    assert [catalog.rank.tolist() for catalog in plan] == [[0], [1], []]


def test_empty_shards_and_empty_and_scalar_tensors() -> None:
    empty = Piece("e", "int64", (0, 4), (0, 0), (0, 4), "replicated")
    shards = [rows_of("s", (2, 3), 0, 2), rows_of("s", (2, 3), 2, 2)]
    plan = plan_save([[empty, replica("n", ()), shard] for shard in shards])
    merged = Catalog.merge(plan)
    assert sorted(info.key for info in merged.tensors) == ["e", "n", "s"]
    assert merged.raw[list(merged.rows("e"))].tolist() == [0]
    assert merged.raw[list(merged.rows("n"))].tolist() == [4]
    assert len(merged.rows("s")) == 1


def test_an_empty_shard_of_a_tensor_that_nobody_holds() -> None:
    with pytest.raises(ConfigError, match=r"s \[8, 4\]: elements \[0:8, 0:4\]"):
        plan_save([[rows_of("s", (8, 4), 3, 3), replica("w", (2,))]])


def test_a_box_of_other_dimensions_lies_outside() -> None:
    with pytest.raises(ConfigError, match=r"s: rank 1 holds offsets \[0\], sizes \[8, 4\], which lies outside"):
        plan_save([[rows_of("s", (8, 4), 0, 8)], [Piece("s", "float32", (8, 4), (0,), (8, 4), "sharded")]])


def test_many_holders_are_chosen_from_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [[replica(f"w{i}", (100 + i * 7 % 11, 10)) for i in range(30)] for _ in range(5)]
    plan = plan_save(pieces)
    monkeypatch.setattr(save, "_FEW_HOLDERS", 0)
    assert all(same(one, other) for one, other in zip(plan, plan_save(pieces), strict=True))


def test_catalogs_are_what_building_them_would_give() -> None:
    shards = [
        [rows_of("s", (9, 4), 3 * rank, 3 * rank + 3), replica("w", ()), own("b", (2, 3, 4))] for rank in range(3)
    ]
    for catalog in plan_save(shards):
        columns = {name: getattr(catalog, name) for name in COLUMNS}
        built = Catalog.build(catalog.tensors, catalog.tensor, catalog.offsets, catalog.sizes, **columns)
        assert same(catalog, built)
        assert all(getattr(catalog, name).dtype == getattr(built, name).dtype for name in (*COLUMNS, "tensor"))


def test_the_key_of_a_plan_tells_all_questions_apart() -> None:
    piece = rows_of("s", (8, 4), 0, 4)
    others = [
        Piece("t", "float32", (8, 4), (0, 0), (4, 4), "sharded"),
        Piece("s", "bfloat16", (8, 4), (0, 0), (4, 4), "sharded"),
        Piece("s", "float32", (9, 4), (0, 0), (4, 4), "sharded"),
        Piece("s", "float32", (8, 4), (1, 0), (4, 4), "sharded"),
        Piece("s", "float32", (8, 4), (0, 0), (5, 4), "sharded"),
        Piece("s", "float32", (8, 4), (0, 0), (4, 4), "per_rank"),
    ]
    questions = [[[]], [[], []], [[piece]], [[piece], []], [[], [piece]], [[piece, piece]], [[piece], [piece]]]
    questions += [[[other]] for other in others]
    assert len({plan_key(question) for question in questions}) == len(questions)
    assert plan_key([[piece], others]) == plan_key([[rows_of("s", (8, 4), 0, 4)], list(others)])


def test_nothing_at_all() -> None:
    assert [len(catalog) for catalog in plan_save([[], []])] == [0, 0]


def test_disagreements_and_gaps_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_save([[replica("x", (3,)), own("y", (2,))], [replica("x", (4,)), own("y", (3,))]])
    assert "x: replicated float32 [3] on rank 0, replicated float32 [4] on rank 1" in str(caught.value)
    assert "y: per-rank float32 [2] on rank 0, per-rank float32 [3] on rank 1" in str(caught.value)
    with pytest.raises(ConfigError, match=r"s \[8, 4\]: elements \[4:6, 0:4\]"):
        plan_save([[rows_of("s", (8, 4), 0, 4)], [rows_of("s", (8, 4), 6, 8)]])
    with pytest.raises(ConfigError, match="lies outside shape"):
        plan_save([[rows_of("s", (8, 4), 4, 9)]])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3 * 2**20), max_size=40))
def test_places_do_not_overlap(raw: list[int]) -> None:
    offsets, total = place(raw)
    spans = sorted((o, o + r) for o, r in zip(offsets.tolist(), raw, strict=True) if r)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for offset, size in zip(offsets.tolist(), raw, strict=True):
        assert offset % (PAGE_BYTES if size >= PAGE_ALIGNED_FROM_BYTES else ALIGNMENT_BYTES) == 0
    assert max((end for _, end in spans), default=0) <= total < sum(raw) + PAGE_BYTES * (len(raw) + 1)


@st.composite
def worlds(draw: st.DrawFn) -> list[list[Piece]]:
    """Pieces of a few tensors on a few ranks: replicas on some, shards cut anywhere, per-rank tensors."""
    ranks = draw(st.integers(1, 4))
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for number in range(draw(st.integers(0, 5))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        kind = draw(st.sampled_from(["replicated", "sharded", "per_rank"]))
        holders = draw(st.lists(st.integers(0, ranks - 1), min_size=1, unique=True))
        if kind == "sharded" and shape:
            cuts = sorted(draw(st.lists(st.integers(0, shape[0]), min_size=ranks - 1, max_size=ranks - 1)))
            for rank, (start, stop) in enumerate(itertools.pairwise([0, *cuts, shape[0]])):
                pieces[rank].append(rows_of(f"t{number}", shape, start, stop))
        else:
            for rank in holders:
                pieces[rank].append(own(f"t{number}", shape) if kind == "per_rank" else replica(f"t{number}", shape))
    return pieces


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_every_element_is_captured_once_by_a_holder(pieces: list[list[Piece]]) -> None:
    plan = plan_save(pieces)
    assert all(same(one, other) for one, other in zip(plan, plan_save(pieces), strict=True))
    expected: dict[str, int] = {}
    counts: dict[str, np.ndarray] = {}
    for rank, (catalog, held) in enumerate(zip(plan, pieces, strict=True)):
        assert_slot_is_sound(catalog)
        boxes = {piece.key: piece for piece in held}
        for piece in held:
            expected[piece.key] = expected.get(piece.key, 0) + 1 if piece.share == "per_rank" else 1
            counts.setdefault(piece.key, np.zeros(piece.shape, int))
        for row in catalog:
            info, box = catalog.tensors[catalog.tensor[row]], catalog.box(row)
            piece = boxes[info.key]
            assert catalog.rank[row] == (rank if piece.share == "per_rank" else ALL_RANKS)
            for o, s, po, ps in zip(box.offsets, box.sizes, piece.offsets, piece.sizes, strict=True):
                assert o >= po or not box.elements
                assert o + s <= po + ps or not box.elements
            counts[info.key][tuple(slice(o, o + s) for o, s in zip(*box, strict=True))] += 1
    merged = Catalog.merge(plan)
    for key, grid in counts.items():
        assert key in merged, "empty tensors have a row too"
        assert (grid == expected[key]).all() or not math.prod(grid.shape)
