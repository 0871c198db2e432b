"""Where the ranks of a job run: its nodes, their failure domains, and the groups in which they protect each other.

Owns what every rank works out alike from what all have said of themselves once, at start.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping

import msgspec

from ckptd.core.config import World, node_name
from ckptd.core.errors import ConfigError
from ckptd.plan.stripe import plan_groups
from ckptd.protocol.cluster.facts import Shape
from ckptd.trainer.collective import Group

log = logging.getLogger("ckptd")


class _Place(msgspec.Struct, array_like=True):
    """What a rank says of itself."""

    node: str
    domain: str
    local_rank: int


@dataclasses.dataclass(frozen=True)
class Places:
    """`nodes`: their names, in the order of their first ranks; `node_of`: rank -> index of its node; `shape`: the
    groups of nodes, and the losses that each survives."""

    rank: int
    nodes: tuple[str, ...]
    node_of: tuple[int, ...]
    shape: Shape

    @classmethod
    def find(cls, group: Group, world: World, redundancy: str, environ: Mapping[str, str] = os.environ) -> Places:
        """Collective. Raises ConfigError, the same on every rank, where two nodes have one name, or the nodes cannot
        give the `redundancy`."""
        node = node_name(environ)
        own = _Place(node, environ.get("CKPTD_FAILURE_DOMAIN") or node, world.local_rank)
        said = group.all_gather(msgspec.msgpack.encode(own))
        places = [msgspec.msgpack.decode(data, type=_Place) for data in said]
        _check_names(places)
        nodes = tuple(dict.fromkeys(place.node for place in places))
        if len(nodes) > 1:
            raise ConfigError(
                f"the job's {group.size} ranks run on several nodes ({', '.join(sorted(nodes))}; {world.local_size} "
                "ranks on this one); this version of ckptd serves jobs on one node"
            )
        domain_of = {place.node: place.domain for place in places}
        grouping = plan_groups([domain_of[node] for node in nodes], redundancy)
        if group.rank == 0:
            for warning in grouping.warnings:
                log.warning("%s", warning)
        shape = Shape(tuple(found.nodes for found in grouping.groups), grouping.groups[0].parity_count)
        return cls(group.rank, nodes, tuple(nodes.index(place.node) for place in places), shape)

    @property
    def ranks_here(self) -> list[int]:
        """Those of this rank's node."""
        return [rank for rank, node in enumerate(self.node_of) if node == self.node_of[self.rank]]

    @property
    def leads(self) -> bool:
        """This rank speaks for its node."""
        return self.rank == self.ranks_here[0]


def _check_names(places: list[_Place]) -> None:
    """Ranks of one node have different local ranks: else two nodes have one name."""
    counts = Counter((place.node, place.local_rank) for place in places)
    doubled = sorted({node for (node, _), count in counts.items() if count > 1})
    if doubled:
        raise ConfigError(
            f"several nodes are called {', '.join(map(repr, doubled))}: give each a name of its own with CKPTD_NODE"
        )
