"""Who reads what: every wanted row once, by a rank that wants it, evenly, and the same seen from both ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.plan.exchange import Exchange, plan_exchange


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def loads(exchange: Exchange, raw: np.ndarray) -> list[int]:
    return [int(raw[exchange.reads(rank)].sum()) for rank in range(len(exchange.wanted))]


@st.composite
def questions(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray], list[int] | None]:
    """Sizes of rows, which of them each rank wants, and the ranks' nodes."""
    count, ranks = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    raw = np.array([draw(st.sampled_from([0, 1, 5, 100, 2**40])) for _ in range(count)], np.int64)
    wanted = [np.array(sorted(draw(st.sets(st.sampled_from(range(max(count, 1)))))), np.int64) for _ in range(ranks)]
    wanted = [some[some < count] for some in wanted]
    return raw, wanted, draw(st.none() | st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))


@settings(max_examples=300, deadline=None)
@given(questions())
def test_each_wanted_row_has_one_reader_that_wants_it(
    question: tuple[np.ndarray, list[np.ndarray], list[int] | None],
) -> None:
    raw, wanted, nodes = question
    exchange = plan_exchange(raw, wanted, nodes)
    assert np.array_equal(exchange.reader, plan_exchange(raw, wanted, nodes).reader)
    read = {row: rank for rank in range(len(wanted)) for row in exchange.reads(rank).tolist()}
    assert sorted(read) == sorted({row for some in wanted for row in some.tolist()})
    assert sum(len(exchange.reads(rank)) for rank in range(len(wanted))) == len(read)
    sent, received = set(), set()
    for rank, some in enumerate(wanted):
        assert set(exchange.reads(rank).tolist()) <= set(some.tolist())
        sent |= {(rank, target, row) for row, target in zip(*map(np.ndarray.tolist, exchange.sends(rank)), strict=True)}
        received |= {
            (source, rank, row) for row, source in zip(*map(np.ndarray.tolist, exchange.receives(rank)), strict=True)
        }
        assert (np.diff(exchange.sends(rank)[0]) >= 0).all()
        assert (np.diff(exchange.receives(rank)[0]) > 0).all()
    expected = {
        (read[row], rank, row) for rank, some in enumerate(wanted) for row in some.tolist() if read[row] != rank
    }
    assert sent == expected
    assert received == expected


def test_what_all_ranks_want_is_read_evenly_and_in_runs() -> None:
    raw = np.full(1000, 16 * 2**20)
    exchange = plan_exchange(raw, [np.arange(1000)] * 8)
    assert loads(exchange, raw) == [125 * 16 * 2**20] * 8
    for rank in range(8):
        assert exchange.reads(rank).tolist() == list(range(rank * 125, rank * 125 + 125))


def test_replicas_fill_up_what_shards_leave() -> None:
    """Rank 0 alone wants half of the bytes: the others read what all want."""
    raw = np.full(40, 10)
    exchange = plan_exchange(raw, [np.arange(40), *[np.arange(20, 40)] * 3])
    assert sorted(loads(exchange, raw)) == [60, 70, 70, 200]


def test_replicas_of_shards() -> None:
    """Hybrid sharding: ranks r and r + 4 want the same shard."""
    raw = np.random.default_rng(1).integers(1, 2**24, 400)
    shards = np.array_split(np.arange(400), 4)
    exchange = plan_exchange(raw, [shards[rank % 4] for rank in range(8)])
    for shard in range(4):
        whole = int(raw[shards[shard]].sum())
        pair = loads(exchange, raw)[shard::4]
        assert sum(pair) == whole
        assert max(pair) <= whole * 0.52


def test_neighbours_that_share_single_rows() -> None:
    """Another world size: each chunk is wanted by one rank or by two neighbours."""
    raw = np.full(300, 2**20)
    starts = np.linspace(0, 300, 65).astype(int)
    wanted = [np.arange(max(starts[rank] - 1, 0), starts[rank + 1]) for rank in range(64)]
    found = loads(plan_exchange(raw, wanted), raw)
    assert max(found) <= 5 * 2**20
    assert min(found) >= 4 * 2**20


def test_nodes_read_by_their_ranks() -> None:
    """Three ranks on one node, one on another: a rank is a rank."""
    raw = np.full(400, 7)
    exchange = plan_exchange(raw, [np.arange(400)] * 4, [0, 0, 0, 5])
    assert loads(exchange, raw) == [700] * 4
    exchange = plan_exchange(raw, [np.arange(400), np.arange(200), np.arange(200), np.arange(200, 400)], [0, 0, 0, 1])
    found = loads(exchange, raw)
    assert max(found) <= 710


def test_a_rank_reads_on_whose_node_a_row_is_wanted_most() -> None:
    """Nodes (0, 1) and (2, 3): rows that 0, 1 and 2 want are hardly read by 2, though it reads as much as others."""
    raw = np.full(600, 9)
    near, far = np.arange(300), np.arange(300, 600)
    exchange = plan_exchange(raw, [near, np.arange(600), np.arange(600), far], [0, 0, 1, 1])
    assert max(loads(exchange, raw)) <= 153 * 9
    assert np.isin(exchange.reads(2), near).sum() <= 20
    assert np.isin(exchange.reads(1), far).sum() <= 20


def test_loads_are_handed_on_along_a_chain() -> None:
    """Rank 0 has enough of its own; each of the others shares all it wants with the next: all move on by one."""
    raw = np.full(800, 4)
    parts = np.arange(800).reshape(8, 100)
    wanted = [parts[0:2].reshape(-1), *[parts[rank : rank + 2].reshape(-1) for rank in range(1, 7)], parts[7]]
    found = loads(plan_exchange(raw, wanted), raw)
    assert max(found) <= 1.05 * np.mean(found)


def test_sizes_of_all_kinds_come_out_even() -> None:
    """Many sets of ranks, sizes over five orders of magnitude: nobody reads a tenth more than the average."""
    random = np.random.default_rng(7)
    raw = (10 ** random.uniform(2, 7, 5000)).astype(np.int64)
    member = random.random((16, 5000)) < 0.3
    member[random.integers(0, 16, 5000), np.arange(5000)] = True
    exchange = plan_exchange(raw, [np.flatnonzero(some) for some in member])
    found = loads(exchange, raw)
    assert max(found) <= 1.1 * np.mean(found)


def test_lists_that_are_no_lists_of_rows() -> None:
    for wrong in (rows(1, 1), rows(2, 1), rows(-1), rows(5)):
        with pytest.raises(ValueError, match="rank 1 wants rows that are not"):
            plan_exchange(np.ones(5, np.int64), [rows(0), wrong])
    with pytest.raises(ValueError, match="nodes of 1 ranks for 2 ranks"):
        plan_exchange(np.ones(5, np.int64), [rows(0), rows(1)], [0])


def test_nobody_wants_anything() -> None:
    exchange = plan_exchange(np.ones(3, np.int64), [rows(), rows()])
    assert exchange.reader.tolist() == [-1, -1, -1]
    assert not any(map(len, (exchange.reads(1), *exchange.sends(0), *exchange.receives(1))))
