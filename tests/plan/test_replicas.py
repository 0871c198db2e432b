"""Which pieces several ranks hold, and what follows where they turn out to differ."""

from __future__ import annotations

from ckptd.plan.replicas import as_own, differing, digests, held_in_common, label
from ckptd.plan.save import Piece


def piece(key: str, offset: int = 0, size: int = 4, share: str = "replicated") -> Piece:
    """Of a vector of four."""
    return Piece(key, "float32", (4,), (offset,), (size,), share)


WHOLE, LEFT, RIGHT = piece("w"), piece("s", 0, 2, "sharded"), piece("s", 2, 2, "sharded")


def test_by_the_ranks_that_hold_them() -> None:
    """One hybrid layout: a weight on all ranks, shards on two each, a tensor of rank 3's and per-rank ones."""
    own = piece("b", share="per_rank")
    held = [[WHOLE, LEFT, own], [WHOLE, RIGHT, own], [WHOLE, LEFT, own], [RIGHT, piece("x"), WHOLE, own]]
    assert held_in_common(held, frozenset()) == {(0, 1, 2, 3): [WHOLE], (0, 2): [LEFT], (1, 3): [RIGHT]}
    assert held_in_common(held, frozenset({"w", label(RIGHT)})) == {(0, 2): [LEFT]}
    assert held_in_common(held[:1], frozenset()) == {}


def test_empty_pieces_and_repeated_ones_are_nothing_in_common() -> None:
    """A rank without elements has nothing that could differ; one rank that lists a box twice is one holder."""
    assert held_in_common([[piece("w", 0, 0)], [piece("w", 0, 0)]], frozenset()) == {}
    assert held_in_common([[WHOLE, WHOLE]], frozenset()) == {}


def test_digests_are_equal_where_checksums_are() -> None:
    """One number for each set of holders; it depends on the checksum of each piece."""
    common = held_in_common([[WHOLE, LEFT], [WHOLE, LEFT], [WHOLE]], frozenset())
    first = digests(common, {"w": 1, label(LEFT): 2})
    assert len(first) == 2
    assert digests(common, {"w": 1, label(LEFT): 2}) == first
    assert len(digests(common, {"w": 1, label(LEFT): 3}).items() & first.items()) == 1
    assert not digests(common, {"w": 3, label(LEFT): 1}).items() & first.items()


def test_what_differs_becomes_each_ranks_own() -> None:
    """Whole tensors; a shard cannot, since nobody could load it elsewhere."""
    found = differing([{"w": 1, label(LEFT): 5}, {"w": 2, label(RIGHT): 6}, {label(LEFT): 7}])
    assert found == {"w", label(LEFT)}
    assert [p.share for p in as_own([WHOLE, LEFT, piece("v")], found)] == ["per_rank", "sharded", "replicated"]
    assert held_in_common([as_own([WHOLE, LEFT], found)] * 2, found) == {}
