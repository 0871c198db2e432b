"""Writing one checkpoint in several sittings: a process that is killed is followed by another that goes on.

Owns the journal, a directory `.unfinished-<nonce>` in the store with one small file per finished part, written when all
of that part is durable. Going on keeps the parts that the journal names and that are as they were, and removes
everything else of the attempt: bytes of an unfinished part are never reused. Whoever writes holds a lock on the
journal, where the store is a local directory; elsewhere two that write the same at a time are the user's care.

Only for checkpoints whose parts are the same each time; a job's own checkpoints are written in one sitting.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

import msgspec

from ckptd.core.errors import CkptdError, FormatError, NotFoundError, StoreError
from ckptd.core.types import SnapshotId
from ckptd.format.commit import Part
from ckptd.tiers.store import names
from ckptd.tiers.store.journal import Journal
from ckptd.tiers.store.parts import discard, discard_unfinished, files_of, has_data, has_manifest
from ckptd.tiers.store.store import Store
from ckptd.tiers.store.writer import CheckpointWriter


class ResumableWriter:
    """One sitting; made by `resume`. `finished` are the parts of earlier ones."""

    def __init__(self, store: Store, identity: SnapshotId, job: str) -> None:
        self._store = store
        self._back_end = store.back_end
        self._identity = identity
        self._directory = names.checkpoint(identity)
        self._journal = _journal(store, identity.epoch.nonce)
        self._journal.create()
        self.finished: dict[int, Part] = {}
        self._lock = self._locked()
        try:
            self.finished = self._whole_parts()
            if self.finished:
                self._discard_rest()
            self._writer = store.writer(identity, job, joined=bool(self.finished))
        except BaseException:
            self.close()
            raise

    @property
    def writer(self) -> CheckpointWriter:
        """Writes the parts that are not finished, and commits."""
        return self._writer

    def record(self, part: Part) -> None:
        """Notes that a part, which is durable, need not be written again."""
        self._journal.put(part.writer, msgspec.msgpack.encode(part))
        self.finished[part.writer] = part

    def forget(self) -> None:
        """Removes the journal: the checkpoint is committed, or will not be."""
        self._journal.remove()

    def abandon(self) -> None:
        """Removes everything that was written."""
        self._store.remove(self._identity)
        self.forget()

    def close(self) -> None:
        """Lets others go on; idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _locked(self) -> int:
        """A descriptor that holds the lock; -1 where the store has none."""
        path = os.path.join(self._store.uri, *self._journal.path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return -1
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                os.close(descriptor)
                raise StoreError(f"{path}: another process is writing this checkpoint now; wait for it") from None
        return descriptor

    def _whole_parts(self) -> dict[int, Part]:
        """The parts in the journal whose files are there, of the right length; nothing if there is no checkpoint."""
        found: dict[int, Part] = {}
        for number in self._journal.numbers():
            with contextlib.suppress(msgspec.MsgspecError):
                part = msgspec.msgpack.decode(self._journal.get(number) or b"", type=Part)
                there = has_manifest(self._back_end, self._directory, part)
                if part.writer == number and there and has_data(self._back_end, self._directory, part):
                    found[number] = part
        return found

    def _discard_rest(self) -> None:
        """Removes what is not of a finished part, so that all of it is written anew."""
        kept = {path for part in self.finished.values() for path in files_of(self._directory, part)}
        discard(self._back_end, self._directory, lambda path: path not in kept)
        discard_unfinished(self._back_end, self._directory)


@contextlib.contextmanager
def resume(store: Store, identity: SnapshotId, job: str) -> Iterator[ResumableWriter]:
    """Begins to write a checkpoint, or goes on where a killed process stopped. StoreError if somebody else is at it.

    If the body fails for want of space or the like (StoreError), or is interrupted, what is finished is kept for the
    next time; any other error would come again, and removes everything.
    """
    sitting = ResumableWriter(store, identity, job)
    try:
        yield sitting
        sitting.forget()
    except (StoreError, NotFoundError):
        raise
    except CkptdError:
        with contextlib.suppress(CkptdError):
            sitting.abandon()
        raise
    finally:
        sitting.close()


def find_by_nonce(store: Store, nonce: str) -> tuple[SnapshotId | None, bool]:
    """(the checkpoint whose epoch has this nonce, whether it is committed)."""
    for identity in store.checkpoints():
        if identity.epoch.nonce == nonce:
            return identity, True
    for name, _ in store.broken():
        parsed = names.parse_checkpoint(name)
        if parsed is not None and parsed.epoch.nonce == nonce:
            return parsed, False
    return None, False


def discard_journal(store: Store, nonce: str) -> None:
    """Removes the journal of a checkpoint that is committed; of a process that was killed right after."""
    with contextlib.suppress(NotFoundError, FormatError):
        _journal(store, nonce).remove()


def _journal(store: Store, nonce: str) -> Journal:
    return Journal(store.back_end, (f".unfinished-{nonce}",))
