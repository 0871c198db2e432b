"""Who reads what: every wanted row once, by a rank that wants it, evenly, and the same seen from both ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.plan.exchange import Exchange, Readers, plan_exchange


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


# --- where not every rank can read everything


@st.composite
def parted_questions(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray], list[int], Readers, np.ndarray]:
    """As `questions`, with rows in places that lie on some nodes, and bytes that ranks read besides."""
    raw, wanted, nodes = draw(questions().filter(lambda question: question[2] is not None))
    assert nodes is not None
    places = draw(st.integers(1, 4))
    of_row = np.array([draw(st.integers(0, places - 1)) for _ in raw], np.int64)
    present = sorted(set(nodes))
    held = [draw(st.sets(st.sampled_from(present), min_size=1)) for _ in range(places)]
    ranks = [[rank for rank, node in enumerate(nodes) if node in some] for some in held]
    load = np.array([draw(st.sampled_from([0, 7, 2**41])) for _ in wanted], np.int64)
    return raw, wanted, nodes, Readers(of_row, ranks), load


@settings(max_examples=300, deadline=None)
@given(parted_questions())
def test_each_wanted_row_is_read_where_it_can_be(
    question: tuple[np.ndarray, list[np.ndarray], list[int], Readers, np.ndarray],
) -> None:
    raw, wanted, nodes, readers, load = question
    exchange = plan_exchange(raw, wanted, nodes, readers=readers, load=load)
    again = plan_exchange(raw, wanted, nodes, readers=readers, load=load)
    assert np.array_equal(exchange.reader, again.reader)
    everything = sorted({row for some in wanted for row in some.tolist()})
    assert np.flatnonzero(exchange.reader >= 0).tolist() == everything
    for row in everything:
        assert exchange.reader[row] in readers.ranks[readers.place[row]]
    for rank, some in enumerate(wanted):
        received, sources = exchange.receives(rank)
        assert received.tolist() == [row for row in some.tolist() if exchange.reader[row] != rank]
        assert sources.tolist() == exchange.reader[received].tolist()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(0, 2**32 - 1), st.booleans(), st.integers(1, 30)
)
def test_ranks_of_a_node_share_what_it_has(sizes: list[int], seed: int, loaded: bool, each: int) -> None:
    """Nodes of different sizes, each with rows of its own that all others want: whoever reads any has not much more to
    do than the idlest rank of its node."""
    random = np.random.default_rng(seed)
    nodes = np.repeat(np.arange(len(sizes)), sizes)
    count = each * len(sizes) * 5
    place = np.sort(random.integers(0, len(sizes), count))
    raw = random.integers(1, 2**20, count)
    wanted = [np.flatnonzero(place != node) for node in nodes]
    load = random.integers(0, 2**22 if loaded else 1, len(nodes))
    ranks = [np.flatnonzero(nodes == node) for node in range(len(sizes))]
    exchange = plan_exchange(raw, wanted, nodes, readers=Readers(place, ranks), load=load)
    added = np.array(loads(exchange, raw))
    done = load + added
    for its in ranks:
        busiest = max((int(done[rank]) for rank in its if added[rank]), default=0)
        assert busiest <= 1.02 * int(done[its].min()) + int(raw.max(initial=0))


def test_what_two_nodes_hold_is_read_by_the_one_that_has_less_to_do() -> None:
    raw = np.full(300, 8)
    everything = np.arange(300)
    readers = Readers(np.repeat([0, 1], [100, 200]), [[0, 1], [0, 1, 2, 3]])
    exchange = plan_exchange(raw, [*[everything[:0]] * 4, everything], [0, 0, 1, 1, 2], readers=readers)
    assert loads(exchange, raw) == [75 * 8] * 4 + [0]
    busy = np.array([0, 0, 10**9, 0, 0])
    exchange = plan_exchange(raw, [*[everything[:0]] * 4, everything], [0, 0, 1, 1, 2], readers=readers, load=busy)
    assert loads(exchange, raw) == [100 * 8, 100 * 8, 0, 100 * 8, 0]


def test_islands_are_levelled_apart() -> None:
    """What one node has to read is no reason for the ranks of another not to share their own evenly."""
    raw = np.full(1000, 4)
    readers = Readers(np.repeat([0, 1], [900, 100]), [[0, 1], [2, 3]])
    load = np.array([0, 0, 4 * 500, 4 * 460])
    exchange = plan_exchange(raw, [np.arange(1000)] * 4, [0, 0, 1, 1], readers=readers, load=load)
    assert loads(exchange, raw) == [1800, 1800, 4 * 30, 4 * 70]


def test_a_million_rows_on_many_nodes() -> None:
    """Memory and work are linear in rows: one place after the other on 128 nodes of 8 ranks, all of it wanted twice."""
    rows, nodes = 10**6, 128
    place = np.arange(rows) * (nodes * 8) // rows
    ranks = [np.arange(slot // 8 * 8, slot // 8 * 8 + 8) for slot in range(nodes * 8)]
    shards = np.array_split(np.arange(rows), nodes * 4)
    wanted = [shards[(rank + 40) % len(shards)] for rank in range(nodes * 8)]
    raw = np.full(rows, 1000)
    exchange = plan_exchange(raw, wanted, np.arange(nodes * 8) // 8, readers=Readers(place, ranks))
    assert (exchange.reader // 8 == place // 8).all()
    found = np.array(loads(exchange, raw))
    assert found.max() <= 1.02 * found.mean()


def test_a_row_that_nobody_can_read() -> None:
    readers = Readers(np.array([0, 1, 1]), [[0], []])
    with pytest.raises(ValueError, match="row 2: no rank can read it"):
        plan_exchange(np.ones(3, np.int64), [rows(0, 2)], readers=readers)
    assert plan_exchange(np.ones(3, np.int64), [rows(0)], readers=readers).reader.tolist() == [0, -1, -1]
