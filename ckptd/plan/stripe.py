"""Where parity lies: groups of nodes, segments, stripes, who encodes what, and what a read of lost bytes takes.

Owns the layout of docs/erasure.md, which has the words and the rules. Every node computes it from the same membership:
all functions are deterministic, pure, and do no arithmetic on bytes (core/native does that).

Invariants:
- A node has at most one position in a stripe, so a lost node costs each stripe of its group at most one position.
- Each member of a group gives k segments, holds m parities and encodes one stripe, none of it of its own.
- Padding is never a source: what lies beyond a string's end is zero and has no place.
- Pieces lie on one grid from the beginning of every string and of every parity, whatever the sizes of the others.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

from ckptd.core.errors import ConfigError, UnrecoverableError

PIECE_BYTES = 4 * 2**20
"""What has a checksum of its own."""

ROW_PIECES = 4
"""What is encoded, decoded and asked for at once: fewer cost calls, more cost memory and gain nothing."""

MOST_POSITIONS = 256
"""Elements of the field, hence the most data segments and parities a stripe can have."""

_AUTO_POSITIONS = 4
_EXPLICIT = re.compile(r"([1-9]\d{0,2})\+([1-9]\d{0,2})")


@dataclasses.dataclass(frozen=True)
class Redundancy:
    """The least number of data segments of a stripe (k), and its parities (m; 0: none)."""

    data: int
    parity: int

    @classmethod
    def parse(cls, text: str, nodes: int) -> Redundancy:
        """What `none`, `auto` or `K+M` means on so many nodes; ConfigError where they cannot give it."""
        if text == "none" or (text == "auto" and nodes == 1):
            return cls(1, 0)
        if text == "auto":
            return cls(min(nodes, _AUTO_POSITIONS) - 1, 1)
        match = _EXPLICIT.fullmatch(text)
        if match is None:
            raise ConfigError(f"redundancy={text!r}: expected 'auto', 'none' or K+M such as '4+2'")
        found = cls(int(match[1]), int(match[2]))
        if found.data + found.parity > min(nodes, MOST_POSITIONS):
            most = f"{nodes} node{'s' if nodes > 1 else ''}" if nodes <= MOST_POSITIONS else f"at most {MOST_POSITIONS}"
            raise ConfigError(
                f"redundancy={text!r} needs groups of {found.data + found.parity} nodes, found {most}; "
                "start more nodes, choose a smaller K+M, or 'auto'"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Group:
    """Nodes that protect each other, ascending; any `parity_count` of them may be lost."""

    nodes: tuple[int, ...]
    parity_count: int

    @property
    def data_count(self) -> int:
        """k: segments that each node's string is cut into."""
        return len(self.nodes) - self.parity_count


@dataclasses.dataclass(frozen=True)
class Grouping:
    """All groups of a membership, and what a user of `auto` should know about its failure domains."""

    groups: tuple[Group, ...]
    warnings: tuple[str, ...]

    def group_of(self, node: int) -> Group:
        """The group that a node is in."""
        return next(group for group in self.groups if node in group.nodes)


def plan_groups(domains: Sequence[str], redundancy: str = "auto") -> Grouping:
    """Groups of nodes 0 to N - 1 from the failure domain of each; docs/erasure.md, section 2.

    ConfigError for a redundancy that so many nodes, or so few domains, cannot give; for domains not under `auto`.
    """
    if not domains:
        raise ConfigError("no nodes: a group needs at least one")
    code = Redundancy.parse(redundancy, len(domains))
    count = len(domains) // (code.data + code.parity)
    if code.parity == 0:
        return Grouping(tuple(Group((node,), 0) for node in range(len(domains))), ())
    crowded = _crowded(domains, count, code.parity)
    if crowded and redundancy != "auto":
        raise ConfigError(
            f"redundancy={redundancy!r}: {crowded}; set CKPTD_FAILURE_DOMAIN to smaller domains, choose a smaller K+M, "
            "or 'auto'"
        )
    dealt = _by_domain(domains)
    groups = tuple(Group(tuple(sorted(dealt[first::count])), code.parity) for first in range(count))
    if len(groups[0].nodes) > MOST_POSITIONS:
        raise ConfigError(
            f"redundancy={redundancy!r} makes a group of {len(groups[0].nodes)} nodes, expected at most "
            f"{MOST_POSITIONS}; choose a smaller K+M"
        )
    return Grouping(groups, (crowded,) if crowded else ())


