"""Groups, stripes and reads of lost bytes: any m losses give back every byte, and nobody does more than a share."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core import native
from ckptd.core.errors import ConfigError, UnrecoverableError
from ckptd.plan.stripe import Group, Read, Row, Source, Striping, plan_groups

Bytes = npt.NDArray[np.uint8]

CODES = [(k, m) for k in range(1, 13) for m in range(1, 5)]


def distinct(nodes: int) -> list[str]:
    return [f"n{node}" for node in range(nodes)]


def striping(k: int, m: int, sizes: Sequence[int], piece_bytes: int = 4) -> Striping:
    return Striping(Group(tuple(range(k + m)), m), tuple(sizes), piece_bytes)


# ---- groups


@pytest.mark.parametrize("nodes", range(2, 65))
def test_groups_are_as_many_as_can_be_and_even(nodes: int) -> None:
    for k, m in CODES:
        if nodes < k + m:
            with pytest.raises(ConfigError, match=rf"'{k}\+{m}' needs groups of {k + m} nodes, found {nodes} nodes"):
                plan_groups(distinct(nodes), f"{k}+{m}")
            continue
        planned = plan_groups(distinct(nodes), f"{k}+{m}")
        count = nodes // (k + m)
        assert sorted(node for group in planned.groups for node in group.nodes) == list(range(nodes))
        assert len(planned.groups) == count
        assert {len(group.nodes) for group in planned.groups} <= {nodes // count, -(-nodes // count)}
        assert all(group.parity_count == m and group.data_count >= k for group in planned.groups)
        assert planned.warnings == ()


def test_auto() -> None:
    """1+1 to 4+1 on two to five nodes, then groups of 4 to 7."""

    def shapes(nodes: int) -> list[tuple[int, int]]:
        return [(group.data_count, group.parity_count) for group in plan_groups(distinct(nodes)).groups]

    assert [shapes(nodes) for nodes in range(1, 6)] == [[(1, 0)], [(1, 1)], [(2, 1)], [(3, 1)], [(4, 1)]]
    for nodes in range(6, 65):
        assert all(4 <= k + m <= 7 and m == 1 for k, m in shapes(nodes))


def test_none_leaves_every_node_alone() -> None:
    assert plan_groups(["r", "r", "s"], "none").groups == (Group((0,), 0), Group((1,), 0), Group((2,), 0))


def test_group_of_finds_the_group() -> None:
    planned = plan_groups(distinct(9), "2+1")
    assert all(node in planned.group_of(node).nodes for node in range(9))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(1, 4), st.integers(1, 2))
def test_members_come_from_different_domains_where_that_can_be(numbers: list[int], k: int, m: int) -> None:
    """Refused exactly where one domain has more nodes than there are groups; no assignment exists then."""
    domains = [f"rack {number}" for number in numbers]
    count = len(domains) // (k + m)
    if count == 0:
        return
    crowded = max(Counter(domains).values()) > count
    if crowded:
        with pytest.raises(ConfigError, match="failure domain 'rack"):
            plan_groups(domains, f"{k}+{m}")
        return
    for group in plan_groups(domains, f"{k}+{m}").groups:
        assert len({domains[node] for node in group.nodes}) == len(group.nodes)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_auto_spreads_crowded_domains_evenly_and_says_so(numbers: list[int]) -> None:
    domains = [f"rack {number}" for number in numbers]
    planned = plan_groups(domains)
    most = max(Counter(domains).values())
    assert bool(planned.warnings) == (most > len(planned.groups))
    for group in planned.groups:
        share = Counter(domains[node] for node in group.nodes)
        assert all(share[d] <= -(-count // len(planned.groups)) for d, count in Counter(domains).items())


def test_messages_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="'a' has 3 of 6 nodes, expected at most one in each of the 2 groups"):
        plan_groups(["a", "a", "a", "b", "c", "d"], "2+1")
    (warning,) = plan_groups(["a", "a", "b"]).warnings
    assert "takes up to 2 nodes of a group, of which parity gives back 1" in warning
    with pytest.raises(ConfigError, match="expected 'auto', 'none' or K"):
        plan_groups(distinct(3), "2+0")
    with pytest.raises(ConfigError, match="needs groups of 300 nodes, found at most 256"):
        plan_groups(distinct(400), "200+100")
    with pytest.raises(ConfigError, match="makes a group of 400 nodes, expected at most 256"):
        plan_groups(distinct(400), "200+50")
    with pytest.raises(ConfigError, match="no nodes"):
        plan_groups([])


# ---- a group with real bytes


class Cluster:
    """Strings of all nodes of a group, and their parity areas made by following the plan."""

    def __init__(self, plan: Striping, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.plan = plan
        self.nodes = plan.group.nodes
        self.strings = [random.integers(0, 256, size, np.uint8) for size in plan.sizes]
        self.parities = [np.full(plan.parity_bytes, 0xA5, np.uint8) for _ in plan.sizes]
        self.received = Counter[int]()
        self.sent = Counter[int]()
        self.encoded = Counter[int]()

    def bytes_at(self, source: Source) -> Bytes:
        """What a source names; a range that is not there fails."""
        member = self.nodes.index(source.node)
        is_data = source.position < self.plan.group.data_count
        found = (self.strings if is_data else self.parities)[member][source.offset : source.offset + source.size]
        assert len(found) == source.size
        return found

    def transfer(self, source: int, target: int, size: int) -> None:
        assert source != target
        self.sent[source] += size
        self.received[target] += size

    def encode(self) -> None:
        """Each encoder makes its rows; the other holders then pull their parity of every row, once each."""
        staged: dict[tuple[int, int], dict[int, Bytes]] = {}
        for node in self.nodes:
            for row in self.plan.encoding(node):
                assert row.encoder == node
                staged[row.stripe, row.start] = self.encode_row(row)
        for node in self.nodes:
            for row in self.plan.shares(node):
                self.transfer(row.encoder, node, row.length)
                self.keep(node, row, staged[row.stripe, row.start].pop(node))
        assert not any(staged.values())

    def encode_row(self, row: Row) -> dict[int, Bytes]:
        for source in row.sources:
            self.transfer(source.node, row.encoder, source.size)
            self.encoded[row.encoder] += source.size
        targets = [np.zeros(row.length, np.uint8) for _ in row.parities]
        data = [self.bytes_at(source) for source in row.sources]
        native.erasure_encode(*columns(data, targets, row.length))
        parts = {parity.node: part for parity, part in zip(row.parities, targets, strict=True)}
        self.keep(row.encoder, row, parts.pop(row.encoder))
        return parts

    def keep(self, node: int, row: Row, part: Bytes) -> None:
        self.bytes_at(self.plan.parity_of(row, node))[:] = part

    def restore(self, read: Read, lost: Collection[int]) -> Bytes:
        """Follows one step of a read; takes nothing from lost nodes."""
        assert not any(source.node in lost for source in read.sources if source.size)
        if [source.position for source in read.sources] == [read.position]:
            return self.bytes_at(read.sources[0])
        target = np.zeros(read.size, np.uint8)
        positions = [source.position for source in read.sources]
        present = [self.bytes_at(source) if source.size else np.zeros(0, np.uint8) for source in read.sources]
        native.erasure_decode(positions, [read.position], *columns(present, [target], read.size))
        return target

    def check_read(self, node: int, offset: int, size: int, lost: Collection[int]) -> None:
        reads = self.plan.read(node, offset, size, lost)
        ends = [offset, *(read.offset + read.size for read in reads)]
        assert [read.offset for read in reads] == ends[:-1]
        assert ends[-1] == offset + size
        assert all(0 < read.size <= self.plan.row_bytes for read in reads)
        found = [self.restore(read, lost) for read in reads]
        whole = self.strings[self.nodes.index(node)]
        assert np.array_equal(np.concatenate([*found, whole[:0]]), whole[offset : offset + size])


Columns = tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.uint64], npt.NDArray[np.int64]]


def columns(sources: Sequence[Bytes], targets: Sequence[Bytes], length: int) -> Columns:
    return (
        np.array([[source.ctypes.data for source in sources]], np.uint64),
        np.array([[len(source) for source in sources]], np.int64),
        np.array([[target.ctypes.data for target in targets]], np.uint64),
        np.array([length], np.int64),
    )


def losses(plan: Striping) -> list[tuple[int, ...]]:
    count = plan.group.parity_count
    return [lost for size in range(count + 1) for lost in itertools.combinations(plan.group.nodes, size)]


@st.composite
def plans(draw: st.DrawFn, most_nodes: int = 9) -> Striping:
    """Groups with odd node numbers, strings of any length and small pieces."""
    k = draw(st.integers(1, most_nodes - 1))
    m = draw(st.integers(1, min(most_nodes - k, 4)))
    most = draw(st.sampled_from([0, 1, 7, 60, 200]))
    sizes = draw(st.lists(st.integers(0, most), min_size=k + m, max_size=k + m))
    nodes = draw(st.lists(st.integers(0, 63), min_size=k + m, max_size=k + m, unique=True))
    group, piece_bytes = Group(tuple(sorted(nodes)), m), draw(st.sampled_from([1, 3, 8, 1000]))
    return Striping(group, tuple(sizes), piece_bytes, draw(st.integers(1, 4)))


@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_any_m_losses_give_back_every_byte(plan: Striping, draw: st.DataObject) -> None:
    """Everything encoded by the plan, then nodes lost: whole nodes and any ranges come back from what is left."""
    cluster = Cluster(plan)
    cluster.encode()
    lost = draw.draw(st.sampled_from(losses(plan)), "lost")
    for node, size in zip(plan.group.nodes, plan.sizes, strict=True):
        cluster.check_read(node, 0, size, lost)
        offset = draw.draw(st.integers(0, size), "offset")
        cluster.check_read(node, offset, draw.draw(st.integers(0, size - offset), "size"), lost)


@pytest.mark.parametrize(("k", "m"), [(n - m, m) for n in range(2, 9) for m in range(1, min(n, 5))])
def test_every_loss_of_every_small_group(k: int, m: int) -> None:
    plan = striping(k, m, [17 * k + (member * 5) % 11 - 5 for member in range(k + m)], piece_bytes=8)
    cluster = Cluster(plan)
    cluster.encode()
    for lost in losses(plan):
        for node in lost:
            for read in plan.rebuild(node, lost):
                whole = cluster.strings[node][read.offset : read.offset + read.size]
                assert np.array_equal(cluster.restore(read, lost), whole)


@pytest.mark.parametrize("nodes", range(2, 17))
def test_everyone_gives_k_segments_and_holds_m_parities(nodes: int) -> None:
    for m in range(1, nodes):
        k = nodes - m
        plan = striping(k, m, [k] * nodes)
        for node in range(nodes):
            stripes = [plan.stripe_of(node, segment) for segment in range(k)]
            assert [plan.node_at(stripe, segment) for segment, stripe in enumerate(stripes)] == [node] * k
            held = [stripe for stripe in range(nodes) if node in {plan.node_at(stripe, k + t) for t in range(m)}]
            assert len(held) == m
            assert sorted(stripes + held) == list(range(nodes))  # one position in each stripe
            assert plan.node_at(node, k) == node  # the encoder of the stripe of the same number


@settings(max_examples=60, deadline=None)
@given(plans())
def test_nobody_does_more_than_a_share(plan: Striping) -> None:
    """The table of docs/erasure.md, section 5; exact where all strings are of a length that k divides."""
    k, m, segment = plan.group.data_count, plan.group.parity_count, plan.segment_bytes
    assert 0 <= k * segment - max(plan.sizes) < k * plan.piece_bytes
    assert plan.parity_bytes == m * segment
    cluster = Cluster(plan)
    cluster.encode()
    for node, size in zip(plan.group.nodes, plan.sizes, strict=True):
        assert cluster.encoded[node] <= k * segment
        assert cluster.received[node] <= k * segment + (m - 1) * segment
        assert cluster.sent[node] <= size + (m - 1) * segment
    even = Striping(plan.group, (k * segment,) * len(plan.sizes), plan.piece_bytes, plan.row_pieces)
    cluster = Cluster(even)
    cluster.encode()
    for node in plan.group.nodes:
        assert cluster.encoded[node] == k * segment
        assert cluster.received[node] == cluster.sent[node] == (k + m - 1) * segment


def test_any_number_of_nodes_is_balanced() -> None:
    """Traffic by redundancy, (1 + (m - 1) / k) D for everyone, in groups of every shape that 2 to 64 nodes make."""
    possible = [(nodes, k, m) for nodes in range(2, 65) for k, m in CODES if nodes >= k + m]
    shapes = {
        (group.data_count, m) for nodes, k, m in possible for group in plan_groups(distinct(nodes), f"{k}+{m}").groups
    }
    assert len(shapes) > len(CODES)
    for k, m in shapes:
        plan = striping(k, m, [3 * k] * (k + m), piece_bytes=1)
        for node in plan.group.nodes:
            pulled = sum(source.size for row in plan.encoding(node) for source in row.sources)
            assert pulled + sum(row.length for row in plan.shares(node)) == 3 * k + (m - 1) * 3
        assert plan.parity_bytes == m * 3


def test_the_example_of_the_document() -> None:
    """In MiB here, so that bytes can be made of it."""
    plan = striping(2, 2, [20, 18, 16, 6])
    assert plan.segment_bytes == 12
    assert [plan.length(stripe) for stripe in range(4)] == [12, 8, 12, 12]
    rows = [row for node in range(4) for row in plan.encoding(node)]
    assert [[(s.node, s.offset, s.size) for s in row.sources] for row in rows] == [
        [(2, 0, 12), (3, 12, 0)],
        [(3, 0, 6), (0, 12, 8)],
        [(0, 0, 12), (1, 12, 6)],
        [(1, 0, 12), (2, 12, 4)],
    ]
    assert [[(p.node, p.offset, p.size) for p in row.parities] for row in rows] == [
        [(0, 0, 12), (1, 12, 12)],
        [(1, 0, 8), (2, 12, 8)],
        [(2, 0, 12), (3, 12, 12)],
        [(3, 0, 12), (0, 12, 12)],
    ]
    cluster = Cluster(plan)
    cluster.encode()
    assert [cluster.received[node] for node in range(4)] == [24, 26, 26, 28]
    first, second = plan.read(0, 4, 12, lost={0, 1})
    assert (first.stripe, first.position, first.size) == (2, 0, 8)
    assert first.sources == (Source(2, 2, 4, 8), Source(3, 3, 16, 8))
    assert (second.stripe, second.position, second.size) == (1, 1, 4)
    assert second.sources == (Source(0, 3, 0, 4), Source(3, 2, 12, 4))


@given(plans())
def test_pieces_are_on_one_grid(plan: Striping) -> None:
    """Each source of a row is a run of the pieces that its node can count alone; together they are all pieces."""
    pieces = Counter[tuple[int, int]]()
    for node in plan.group.nodes:
        for row in plan.encoding(node):
            assert row.length <= plan.row_bytes
            for source in (*row.sources, *row.parities):
                assert source.offset % plan.piece_bytes == 0
            for source in row.sources:
                pieces.update((source.node, source.offset + at) for at in range(0, source.size, plan.piece_bytes))
                whole = plan.sizes[plan.group.nodes.index(source.node)]
                assert source.size % plan.piece_bytes == 0 or source.offset + source.size == whole
    expected = {
        (n, at) for n, size in zip(plan.group.nodes, plan.sizes, strict=True) for at in range(0, size, plan.piece_bytes)
    }
    assert pieces == Counter(expected)


def test_strings_and_parities_are_lost_apart() -> None:
    """A node whose string is damaged still gives its parity, and the other way round."""
    plan = striping(2, 1, [8, 8, 8])
    stripe = plan.stripe_of(0, 0)
    holder = plan.node_at(stripe, 2)
    other = plan.node_at(stripe, 1)
    (read,) = plan.read(0, 0, 4, lost={0, holder}, lost_parities={0, other})
    assert [(source.node, source.position) for source in read.sources] == [(other, 1), (holder, 2)]
    for lost, lost_parities in [({0, other}, set[int]()), ({0}, {holder})]:
        with pytest.raises(UnrecoverableError, match="1 of its positions are left"):
            plan.read(0, 0, 4, lost, lost_parities)


def test_padding_is_at_hand_though_its_node_is_lost() -> None:
    """1 of 3 nodes holds everything; with the others' strings empty one parity is enough."""
    plan = striping(2, 2, [8, 0, 0, 0])
    for read in plan.rebuild(0, lost={0, 1}):
        assert sum(source.size > 0 for source in read.sources) == 1


