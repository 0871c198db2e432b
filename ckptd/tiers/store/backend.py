"""The seam between the store and a place that keeps files: what saving, reading and pruning are built from.

Two back ends: files on a disk (`files`), which are synced and renamed, and objects (`object_store`), which are put
whole. Both pass one contract suite (tests/store/test_back_ends.py). Paths are tuples of names below the store's root,
made from integers by `names`; () is the root. All operations raise NotFoundError for what does not exist, FormatError
for what is of another kind (a link, a device), and StoreError, naming path and reason, for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

Path = tuple[str, ...]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Entry(NamedTuple):
    """A name in a directory, and whether it is a directory itself (a link to one is not)."""

    name: str
    is_directory: bool


class OutputFile(Protocol):
    """A file being written, once, from its beginning."""

    def write(self, data: bytes | memoryview) -> None:
        """Appends."""

    def sync(self) -> None:
        """Makes contents and length durable; nothing may be written after. If it fails it has failed for good: every
        later call raises too."""

    def close(self) -> None:
        """Gives up the file; idempotent, never raises. Promises nothing about the contents, unless they were synced."""


class InputFile(Protocol):
    """A file being read; safe in threads."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def modified(self) -> float:
        """When it was last written, in seconds since 1970, 0 if nobody knows: by a clock that may be wrong by hours."""

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fills `into`; a file that ends before is a CorruptionError."""

    def expect(self, offset: int, size: int) -> None:
        """These bytes will be read soon. Only a hint: returns at once, raises nothing."""

    def close(self) -> None:
        """Gives up the descriptor; idempotent."""


class Readable(Protocol):
    """Files that can be opened by path."""

    def describe(self, path: Path) -> str:
        """The path as a person would write it, for messages."""

    def open(self, path: Path) -> InputFile:
        """A regular file, for reading."""


class BackEnd(Readable, Protocol):
    """A tree of files that are written once."""

    parallel: int
    """How many operations at a time are worth while: 1 for files, more where each waits for a network."""

    def make_directory(self, path: Path, *, exist_ok: bool = False) -> None:
        """A new directory. Where directories are nothing but parts of names it does nothing; elsewhere one that exists
        is a StoreError, unless `exist_ok`."""

    def create(self, path: Path) -> OutputFile:
        """A new file, to be written in large pieces; one that exists is a StoreError. May be seen by others, in part,
        before it is synced."""

    def write(self, path: Path, data: bytes) -> None:
        """A new small file with durable contents; one that exists is a StoreError."""

    def prepare(self, path: Path, temporary: Path, data: bytes) -> Callable[[], None]:
        """What gives a small file its name, with its whole contents from that moment on, replacing one that exists.
        Everything that can fail before is done when this returns, under the name `temporary` where there are late
        names. If what is returned fails, the file may or may not be there."""

    def confirm(self, path: Path, temporary: Path, data: bytes) -> None:
        """Makes durable a small file with these contents that got its name from somebody who may not have seen that it
        will keep it. To sync again what has failed once would prove nothing, so it gets its name anew."""

    def link(self, source: Path, target: Path, length: int) -> bool:
        """Makes a file of a known length, whose contents are durable, appear under a new name as well, without reading
        it here: by a second name, or copied where it is stored. Whether that worked; otherwise nothing is there, and it
        has to be written again."""

    def settle(self, path: Path) -> None:
        """Makes the names in a directory durable: before, its files may be gone after a crash, synced or not. A failure
        is final."""

    def list(self, path: Path) -> list[Entry]:
        """Everything in a directory, in no order."""

    def discard(self, path: Path) -> None:
        """Removes a file, if it is there."""

    def remove_tree(self, path: Path) -> None:
        """Removes a directory with all that is in it, if it is there. What others remove meanwhile is no error."""


def for_each(back_end: BackEnd, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`work(item)` of all items, in order, as many at a time as the back end gains by. Raises the first error."""
    threads = min(back_end.parallel, len(items))
    if threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="ckptd-store") as executor:
        return [*executor.map(work, items)]
