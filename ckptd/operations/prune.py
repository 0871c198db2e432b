"""Which checkpoints of a store are to be removed, and removing them together with leftovers of killed writers.

Only for a store that no job writes to: a running job's root owns pruning. Asking whether one runs is the caller's
part. The order of removal (COMMIT first) is the store's.
"""

from __future__ import annotations

import dataclasses

from ckptd.core import lineage
from ckptd.operations.inspect import split_broken
from ckptd.tiers.store import Store, names


@dataclasses.dataclass(frozen=True)
class Selection:
    """Names of checkpoint directories that stay and that go, oldest last in `kept`, oldest first in `doomed`; leftovers
    that go; and the jobs whose checkpoints are in the store."""

    kept: list[str]
    doomed: list[str]
    leftovers: list[str]
    jobs: set[str]


def select(store: Store, keep: int) -> Selection:
    """What `prune` would remove: all but the newest `keep`, where dead branches count as older than any live one."""
    committed = store.checkpoints()
    alive = lineage.live(committed, store.records())
    dead = sorted(set(committed) - set(alive), reverse=True)
    ordered = [names.checkpoint(identity) for identity in (*alive, *dead)]
    return Selection(
        kept=ordered[:keep],
        doomed=ordered[keep:][::-1],
        leftovers=split_broken(store)[0],
        jobs={store.reader(identity).job for identity in committed},
    )


def prune(store: Store, keep: int) -> Selection:
    """Removes all but the newest `keep` (1 or more) checkpoints, then leftovers; says what stayed and what went."""
    before = select(store, keep)
    removed = [names.checkpoint(identity) for identity in store.prune(keep)]
    kept = [name for name in before.kept if name not in removed]
    return Selection(kept, removed, store.clean(), before.jobs)
