"""Which branch of a job's history is alive.

Every start of a job writes an EpochRecord: its epoch and the snapshot it restored. Following restore points back from
the highest epoch gives the live lineage; a snapshot that no live epoch descends from is dead, however high its step.
Pure; used for snapshots in memory and checkpoints in a store alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ckptd.core.types import Epoch, SnapshotId


class EpochRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One start of a job: its epoch, and the snapshot it went on from (None: it started from nothing)."""

    epoch: Epoch
    restore_point: SnapshotId | None = None


def live(snapshots: Iterable[SnapshotId], records: Iterable[EpochRecord]) -> list[SnapshotId]:
    """Snapshots on the live lineage, newest first.

    An epoch without a record (a single `ckptd.save`, or a record that was lost) continues the next lower epoch whole.
    """
    steps: dict[Epoch, list[int]] = {}
    for snapshot in snapshots:
        steps.setdefault(snapshot.epoch, []).append(snapshot.step)
    restored = {record.epoch: record.restore_point for record in records}
    epochs = sorted({*steps, *restored}, reverse=True)
    found: list[SnapshotId] = []
    limit: int | None = None
    position = 0
    while position < len(epochs):
        epoch = epochs[position]
        found += [
            SnapshotId(epoch, step)
            for step in sorted(steps.get(epoch, ()), reverse=True)
            if limit is None or step <= limit
        ]
        if epoch not in restored:
            limit = None
            position += 1
            continue
        point = restored[epoch]
        if point is None or point.epoch >= epoch:
            break
        limit = point.step
        position = next((i for i, other in enumerate(epochs) if other <= point.epoch), len(epochs))
        if position < len(epochs) and epochs[position] != point.epoch:
            limit = None
    return found


def newest(
    snapshots: Iterable[SnapshotId], records: Iterable[EpochRecord], step: int | None = None
) -> SnapshotId | None:
    """The newest live snapshot (of exactly `step` where given), or None."""
    return next((s for s in live(snapshots, records) if step is None or s.step == step), None)
