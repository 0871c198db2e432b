"""The in-memory twin of a disk: keeps what was synced, and loses any legal part of what was not.

A crash may keep or lose, independently of each other and of their order: every unsynced change of a directory (a name
made, removed, or renamed; one rename is one change), every piece of unsynced contents of a file, and its length
without its contents. That is what POSIX allows, and more than most file systems do. A sync that fails loses what it
was to make durable for ever, however often it is repeated, as Linux does. Several nodes may share the disk, as on NFS;
a node's sync makes durable what that node did.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator

from ckptd.core.errors import CkptdError, CorruptionError, FormatError, NotFoundError, StoreError
from ckptd.tiers.store.backend import Entry, Path

PIECES = 3
"""Unsynced contents of a file are kept or lost in so many pieces."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """A change or sync about to be made, by a node."""

    kind: str
    path: Path
    node: int = 0


class File:
    """An inode: contents as processes see them, and how much of them is durable."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.durable = bytes(content)
        self.lost_for_good = False

    def pieces(self) -> list[tuple[int, int]]:
        """Ranges that a crash keeps or loses; the first is (length, length), the length alone."""
        start, end = len(self.durable), len(self.content)
        if start == end:
            return []
        bounds = sorted({start + (end - start) * i // PIECES for i in range(PIECES + 1)})
        return [(end, end), *itertools.pairwise(bounds)]

    def after_crash(self, kept: list[tuple[int, int]]) -> File:
        content = bytearray(self.durable)
        for start, end in kept:
            content.extend(bytes(max(end - len(content), 0)))
            content[start:end] = self.content[start:end]
        return File(bytes(content))


@dataclasses.dataclass(eq=False)
class Change:
    """What one operation of one node does to the names of a directory; None removes."""

    node: int
    names: tuple[tuple[str, File | Directory | None], ...]
    lost_for_good: bool = False

    def apply(self, entries: dict[str, File | Directory]) -> None:
        for name, inode in self.names:
            if inode is None:
                entries.pop(name, None)
            else:
                entries[name] = inode


class Directory:
    """An inode: names as processes see them, durable names, and the changes between."""

    def __init__(self) -> None:
        self.entries: dict[str, File | Directory] = {}
        self.durable: dict[str, File | Directory] = {}
        self.pending: list[Change] = []

    def change(self, node: int, *names: tuple[str, File | Directory | None]) -> None:
        self.pending.append(Change(node, names))
        self.pending[-1].apply(self.entries)

    def sync(self, node: int) -> None:
        """What was lost for good before does not come back over what is durable now."""
        left: list[Change] = []
        for change in self.pending:
            if change.node == node and not change.lost_for_good:
                change.apply(self.durable)
                settled = {name for name, _ in change.names}
                left = [c for c in left if not (c.lost_for_good and settled.issuperset(name for name, _ in c.names))]
            else:
                left.append(change)
        self.pending = left


class SimulatedDisk:
    """See `ckptd.tiers.store.disk.Disk`.

    `before(operation)` is called before each change; False leaves the operation out, and an error it raises is
    raised (a sync that fails so has lost its data). `after(operation)` is called after each.
    """

    def __init__(self, root: Directory | None = None) -> None:
        self.root = root or Directory()
        self.node = 0
        self.before: Callable[[Operation], bool] = lambda operation: True
        self.after: Callable[[Operation], None] = lambda operation: None

    def on_node(self, node: int) -> SimulatedDisk:
        """The same disk, with the same hooks, as another node sees it."""
        other = copy.copy(self)
        other.node = node
        return other

    def describe(self, path: Path) -> str:
        return "/simulated/" + "/".join(path)

    def create(self, path: Path, *, large: bool = False) -> SimulatedOutput:
        file = File()

        def create() -> None:
            directory = self.directory(path[:-1])
            if path[-1] in directory.entries:
                raise StoreError(f"{self.describe(path)}: create: File exists (EEXIST)")
            directory.change(self.node, (path[-1], file))

        self._do("create", path, create)
        return SimulatedOutput(self, path, file)

    def open(self, path: Path) -> SimulatedInput:
        return SimulatedInput(self.describe(path), self.file(path))

    def rename(self, source: Path, target: Path) -> None:
        self._do(
            "rename",
            target,
            lambda: self.directory(target[:-1]).change(self.node, (source[-1], None), (target[-1], self.file(source))),
        )

    def link(self, source: Path, target: Path) -> None:
        def link() -> None:
            directory, file = self.directory(target[:-1]), self.file(source)
            if target[-1] in directory.entries:
                raise StoreError(f"{self.describe(target)}: link: File exists (EEXIST)")
            directory.change(self.node, (target[-1], file))

        self._do("link", target, link)

    def sync_directory(self, path: Path) -> None:
        directory = self.directory(path)
        try:
            self._do("sync_directory", path, lambda: directory.sync(self.node))
        except CkptdError:
            for change in directory.pending:
                change.lost_for_good |= change.node == self.node
            raise

    def list_directory(self, path: Path) -> list[Entry]:
        return [Entry(name, isinstance(node, Directory)) for name, node in self.directory(path).entries.items()]

    def make_directory(self, path: Path) -> None:
        def make() -> None:
            parent = self.directory(path[:-1])
            if path[-1] in parent.entries:
                raise StoreError(f"{self.describe(path)}: create directory: File exists (EEXIST)")
            parent.change(self.node, (path[-1], Directory()))

        self._do("make_directory", path, make)

    def unlink(self, path: Path) -> None:
        self._do("unlink", path, lambda: self._unlink(path))

    def remove_directory(self, path: Path) -> None:
        def remove() -> None:
            if self.directory(path).entries:
                raise StoreError(f"{self.describe(path)}: remove directory: Directory not empty (ENOTEMPTY)")
            self.directory(path[:-1]).change(self.node, (path[-1], None))

        self._do("remove_directory", path, remove)

    def _unlink(self, path: Path) -> None:
        self.file(path)
        self.directory(path[:-1]).change(self.node, (path[-1], None))

    def _do(self, kind: str, path: Path, act: Callable[[], None]) -> None:
        operation = Operation(kind, path, self.node)
        if self.before(operation):
            act()
        self.after(operation)

    def _node(self, path: Path) -> File | Directory:
        node: File | Directory = self.root
        for name in path:
            if not isinstance(node, Directory):
                raise FormatError(f"{self.describe(path)}: Not a directory (ENOTDIR)")
            if name not in node.entries:
                raise NotFoundError(f"{self.describe(path)}: No such file or directory (ENOENT)")
            node = node.entries[name]
        return node

    def directory(self, path: Path) -> Directory:
        node = self._node(path)
        if not isinstance(node, Directory):
            raise FormatError(f"{self.describe(path)}: Not a directory (ENOTDIR)")
        return node

    def file(self, path: Path) -> File:
        node = self._node(path)
        if not isinstance(node, File):
            raise FormatError(f"{self.describe(path)}: expected a regular file")
        return node

    def fingerprint(self) -> str:
        """Equal for equal trees, as processes see them."""
        digest = hashlib.sha256()

        def add(path: Path, node: File | Directory) -> None:
            digest.update(repr((path, type(node).__name__, getattr(node, "content", b""))).encode())
            if isinstance(node, Directory):
                for name in sorted(node.entries):
                    add((*path, name), node.entries[name])

        add((), self.root)
        return digest.hexdigest()

    def crashes(self, seed: int = 0, thorough: bool = True) -> Iterator[SimulatedDisk]:
        """What may be found after power is lost now."""
        choices = list(self._choices(self.root, set()))
        for kept in _subsets(len(choices), random.Random(seed), thorough):
            yield SimulatedDisk(_survivor(self.root, {choices[i] for i in kept}))

    def _choices(self, directory: Directory, seen: set[int]) -> Iterator[tuple[int, int]]:
        """(inode, number) of everything that may be kept or lost."""
        seen.add(id(directory))
        yield from ((id(directory), i) for i in range(len(directory.pending)))
        nodes = list(directory.durable.values())
        nodes += [inode for change in directory.pending for _, inode in change.names if inode is not None]
        for node in nodes:
            if id(node) in seen:
                continue
            if isinstance(node, Directory):
                yield from self._choices(node, seen)
            else:
                seen.add(id(node))
                yield from ((id(node), i) for i in range(len(node.pieces())))


def _survivor(directory: Directory, kept: set[tuple[int, int]]) -> Directory:
    entries = dict(directory.durable)
    for i, change in enumerate(directory.pending):
        if (id(directory), i) in kept:
            change.apply(entries)
    result = Directory()
    for name, node in entries.items():
        if isinstance(node, Directory):
            result.entries[name] = _survivor(node, kept)
        else:
            pieces = node.pieces()
            result.entries[name] = node.after_crash([p for i, p in enumerate(pieces) if (id(node), i) in kept])
    result.durable = dict(result.entries)
    return result


def _subsets(count: int, generator: random.Random, thorough: bool) -> Iterator[tuple[int, ...]]:
    """All subsets of few things; of many, those that keep or lose at most two (one), and some at random."""
    everything = range(count)
    if count <= (6 if thorough else 3):
        for size in range(count + 1):
            yield from itertools.combinations(everything, size)
        return
    for size in range(3 if thorough else 2):
        for chosen in itertools.combinations(everything, size):
            yield chosen
            yield tuple(i for i in everything if i not in chosen)
    for _ in range(48 if thorough else 4):
        yield tuple(i for i in everything if generator.random() < 0.5)


class SimulatedOutput:
    """See `OutputFile`."""

    def __init__(self, disk: SimulatedDisk, path: Path, file: File) -> None:
        self._disk = disk
        self._path = path
        self._file = file
        self._failed = False

    def write(self, data: bytes | memoryview) -> None:
        if len(data):
            self._attempt("write", lambda: self._file.content.extend(data))

    def sync(self) -> None:
        def sync() -> None:
            if not self._file.lost_for_good:
                self._file.durable = bytes(self._file.content)

        try:
            self._attempt("sync", sync)
        except CkptdError:
            self._file.lost_for_good = True
            raise

    def close(self) -> None:
        self._failed = True

    def _attempt(self, kind: str, act: Callable[[], None]) -> None:
        if self._failed:
            raise StoreError(f"{self._disk.describe(self._path)}: {kind}: given up")
        try:
            self._disk._do(kind, self._path, act)
        except BaseException:
            self._failed = True
            raise


class SimulatedInput:
    """See `InputFile`."""

    def __init__(self, described: str, file: File) -> None:
        self._described = described
        self._content = bytes(file.content)
        self.size = len(self._content)
        self.modified = 0.0

    def expect(self, offset: int, size: int) -> None:
        """There is no disk to wait for."""

    def read_into(self, offset: int, into: memoryview) -> None:
        view = into.cast("B")
        found = self._content[offset : offset + len(view)]
        if len(found) != len(view):
            raise CorruptionError(f"{self._described}: ends at {self.size}; it was truncated")
        view[:] = found

    def close(self) -> None:
        pass
