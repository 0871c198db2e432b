"""What is stored once and what per rank, and that each rank finds its own again."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.box import CHUNK_BYTES, Box
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.core.errors import FormatError, MismatchError
from ckptd.core.native import crc32c
from ckptd.plan.load import Want, plan_load
from ckptd.plan.save import Piece, plan_save
from ckptd.plan.share import (
    ANOTHER_WORLD,
    OBJECTS_FILE,
    Newcomer,
    Read,
    holders,
    known_alone,
    object_rows,
    objects_for,
    read_bytes,
    saved_world,
    serving_rank,
    share_objects,
    share_rows,
    share_stored,
    tensor_infos,
    tie_equal,
    with_aliases,
    without_rank,
)


def reader(catalog: Catalog, content: bytes) -> Read:
    def read(row: int, into: memoryview) -> None:
        assert catalog.file[row] == OBJECTS_FILE
        offset = int(catalog.file_offset[row])
        into[:] = content[offset : offset + int(catalog.raw[row])]
        assert crc32c(into) == catalog.crc[row]

    return read


paths = st.sampled_from(["loader", "step", "rng/python", "rng/cuda/0", "odd@1/path"])
newcomer = msgspec.msgpack.Decoder(Newcomer)


@given(st.lists(st.dictionaries(paths, st.binary(max_size=3)), min_size=1, max_size=4))
def test_every_rank_gets_its_own_objects_back(objects: list[dict[str, bytes]]) -> None:
    """In the same world each rank sees exactly what it had, plus paths that only other ranks have."""
    ranks = [{"rng/torch": bytes([rank]), **values} for rank, values in enumerate(objects)]
    shared, own = share_objects(ranks)
    catalog, content = object_rows(own, writer=0)
    assert saved_world(catalog) == len(ranks)
    assert not any(path.startswith("rng/") for path in shared)
    for rank, values in enumerate(ranks):
        found = objects_for(rank, shared, catalog, reader(catalog, content))
        assert {path: found[path] for path in values} == values
        elsewhere = objects_for(rank, shared, catalog, reader(catalog, content), world=len(ranks) + 1)
        differing = sorted({path for path, _ in own if not path.startswith("rng/")})
        assert newcomer.decode(elsewhere.pop(ANOTHER_WORLD)) == Newcomer(rank, len(ranks) + 1, differing)
        assert elsewhere == shared | {path: v for path, v in ranks[0].items() if path.startswith("rng/")}
        without = objects_for(rank, shared, catalog, reader(catalog, content), world=9, rng=False)
        assert without.keys() == {*shared, ANOTHER_WORLD}


def test_groups_of_other_ranks_are_given_once() -> None:
    """Stages of a pipeline have other parameters in their groups; whoever loads finds its own by name."""
    groups = [b"first", b"second", b"second", b"first"]
    shared, own = share_objects([{"rng/torch": b"", "optimizer/param_groups": value} for value in groups])
    catalog, content = object_rows(own, writer=0)
    read: list[int] = []

    def counted(row: int, into: memoryview) -> None:
        read.append(row)
        reader(catalog, content)(row, into)

    found = objects_for(5, shared, catalog, counted, world=6, rng=False)
    assert found.pop(ANOTHER_WORLD)
    assert found == {"optimizer/param_groups": b"first", "optimizer/param_groups@1": b"second"}
    assert len(read) == 1
    assert objects_for(2, shared, catalog, counted)["optimizer/param_groups"] == b"second"
    assert {without_rank(path) for path in found} == {"optimizer/param_groups"}
    assert without_rank("loader@1") == "loader@1"


def test_equal_objects_are_stored_once_and_the_lowest_rank_speaks() -> None:
    shared, own = share_objects([{"x": b"0"}, {"x": b"0", "y": b"1"}, {"x": b"2", "y": b"1"}])
    assert shared == {"x": b"0", "y": b"1"}
    assert own == {("x", 2): b"2"}


def test_a_large_object_is_cut_and_read_back() -> None:
    value = np.random.default_rng(0).bytes(2 * CHUNK_BYTES + 5)
    catalog, content = object_rows({("x", 3): value, ("y", 3): b""}, writer=7)
    assert len(catalog.rows("objects/x@3")) == 3
    assert (catalog.writer == 7).all()
    found = objects_for(3, {}, catalog, reader(catalog, content))
    assert found == {"x": value, "y": b""}


def test_no_objects_are_no_rows() -> None:
    catalog, content = object_rows({}, writer=0)
    assert (len(catalog), content) == (0, b"")
    assert saved_world(catalog) == 0
    assert len(Catalog.merge([catalog, catalog])) == 0


@pytest.mark.parametrize("key", ["objects/x", "objects/x@", "objects/x@-1", "objects/x@1e3", "objects/x@9999999999"])
def test_object_keys_that_are_none_are_refused(key: str) -> None:
    catalog = Catalog.build([(key, "uint8", (1,))], [0], [[0]], [[1]])
    with pytest.raises(FormatError, match="expected objects/<path>@<rank>"):
        saved_world(catalog)


def test_an_object_that_is_no_bytes_is_refused() -> None:
    catalog = Catalog.build([("objects/x@0", "float32", (2, 2))], [0], [[0, 0]], [[2, 2]])
    with pytest.raises(MismatchError):
        read_bytes(catalog, "objects/x@0", lambda row, into: None)


def per_rank_catalogs(values: list[dict[str, bytes]]) -> list[Catalog]:
    """Catalogs of a save in which rank r holds the per-rank uint8 tensors `values[r]`, checksums filled in."""
    pieces = [
        [Piece(key, "uint8", (len(v),), (0,), (len(v),), "per_rank") for key, v in held.items()] for held in values
    ]
    catalogs = plan_save(pieces)
    filled = []
    for catalog, held in zip(catalogs, values, strict=True):
        checksums = []
        for row in catalog:
            ((start,), (size,)) = catalog.box(row)
            checksums.append(crc32c(held[catalog.tensors[catalog.tensor[row]].key][start : start + size]))
        filled.append(catalog.replaced(crc=checksums))
    return filled


def test_tensors_equal_to_the_lowest_rank_are_dropped() -> None:
    shared = share_rows(per_rank_catalogs([{"b": b"same"}, {"b": b"same", "c": b"1"}, {"b": b"diff", "c": b"2"}]))
    merged = Catalog.merge(shared)
    found = {(merged.tensors[merged.tensor[row]].key, int(merged.rank[row]), int(merged.writer[row])) for row in merged}
    assert found == {("b", ALL_RANKS, 0), ("b", 2, 2), ("c", ALL_RANKS, 1), ("c", 2, 2)}


def test_a_tensor_that_differs_in_one_chunk_stays_whole() -> None:
    """The override is by tensor: half of it would leave the other half without a value."""
    value = bytes(CHUNK_BYTES + 10)
    shared = share_rows(per_rank_catalogs([{"b": value}, {"b": value[:-1] + b"x"}]))
    assert [len(catalog) for catalog in shared] == [2, 2]
    assert shared[1].rank.tolist() == [1, 1]


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from([b"xx", b"yy"])), min_size=1, max_size=4))
def test_every_rank_is_served_its_own_tensor(values: list[dict[str, bytes]]) -> None:
    merged = Catalog.merge(share_rows(per_rank_catalogs(values)))
    for rank, held in enumerate(values):
        for key, value in held.items():
            plan = plan_load(merged, [Want(key, "uint8", (2,), Box.whole((2,)))], rank=rank)
            assert merged.crc[plan.row].tolist() == [crc32c(value)]
            plan_load(merged, [Want(key, "uint8", (2,), Box.whole((2,)))], rank=ALL_RANKS)


@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from([b"xx", b"yy"])), min_size=1, max_size=6),
    st.integers(1, 3),
)
def test_whoever_holds_what_is_shared_is_known(values: list[dict[str, bytes]], ranks_of_a_node: int) -> None:
    """With all ranks of a node in one catalog: every rank whose value is that of the lowest one that has the key."""
    ranks = per_rank_catalogs(values)
    nodes = [Catalog.merge(ranks[i : i + ranks_of_a_node]) for i in range(0, len(ranks), ranks_of_a_node)]
    merged = Catalog.merge(share_rows(nodes))
    found = holders(nodes)
    assert found.keys() == {key for held in values for key in held}
    for key, alike in found.items():
        lowest = next(held[key] for held in values if key in held)
        shared = [row for row in merged.rows(key) if merged.rank[row] == ALL_RANKS]
        assert [int(nodes[position].rank[rows[0]]) for position, rows in alike] == [
            rank for rank, held in enumerate(values) if held.get(key) == lowest
        ]
        for position, rows in alike:
            assert nodes[position].crc[rows].tolist() == merged.crc[shared].tolist()
            assert nodes[position].offsets[rows].tolist() == merged.offsets[shared].tolist()


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from([b"xx", b"yy"])), min_size=1, max_size=6))
def test_nodes_that_write_apart_serve_every_rank_too(values: list[dict[str, bytes]]) -> None:
    """Pairs of ranks are nodes. Whatever is stored, each place of a writer that is needed at all is listed; what all
    have alike is stored by one node alone."""
    ranks = per_rank_catalogs(values)
    stored = [tie_equal(Catalog.merge(ranks[start : start + 2])) for start in range(0, len(ranks), 2)]
    shared = share_stored(stored)
    for before, after in zip(stored, shared, strict=True):
        if len(after):
            places = [set(zip(c.writer.tolist(), c.file_offset.tolist(), strict=True)) for c in (before, after)]
            assert places[0] == places[1]
    merged = Catalog.merge(shared)
    for rank, held in enumerate(values):
        for key, value in held.items():
            plan = plan_load(merged, [Want(key, "uint8", (2,), Box.whole((2,)))], rank=rank)
            assert merged.crc[plan.row].tolist() == [crc32c(value)]
            plan_load(merged, [Want(key, "uint8", (2,), Box.whole((2,)))], rank=ALL_RANKS)
    once = Catalog.merge(share_rows(ranks))
    if len({tuple(sorted(held.items())) for held in values}) == 1:
        assert [len(catalog) for catalog in shared[1:]] == [0] * (len(shared) - 1)
        assert len(merged) == len(once)


def test_ties_are_between_equal_tensors_alone() -> None:
    tied = tie_equal(Catalog.merge(per_rank_catalogs([{"b": b"same"}, {"b": b"else"}, {"b": b"same", "c": b"same"}])))
    places = {(tied.tensors[tied.tensor[row]].key, int(tied.rank[row])): int(tied.writer[row]) for row in tied}
    assert places == {("b", 0): 0, ("b", 1): 1, ("b", 2): 0, ("c", 2): 2}


def test_generators_are_known_to_be_each_ranks_own() -> None:
    own, rest = known_alone({4: {"rng/torch": b"4", "x": b"0"}, 5: {"rng/torch": b"4", "x": b"0"}})
    assert own == {("rng/torch", 4): b"4", ("rng/torch", 5): b"4"}
    assert rest == {4: {"x": b"0"}, 5: {"x": b"0"}}


def test_another_world_takes_the_shared_values() -> None:
    catalog, _ = object_rows({("rng/torch", rank): b"" for rank in range(4)}, writer=0)
    assert serving_rank(catalog, 2, 4) == 2
    assert serving_rank(catalog, 2, 8) == ALL_RANKS


def test_aliases_are_second_keys_at_the_same_place() -> None:
    (catalog,) = plan_save([[Piece("embed", "float32", (6,), (0,), (6,), "replicated")]])
    tied = with_aliases(catalog, {"head": "embed", "other": "absent", "embed": "embed"})
    assert [info.key for info in tied.tensors] == ["embed", "head"]
    for name in ("offsets", "sizes", "file_offset", "writer", "raw", "crc"):
        values = getattr(tied, name)
        assert np.array_equal(values[0], values[1])
    assert with_aliases(catalog, {}) is catalog


def test_tensors_of_the_state_exclude_objects() -> None:
    (catalog,) = plan_save([[Piece("w", "float32", (6,), (0,), (6,), "replicated")]])
    objects, _ = object_rows({("x", 0): b"1"}, writer=0)
    assert list(tensor_infos(Catalog.merge([catalog, objects]))) == ["w"]
