"""What protection takes of a node's memory, as docs/guides/protection.md says, on real daemons."""

from __future__ import annotations

import collections
import os
import re
from pathlib import Path

from ckptd.plan.stripe import PIECE_BYTES
from tests.faults.inject import sitecustomize as inject
from tests.lab.hosts import Hosts
from tests.lab.ranks import Crew, Host

STRING_BYTES = 3 * PIECE_BYTES
ALLOWANCE_BYTES = 2**20
"""Tables of slots and areas, and the ledger."""


def taken(host: Host) -> collections.Counter[str]:
    """Kind of memory -> bytes of all that the node's daemon and keeper hold by a descriptor, each counted once."""
    found: dict[int, tuple[str, int]] = {}
    for pid, _ in inject.processes([str(host.runtime)]):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                named, status = re.match(r"/memfd:ckptd-(\w+)", os.readlink(link)), os.stat(link)
            except OSError:
                continue
            if named:
                found[status.st_ino] = named[1], 512 * status.st_blocks
    total = collections.Counter[str]()
    for kind, size in found.values():
        total[kind] += size
    return total


def test_parities_and_slots(hosts: Hosts) -> None:
    """Two sets of parities, m / k of the largest string each, and three slots; however many snapshots there have been,
    and the same for a node that has made all of it anew. Nothing else holds a state."""
    code, k, m = "2+2", 2, 2
    here = hosts.make(k + m)
    crew = Crew.enter(here, redundancy=code, string_bytes=STRING_BYTES)
    largest = max(rank.size for rank in crew.ranks)

    def check() -> None:
        for host in here:
            found = taken(host)
            parities, slots = found.pop("parity"), found.pop("slot")
            assert parities <= 2 * m * -(-largest // k) + 2 * m * PIECE_BYTES + ALLOWANCE_BYTES
            assert slots <= 3 * (largest + ALLOWANCE_BYTES)
            assert sum(found.values()) <= ALLOWANCE_BYTES, found

    for step in range(1, 4):
        crew.snapshot(step)
    check()
    hosts.lose(here[0])
    crew.vanish()
    here = [*hosts.make(1), *here[1:]]
    crew = Crew.enter(here, redundancy=code, resume="must", string_bytes=STRING_BYTES)
    crew.check_restored()
    for step in range(4, 6):
        crew.snapshot(step)
    check()
    crew.vanish()
