"""Where the ranks of a job run: its nodes, their failure domains, and the groups in which they protect each other.

Owns what every rank works out alike from what all have said of themselves once, at start.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ckptd.core.config import World, node_name, runtime_dir
from ckptd.core.errors import ConfigError, VersionError
from ckptd.plan.stripe import plan_groups
from ckptd.protocol import messages as m
from ckptd.protocol.cluster.facts import Shape
from ckptd.trainer.collective import Group

log = logging.getLogger("ckptd")


class _Place(msgspec.Struct, array_like=True):
    """What a rank says of itself. `protocol` is the first field in every version."""

    protocol: int
    node: str
    domain: str
    local_rank: int
    home: tuple[str, int, int, str]


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
        give the `redundancy`; VersionError where not all run the same version."""
        node = node_name(environ)
        own = _Place(m.PROTOCOL, node, environ.get("CKPTD_FAILURE_DOMAIN") or node, world.local_rank, _home(environ))
        said = group.all_gather(msgspec.msgpack.encode(own))
        _check_versions(said)
        places = [msgspec.msgpack.decode(data, type=_Place) for data in said]
        _check_names(places)
        nodes = tuple(dict.fromkeys(place.node for place in places))
        _check_homes(places)
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


def _home(environ: Mapping[str, str]) -> tuple[str, int, int, str]:
    """What tells the runtime directory of this node from any other's: the boot, and what is there already of it by
    device and inode, the rest by name."""
    directory = runtime_dir(environ)
    there = next(path for path in (directory, *directory.parents) if path.exists())
    found = there.stat()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, found.st_dev, found.st_ino, str(directory.relative_to(there))


def _check_versions(said: Sequence[bytes]) -> None:
    """All ranks speak one protocol; of what another version says only the first field is looked at."""
    versions = [msgspec.msgpack.decode(data, type=list[object])[0] for data in said]
    other = next((rank for rank, version in enumerate(versions) if version != versions[0]), None)
    if other is not None:
        raise VersionError(
            f"rank 0 speaks protocol {versions[0]}, rank {other} speaks {versions[other]}: install one version of "
            "ckptd on all nodes"
        )


def _check_homes(places: list[_Place]) -> None:
    """Each node has a runtime directory, and so a daemon, of its own."""
    served: dict[tuple[str, int, int, str], str] = {}
    for place in places:
        other = served.setdefault(place.home, place.node)
        if other != place.node:
            raise ConfigError(
                f"nodes {other!r} and {place.node!r} have one runtime directory, hence one daemon: give each its own "
                "with CKPTD_RUNTIME_DIR, or the same name with CKPTD_NODE if they are one node"
            )


def _check_names(places: list[_Place]) -> None:
    """Ranks of one node have different local ranks: else two nodes have one name."""
    counts = Counter((place.node, place.local_rank) for place in places)
    doubled = sorted({node for (node, _), count in counts.items() if count > 1})
    if doubled:
        raise ConfigError(
            f"several nodes are called {', '.join(map(repr, doubled))}: give each a name of its own with CKPTD_NODE"
        )
