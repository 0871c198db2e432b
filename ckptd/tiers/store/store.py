"""A store: a directory of checkpoints and epoch records of a job (docs/format.md, section 1).

Owns which checkpoints exist, which is the newest, and pruning. Invariants: a checkpoint exists if and only if its
COMMIT is valid; the newest live one is never removed by `prune`; a checkpoint whose commit failed in this process is in
doubt: neither counted, nor written again, nor removed. Assumes one process at a time that writes records or prunes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Collection

from ckptd.core import lineage
from ckptd.core.errors import CkptdError, ConfigError, FormatError, NotFoundError, StoreError, VersionError
from ckptd.core.lineage import EpochRecord
from ckptd.core.types import Epoch, SnapshotId
from ckptd.format.commit import MAX_COMMIT_BYTES, MAX_RECORD_BYTES, decode_record, encode_record
from ckptd.tiers.store import names
from ckptd.tiers.store.backend import BackEnd, Entry, Path, for_each
from ckptd.tiers.store.files import FileBackEnd, read_file
from ckptd.tiers.store.location import Location, parse
from ckptd.tiers.store.object_store import open_objects
from ckptd.tiers.store.parts import discard, files_of
from ckptd.tiers.store.posix import open_root
from ckptd.tiers.store.reader import StoredCheckpoint, read_commit
from ckptd.tiers.store.writer import CheckpointWriter

TOKEN_S = 24 * 3600.0
"""Tokens are of use for seconds; one that is so old was left by a process that was killed."""


class Store:
    """Checkpoints in one place."""

    def __init__(self, back_end: BackEnd, uri: str) -> None:
        self.uri = uri
        self.back_end = back_end
        self._in_doubt: set[SnapshotId] = set()
        self._durable: set[SnapshotId] = set()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, uri: str | os.PathLike[str], *, create: bool = False) -> Store:
        """The store at a path or URI. NotFoundError if it does not exist; `create` makes it, with parents."""
        location = parse(uri)
        return cls(_open(location, create), location.uri)

    def probe(self) -> None:
        """Proves that the store can be written and read back; StoreError says why not."""
        nonce = secrets.token_hex(8)
        try:
            self.leave_token(nonce)
        finally:
            self.remove_token(nonce)

    def leave_token(self, nonce: str) -> None:
        """Leaves a small file by which other nodes recognise the same store (`sees_token`); `nonce` is 16 hex digits.
        StoreError where what was written cannot be read back."""
        self.back_end.write(names.token(nonce), nonce.encode())
        if not self.has_token(nonce):
            raise StoreError(f"{self.uri}: a file that was just written cannot be read back")

    def has_token(self, nonce: str) -> bool:
        """Whether a token left anywhere is seen here."""
        try:
            return read_file(self.back_end, names.token(nonce), len(nonce)) == nonce.encode()
        except NotFoundError:
            return False

    def remove_token(self, nonce: str) -> None:
        """Removes a token, if it is there."""
        self.back_end.discard(names.token(nonce))

    def records(self) -> list[EpochRecord]:
        """Epoch records, by rising epoch. A damaged one is an error: without it a dead branch could win."""
        try:
            entries = self.back_end.list((names.EPOCHS,))
        except NotFoundError:
            return []
        epochs = sorted(filter(None, (names.parse_record(entry.name) for entry in entries)))
        return for_each(self.back_end, self._record, epochs)

    def _record(self, epoch: Epoch) -> EpochRecord:
        path = names.record(epoch)
        try:
            record = decode_record(read_file(self.back_end, path, MAX_RECORD_BYTES))
        except (FormatError, VersionError) as error:
            raise type(error)(f"{self.back_end.describe(path)}: {error}") from None
        if record.epoch != epoch:
            raise FormatError(f"{self.back_end.describe(path)}: is the record of epoch {record.epoch}")
        return record

    def write_record(self, record: EpochRecord) -> None:
        """Writes the record of an epoch that begins, durably."""
        record.epoch.check()
        self.back_end.make_directory((names.EPOCHS,), exist_ok=True)
        path, temporary = names.record(record.epoch), names.record_temporary(record.epoch)
        self.back_end.discard(temporary)
        self.back_end.prepare(path, temporary, encode_record(record))()
        self.back_end.settle((names.EPOCHS,))
        self.back_end.settle(())

    def checkpoints(self) -> list[SnapshotId]:
        """Committed checkpoints, by rising epoch and step."""
        return [identity for identity, _, problem in self._directories() if problem is None]

    def broken(self) -> list[tuple[str, str]]:
        """(directory, reason) of checkpoints that are not committed, or not in a way that this build can read."""
        return [(name, problem) for _, name, problem in self._directories() if problem is not None]

    def damaged(self) -> list[tuple[str, str]]:
        """(directory, reason) of checkpoints that have a COMMIT which this build cannot read: damaged, foreign, newer.

        Unlike leftovers without COMMIT, these may be what somebody relies on.
        """
        return [(name, problem) for name, problem in self.broken() if self._has_commit(name)]

    def newest(self, step: int | None = None) -> SnapshotId | None:
        """The newest checkpoint on the live lineage (of exactly `step`), or None."""
        return lineage.newest(self.checkpoints(), self.records(), step)

    def reader(self, identity: SnapshotId) -> StoredCheckpoint:
        """A committed checkpoint; NotFoundError, FormatError, VersionError."""
        return StoredCheckpoint(self.back_end, names.checkpoint(identity))

    def exists(self, identity: SnapshotId) -> bool:
        """Whether a checkpoint is committed, as far as can be seen: enough to read it, not to rely on it."""
        try:
            read_commit(self.back_end, names.checkpoint(identity))
        except (NotFoundError, FormatError):
            return False
        return True

    def committed(self, identity: SnapshotId) -> bool:
        """Whether a checkpoint is durable: committed by this process, or else, since nobody knows whether another one
        saw its last sync succeed, made durable now.

        StoreError if its commit failed in this process; a restart may ask again.
        """
        self._refuse_doubt(identity)
        if not self.exists(identity):
            return False
        if identity not in self._durable:
            self._confirm(identity)
        return True

    def _confirm(self, identity: SnapshotId) -> None:
        path = (names.checkpoint(identity), names.COMMIT)
        try:
            contents = read_file(self.back_end, path, MAX_COMMIT_BYTES)
            self.back_end.confirm(path, (path[0], names.COMMIT_TEMPORARY), contents)
        except CkptdError:
            self._ended(identity, durable=False)
            raise
        self._ended(identity, durable=True)

    def new_name(self, step: int, *, replace: bool) -> SnapshotId:
        """A name for a checkpoint of `step` outside any epoch of a job, which no other writer has: above all epochs
        here. StoreError where the step is committed, unless it is to be `replace`d."""
        existing = self.checkpoints()
        taken = [name for name in existing if name.step == step]
        if taken and not replace:
            raise StoreError(
                f"{self.uri}: {taken[0]} is committed already; give another step=, or overwrite=True to replace it"
            )
        numbers = [name.epoch.number for name in existing] + [record.epoch.number for record in self.records()]
        return SnapshotId(Epoch(max(numbers, default=0) + 1, secrets.token_hex(8)), step)

    def writer(self, identity: SnapshotId, job: str, *, joined: bool = False) -> CheckpointWriter:
        """Begins to write a checkpoint. A leftover of an earlier attempt is removed first. `joined`: the root of the
        epoch did this already, on another node, and will commit; this process adds parts.

        StoreError if the checkpoint is committed: ask `committed` first.
        """
        identity.epoch.check()
        directory = names.checkpoint(identity)
        self._refuse_doubt(identity)
        if not joined:
            if self.exists(identity):
                raise StoreError(f"{self.back_end.describe((directory,))}: is committed; committed bytes never change")
            self._remove(directory)
            for path in ((directory,), *names.folders(directory)):
                self.back_end.make_directory(path)
        return CheckpointWriter(self.back_end, identity, job, lambda durable: self._ended(identity, durable), joined)

    def remove(self, identity: SnapshotId) -> None:
        """Removes a checkpoint, committed or not: first COMMIT, durably, then the rest."""
        self._refuse_doubt(identity)
        self._remove(names.checkpoint(identity))

    def abandon(self, identity: SnapshotId) -> None:
        """Removes what was written of a checkpoint, unless COMMIT was reached: then all stays as it is."""
        self._refuse_doubt(identity)
        with contextlib.suppress(NotFoundError):
            if not self._has_commit(names.checkpoint(identity)):
                self._remove(names.checkpoint(identity))

    def prune(self, keep: int) -> list[SnapshotId]:
        """Removes all but the newest `keep` checkpoints; those of dead branches count as older than any live one."""
        if keep < 1:
            raise ConfigError(f"prune: keep={keep}; at least the newest checkpoint must be kept")
        with self._lock:
            sound = [identity for identity in self.checkpoints() if identity not in self._in_doubt]
        alive = lineage.live(sound, self.records())
        dead = sorted(set(sound) - set(alive), reverse=True)
        removed = list(reversed((alive + dead)[keep:]))
        if removed:
            self.committed((alive + dead)[0])  # nothing goes on the strength of what may be gone tomorrow
        for identity in removed:
            self.remove(identity)
        return removed

    def clean(self, keep: Collection[SnapshotId] = ()) -> list[str]:
        """Removes leftovers: directories without COMMIT, but for those in `keep` (being written), what others have
        beside that which COMMIT names, temporary files, and tokens of a day ago.

        A directory with a COMMIT that is not valid stays: it may be of a newer version, or worth a rescue.
        """
        removed = []
        for identity, name, problem in self._directories():
            if problem is None:
                removed += [] if identity in self._in_doubt else self.sweep(identity)
            elif identity not in keep and not self._has_commit(name):
                self.back_end.remove_tree((name,))
                removed.append(name)
        for path in (*self._temporary_files(), *self._old_tokens()):
            self.back_end.discard(path)
            removed.append("/".join(path))
        return removed

    def sweep(self, identity: SnapshotId) -> list[str]:
        """Removes the lists that nodes have left in a committed checkpoint (`joint`), after all else that its COMMIT
        does not name."""
        directory = names.checkpoint(identity)
        if all(entry.name != names.WRITTEN for entry in self.back_end.list((directory,))):
            return []
        listed = {path for part in read_commit(self.back_end, directory).parts for path in files_of(directory, part)}
        discard(self.back_end, directory, lambda path: path not in listed)
        self.back_end.remove_tree(names.lists(directory))
        return ["/".join(names.lists(directory))]

    def _temporary_files(self) -> list[Path]:
        try:
            entries = self.back_end.list((names.EPOCHS,))
        except NotFoundError:
            return []
        return [
            (names.EPOCHS, name)
            for name, _ in entries
            if name.startswith(".") and name.endswith(".tmp") and names.parse_record(name[1:-4]) is not None
        ]

    def _old_tokens(self) -> list[Path]:
        found: list[Path] = []
        for name, _ in self.back_end.list(()):
            if names.is_token(name):
                with (
                    contextlib.suppress(NotFoundError, FormatError),
                    contextlib.closing(self.back_end.open((name,))) as f,
                ):
                    if 0 < f.modified < time.time() - TOKEN_S:
                        found.append((name,))
        return found

    def _modified(self, path: Path) -> float:
        with contextlib.closing(self.back_end.open(path)) as file:
            return file.modified

    def _directories(self) -> list[tuple[SnapshotId, str, str | None]]:
        """(id, name, why it does not count as committed) of every checkpoint directory."""
        found = [
            (identity, entry)
            for entry in self.back_end.list(())
            if (identity := names.parse_checkpoint(entry.name)) is not None
        ]
        problems = for_each(self.back_end, lambda each: self._problem(each[1]), found)
        return sorted((each[0], each[1].name, problem) for each, problem in zip(found, problems, strict=True))

    def _problem(self, entry: Entry) -> str | None:
        """Why the checkpoint in a directory does not count as committed."""
        try:
            if not entry.is_directory:
                raise FormatError(f"{self.back_end.describe((entry.name,))}: expected a directory")
            read_commit(self.back_end, entry.name)
        except NotFoundError:
            return "no COMMIT: unfinished, or being written or removed"
        except (FormatError, VersionError) as error:
            return str(error)
        return None

    def _has_commit(self, directory: str) -> bool:
        return any(entry.name == names.COMMIT for entry in self.back_end.list((directory,)))

    def _remove(self, directory: str) -> None:
        try:
            if self._has_commit(directory):
                self.back_end.discard((directory, names.COMMIT))
                self.back_end.settle((directory,))
        except NotFoundError:
            return
        self.back_end.remove_tree((directory,))

    def _refuse_doubt(self, identity: SnapshotId) -> None:
        with self._lock:
            if identity in self._in_doubt:
                described = self.back_end.describe((names.checkpoint(identity),))
                raise StoreError(
                    f"{described}: its commit failed in this process and may or may not be on disk; it is left as it "
                    "is. Flush a later step"
                )

    def _ended(self, identity: SnapshotId, durable: bool) -> None:
        """COMMIT is durable, or may or may not be."""
        with self._lock:
            (self._durable if durable else self._in_doubt).add(identity)


def sees_token(place: str | os.PathLike[str], nonce: str) -> bool:
    """Whether the store at a path or URI is there, and is the one in which another node has left this token."""
    try:
        return Store.open(place).has_token(nonce)
    except NotFoundError:
        return False


def not_shared(uri: str, nodes: Collection[str]) -> ConfigError:
    """What is to be raised where nodes do not see a token that was left in the store that rank 0 opened."""
    return ConfigError(
        f"{uri}: on {', '.join(sorted(nodes))} this is not the store that rank 0 opened; give a path or URI that leads "
        "every node to one shared store, or mount it there"
    )


def is_checkpoint(place: str | os.PathLike[str]) -> bool:
    """Whether a path or URI names a checkpoint's own directory (of any name) rather than a store."""
    location = parse(place)
    if not location.name or names.parse_checkpoint(location.name) is not None:
        return bool(location.name)
    try:
        return any(entry.name == names.COMMIT for entry in _open(location).list(()))
    except NotFoundError:
        return False


def open_checkpoint(place: str | os.PathLike[str]) -> StoredCheckpoint:
    """The checkpoint at a path or URI: a checkpoint's own directory (of any name), or the newest of a store."""
    location = parse(place)
    if is_checkpoint(place):
        return StoredCheckpoint(_open(location.parent), location.name)
    store = Store.open(place)
    identity = store.newest()
    if identity is None:
        broken = "; ".join(f"{name}: {reason}" for name, reason in store.broken()[:5])
        raise NotFoundError(f"{location.text}: no committed checkpoint{'; found ' + broken if broken else ' here'}")
    return store.reader(identity)


def _open(location: Location, create: bool = False) -> BackEnd:
    """The back end of a location."""
    if location.scheme:
        return open_objects(location, create)
    return FileBackEnd(open_root(location.text, create))
