"""Is every byte of a checkpoint what it was when it was written? Reads all of it: files, manifest, chunks.

A directory that has no COMMIT is no checkpoint and no problem (it is being written, or its writer was killed); one
whose COMMIT is there and not valid is a problem of the store. A report is data; nothing is printed or repaired.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ckptd.core.errors import CkptdError, FormatError, NotFoundError, VersionError
from ckptd.core.types import SnapshotId
from ckptd.operations.inspect import split_broken, stored_bytes
from ckptd.tiers.store import Store, StoredCheckpoint, is_checkpoint, names, open_checkpoint
from ckptd.tiers.store.location import parse

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One checkpoint: `bytes` it has on disk, and every problem found, one line each."""

    name: str
    bytes: int
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class Report:
    """Verdicts, newest checkpoint first, and the directories that are not committed."""

    path: str
    verdicts: list[Verdict]
    uncommitted: list[str]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not any(verdict.problems for verdict in self.verdicts)


def verify(path: str, *, every: bool = False, progress: Progress | None = None) -> Report:
    """Verifies one checkpoint, or of a store the newest one or `every` one. NotFoundError where there is none."""
    if not is_checkpoint(path):
        return _verify_store(Store.open(path), every, progress)
    location = parse(path)
    try:
        checkpoint = open_checkpoint(path)
    except (FormatError, VersionError) as error:
        return Report(location.uri, [Verdict(location.name, 0, [str(error)])], [])
    return Report(location.uri, [_verify_one(checkpoint, progress)], [])


def _verify_store(store: Store, every: bool, progress: Progress | None) -> Report:
    uncommitted, broken = split_broken(store)
    verdicts = [Verdict(name, 0, [reason]) for name, reason in broken]
    try:
        store.records()
        newest = store.newest()
        chosen = [] if newest is None else [newest]
    except (FormatError, VersionError) as error:
        # Which branch is alive cannot be told, so nothing is the newest; all of it can be verified none the less.
        verdicts.append(Verdict(names.EPOCHS, 0, [str(error)]))
        every = True
    if every:
        chosen = sorted(store.checkpoints(), reverse=True)
    if not chosen and not verdicts:
        raise NotFoundError(f"{store.uri}: no committed checkpoint here")
    return Report(store.uri, [*_verify_each(store, chosen, progress), *verdicts], uncommitted)


def _verify_each(store: Store, chosen: list[SnapshotId], progress: Progress | None) -> list[Verdict]:
    """Verdicts in order; a checkpoint that is pruned meanwhile has none."""
    opened = []
    for identity in chosen:
        try:
            opened.append(store.reader(identity))
        except NotFoundError:
            continue
    total = sum(stored_bytes(checkpoint.commit) for checkpoint in opened)
    verdicts, before = [], 0
    for checkpoint in opened:
        verdicts.append(_verify_one(checkpoint, _shifted(progress, before, total)))
        before += verdicts[-1].bytes
    return verdicts


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one checkpoint as a part of that of all."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def _verify_one(checkpoint: StoredCheckpoint, progress: Progress | None) -> Verdict:
    size = stored_bytes(checkpoint.commit)
    with checkpoint:
        try:
            problems = checkpoint.verify(progress)
        except CkptdError as error:
            problems = [str(error)]
    return Verdict(checkpoint.name, size, problems)