def test_a_rebuild_asks_survivors_evenly() -> None:
    """One lost of 4+2 with pieces much smaller than segments: each of five gives 4/5 of the string, or about that."""
    plan = striping(4, 2, [4000] * 6, piece_bytes=10)
    taken = Counter[int]()
    for read in plan.rebuild(0, lost={0}):
        taken.update({source.node: source.size for source in read.sources})
    assert sum(taken.values()) == 4 * 4000
    assert max(taken.values()) - min(taken.values()) <= 2 * plan.row_bytes


def test_too_many_losses_are_refused_by_name() -> None:
    plan = Striping(Group((3, 5, 8), 1), (9, 9, 9), piece_bytes=5)
    with pytest.raises(UnrecoverableError, match="nodes 3, 5, 8: nodes 3, 8 are lost, 1 of its positions are left"):
        plan.rebuild(3, lost={3, 8, 9})
    assert plan.read(5, 0, 9, lost={3, 8})[0].sources == (Source(0, 5, 0, 5),)


def test_without_parity_there_is_nothing_to_encode() -> None:
    plan = Striping(Group((4,), 0), (7,))
    assert [*plan.encoding(4), *plan.shares(4)] == []
    assert plan.read(4, 2, 3) == [Read(4, 2, 3, 0, 0, (Source(0, 4, 2, 3),))]
    with pytest.raises(UnrecoverableError):
        plan.rebuild(4, lost={4})


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 10), (9, 1), (3, -1)])
def test_ranges_outside_a_string_are_refused(offset: int, size: int) -> None:
    with pytest.raises(ValueError, match="expected a range of its 9 bytes"):
        striping(1, 1, [9, 2]).read(0, offset, size)


@pytest.mark.parametrize("sizes", [(1, 2), (1, 2, -3)])
def test_sizes_that_do_not_fit_the_group_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected as many, none negative"):
        Striping(Group((0, 1, 2), 1), sizes)