def _by_domain(domains: Sequence[str]) -> list[int]:
    """Nodes in order, those of a domain behind each other; domains in the order of their first nodes."""
    first: dict[str, int] = {}
    for node, domain in enumerate(domains):
        first.setdefault(domain, node)
    return sorted(range(len(domains)), key=lambda node: (first[domains[node]], node))


def _crowded(domains: Sequence[str], groups: int, parity: int) -> str:
    """Says which domain has more nodes than there are groups; empty if none has."""
    domain, nodes = Counter(domains).most_common(1)[0]
    if nodes <= groups:
        return ""
    return (
        f"failure domain {domain!r} has {nodes} of {len(domains)} nodes, expected at most one in each of the {groups} "
        f"groups: losing it takes up to {-(-nodes // groups)} nodes of a group, of which parity gives back {parity}"
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """Bytes of one position of a stripe: in the node's string (data), or in its parity area. Size 0: only padding."""

    position: int
    node: int
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a stripe and its encoder: k sources, possibly shorter than `length`, and m parities of that length."""

    stripe: int
    start: int
    length: int
    encoder: int
    sources: tuple[Source, ...]
    parities: tuple[Source, ...]


@dataclasses.dataclass(frozen=True)
class Read:
    """`size` bytes at `offset` of a node's string, in one row: position `position` of a stripe, from the sources.

    One source of that same position is the bytes themselves; else there are k sources to decode from.
    """

    node: int
    offset: int
    size: int
    stripe: int
    position: int
    sources: tuple[Source, ...]


@dataclasses.dataclass(frozen=True)
class Striping:
    """The stripes of one group. `sizes`: bytes of each node's string, in the order of `group.nodes`."""

    group: Group
    sizes: tuple[int, ...]
    piece_bytes: int = PIECE_BYTES
    row_pieces: int = ROW_PIECES

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.group.nodes) or min(self.sizes, default=0) < 0 or self.row_bytes < 1:
            raise ValueError(f"sizes {self.sizes} for nodes {self.group.nodes}: expected as many, none negative")
        if self.group.parity_count < 0 or self.group.data_count < 1:
            raise ValueError(f"{self.group.parity_count} parities in a group of {len(self.group.nodes)} nodes")

    @cached_property
    def segment_bytes(self) -> int:
        """L: bytes of a segment, padding included: whole pieces, so that the pieces of all strings are on one grid."""
        pieces = -(-max(self.sizes) // self.piece_bytes)
        return -(-pieces // self.group.data_count) * self.piece_bytes

    @property
    def parity_bytes(self) -> int:
        """Bytes of a node's parity area for one snapshot: parity t lies at t L."""
        return self.group.parity_count * self.segment_bytes

    @property
    def row_bytes(self) -> int:
        """The most that one row has of a position of its stripe."""
        return self.row_pieces * self.piece_bytes

    def stripe_of(self, node: int, segment: int) -> int:
        """The stripe that a node's segment belongs to; its position there has the segment's number."""
        return (self._member(node) - self.group.parity_count - segment) % len(self.group.nodes)

    def node_at(self, stripe: int, position: int) -> int:
        """The node whose data segment (below k) or parity (from k up) is at a position of a stripe."""
        k, m = self.group.data_count, self.group.parity_count
        member = stripe + (m + position if position < k else position - k)
        return self.group.nodes[member % len(self.group.nodes)]

    def length(self, stripe: int) -> int:
        """Bytes of each parity of a stripe: of its longest segment."""
        return max(self._extents[stripe][: self.group.data_count])

    def encoding(self, node: int) -> Iterator[Row]:
        """The rows that a node encodes, in order: it pulls the sources, keeps the first parity, hands out the rest."""
        if self.group.parity_count == 0:
            return
        stripe = self._member(node)
        yield from self._rows(stripe)

    def encoding_of(self, node: int, start: int, stop: int) -> Row:
        """A part of what a node encodes: [start, stop) of its stripe, which ends with the stripe."""
        stripe = self._member(node)
        return self._row(stripe, start, min(stop, self.length(stripe)))

    def shares(self, node: int) -> Iterator[Row]:
        """The rows of which a node pulls its parity from the encoder: in turns over the stripes, so that no encoder is
        asked for everything at once."""
        member, m = self._member(node), self.group.parity_count
        turns = [list(self._rows((member - parity) % len(self.group.nodes))) for parity in range(1, m)]
        for index in range(max(map(len, turns), default=0)):
            yield from (rows[index] for rows in turns if index < len(rows))

    def parity_of(self, row: Row, node: int) -> Source:
        """Where the parity of a row that a node holds goes in its parity area."""
        return next(parity for parity in row.parities if parity.node == node)

    def read(
        self,
        node: int,
        offset: int,
        size: int,
        lost: Collection[int] = (),
        lost_parities: Collection[int] | None = None,
    ) -> list[Read]:
        """How to get [offset, offset + size) of a node's string, row by row in order, while the strings of the nodes
        `lost` and the parities of `lost_parities` (None: of the same nodes) are lost.

        UnrecoverableError where a stripe has fewer than k positions left. ValueError for a range outside the string.
        """
        whole = self.sizes[self._member(node)]
        if offset < 0 or size < 0 or offset + size > whole:
            raise ValueError(f"[{offset}, {offset + size}) of node {node}: expected a range of its {whole} bytes")
        taken: Counter[int] = Counter()
        gone = lost, lost if lost_parities is None else lost_parities
        reads = []
        for segment, start, stop in self._parts(offset, offset + size):
            stripe = self.stripe_of(node, segment)
            sources = self._sources(stripe, segment, start, stop, gone, taken)
            taken.update({source.node: source.size for source in sources})
            reads.append(Read(node, segment * self.segment_bytes + start, stop - start, stripe, segment, sources))
        return reads

    def rebuild(self, node: int, lost: Collection[int], lost_parities: Collection[int] | None = None) -> list[Read]:
        """How to get all of a lost node's string."""
        return self.read(node, 0, self.sizes[self._member(node)], lost, lost_parities)

    def _member(self, node: int) -> int:
        return self.group.nodes.index(node)

    @cached_property
    def _extents(self) -> list[list[int]]:
        """Bytes that are there of each position of each stripe: for data without the padding."""
        k, segment = self.group.data_count, self.segment_bytes
        size_of = dict(zip(self.group.nodes, self.sizes, strict=True))
        found = []
        for stripe in range(len(self.group.nodes)):
            sizes = [size_of[self.node_at(stripe, position)] - position * segment for position in range(k)]
            data = [min(max(size, 0), segment) for size in sizes]
            found.append(data + [max(data)] * self.group.parity_count)
        return found

    def _source(self, stripe: int, position: int, start: int, stop: int) -> Source:
        """Bytes [start, stop) of a position of a stripe."""
        k = self.group.data_count
        base = (position if position < k else position - k) * self.segment_bytes
        size = max(min(stop, self._extents[stripe][position]) - start, 0)
        return Source(position, self.node_at(stripe, position), base + start, size)

    def _rows(self, stripe: int) -> Iterator[Row]:
        length = self.length(stripe)
        for start in range(0, length, self.row_bytes):
            yield self._row(stripe, start, min(start + self.row_bytes, length))

    def _row(self, stripe: int, start: int, stop: int) -> Row:
        k, n = self.group.data_count, len(self.group.nodes)
        places = tuple(self._source(stripe, position, start, stop) for position in range(n))
        return Row(stripe, start, stop - start, self.node_at(stripe, k), places[:k], places[k:])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(segment, start and stop inside it) of a range of a string, cut at the boundaries of rows."""
        while start < stop:
            segment, inside = divmod(start, self.segment_bytes)
            end = min((inside // self.row_bytes + 1) * self.row_bytes, self.segment_bytes, inside + stop - start)
            yield segment, inside, end
            start += end - inside

    def _sources(
        self,
        stripe: int,
        wanted: int,
        start: int,
        stop: int,
        gone: tuple[Collection[int], Collection[int]],
        taken: Counter[int],
    ) -> tuple[Source, ...]:
        """The k sources for [start, stop) of a position, by the rule of docs/erasure.md, section 6. `gone`: nodes that
        lost their strings, and their parities."""
        k = self.group.data_count
        places = [self._source(stripe, position, start, stop) for position in range(len(self.group.nodes))]
        left = [place.node not in gone[place.position >= k] for place in places]
        if left[wanted]:
            return (places[wanted],)
        usable = [place for place in places if place.size == 0 or left[place.position]]
        if len(usable) < k:
            missing = sorted(place.node for place in places if place.size and not left[place.position])
            raise UnrecoverableError(
                f"stripe {stripe} of nodes {', '.join(map(str, self.group.nodes))}: nodes "
                f"{', '.join(map(str, missing))} are lost, {len(usable)} of its positions are left, expected at "
                f"least {k}; take an older snapshot or a checkpoint"
            )
        usable.sort(key=lambda place: (place.size > 0, taken[place.node], place.position))
        return tuple(sorted(usable[:k], key=lambda place: place.position))
