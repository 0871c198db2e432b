"""Every set of nodes that may be lost, and every set that is one too many, on real daemons: what was protected comes
back byte by byte, or the launch is refused and says what is missing.

The ranks are threads of this process (ranks.py). One job lives through all of its losses: survivors go on, lost nodes
are replaced by new ones, and what was restored is protected again before the next are killed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import pytest

from ckptd.core.errors import UnrecoverableError
from ckptd.plan.stripe import PIECE_BYTES
from tests.lab.hosts import Hosts
from tests.lab.ranks import SHORT, Crew, Host, enter

CODES = {"2+1": (3, 1), "2+2": (4, 2), "3+1": (4, 1), "4+2": (6, 2)}
"""Nodes, and how many may be lost."""

LONG = 1
"""Of a scheme's sets, so many lose strings with pieces in all segments of the code; the others strings of one."""


@pytest.mark.parametrize("code", CODES)
def test_every_loss(hosts: Hosts, code: str) -> None:
    """SIGKILL to the daemons and keepers of each set of up to m nodes in turn. Then m + 1 nodes stay away: nobody is
    let in, and nothing of what the others hold is touched by that."""
    nodes, parity = CODES[code]
    here = hosts.make(nodes)
    subsets = list(_subsets(nodes, range(1, parity + 1)))
    long = (nodes - parity - 1) * PIECE_BYTES + PIECE_BYTES // 4
    sizes = [*[SHORT] * (len(subsets) - LONG), *[long] * LONG][-len(subsets) :]
    crew = Crew.enter(here, redundancy=code, string_bytes=sizes[0])
    crew.snapshot(1)
    for step, (lost, size) in enumerate(zip(subsets, [*sizes[1:], SHORT], strict=True), 2):
        hosts.lose(*(here[number] for number in lost))
        crew.vanish()
        here = _replaced(here, lost, hosts.make(len(lost)))
        crew = Crew.enter(here, redundancy=code, resume="must", string_bytes=size)
        assert crew.step == step - 1, lost
        crew.check_restored()
        crew.snapshot(step)
    hosts.lose(*here[: parity + 1])
    crew.vanish()
    strangers = hosts.make(parity + 1)
    _refused([*strangers, *here[parity + 1 :]], step, tuple(range(parity + 1)), parity)


def _subsets(nodes: int, sizes: Iterable[int]) -> Iterator[tuple[int, ...]]:
    for size in sizes:
        yield from itertools.combinations(range(nodes), size)


def _replaced(hosts: Sequence[Host], lost: Sequence[int], others: Sequence[Host]) -> list[Host]:
    """With others in the places of those that are lost."""
    found = dict(zip(lost, others, strict=True))
    return [found.get(number, host) for number, host in enumerate(hosts)]


def _refused(hosts: Sequence[Host], step: int, lost: Sequence[int], parity: int) -> None:
    """Every rank is told what is missing."""
    for refused in enter(hosts):
        assert isinstance(refused, UnrecoverableError), (lost, refused)
        assert f"step {step} of epoch" in str(refused)
        assert f"{', '.join(map(str, lost))} have lost their data or parities, and {parity} may be lost" in str(refused)
