"""A pyarrow file system whose n-th change goes wrong in one of the ways in which object stores do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pyarrow.fs

from ckptd.tiers.store.filesystems import ObjectSystem
from ckptd.tiers.store.object_store import ObjectBackEnd

REFUSED = "refused"  # an error, and nothing was done
ANSWER_LOST = "answer lost"  # done, and an error none the less
CUT_SHORT = "cut short"  # half of it was done, and no error
KILLED = "killed before"  # the process is gone, nothing was done
KILLED_HALF = "killed in the middle"  # gone, half of it was done
KILLED_AFTER = "killed after"  # gone, all of it was done
WAYS = [REFUSED, ANSWER_LOST, CUT_SHORT, KILLED, KILLED_HALF, KILLED_AFTER]


class GoneError(BaseException):
    """This process does not exist any more."""


class FlakySystem:
    """Passes on what does not change anything. Half of an upload is a short object, half of a removal fewer objects."""

    def __init__(self, system: pyarrow.fs.FileSystem, failing: int = -1, way: str = "") -> None:
        self.system = system
        self.changes = 0
        self.failed = False
        self._failing = failing
        self._way = way
        self._dead = False

    def get_file_info(self, what: Any) -> Any:
        self._live()
        return self.system.get_file_info(what)

    def open_input_file(self, path: str) -> Any:
        self._live()
        return self.system.open_input_file(path)

    def create_dir(self, path: str, recursive: bool) -> None:
        def make() -> None:
            self.system.create_dir(path, recursive=recursive)

        self.change(make, make)

    def delete_file(self, path: str) -> None:
        self.change(lambda: self.system.delete_file(path), lambda: None)

    def delete_dir(self, path: str) -> None:
        def half() -> None:
            found = self.system.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
            files = [info.path for info in found if info.type is pyarrow.fs.FileType.File]
            for file in files[: len(files) // 2]:
                self.system.delete_file(file)

        self.change(lambda: self.system.delete_dir(path), half)

    def open_output_stream(self, path: str, compression: None) -> FlakyStream:
        self._live()
        return FlakyStream(self, path)

    def put(self, path: str, content: bytes) -> None:
        with contextlib.closing(self.system.open_output_stream(path, compression=None)) as stream:
            stream.write(content)

    def change(self, whole: Callable[[], None], half: Callable[[], None]) -> None:
        self._live()
        way = self._way if self.changes == self._failing else None
        self.changes += 1
        self.failed |= way is not None
        self._dead = way in (KILLED, KILLED_HALF, KILLED_AFTER)
        if way in (CUT_SHORT, KILLED_HALF):
            half()
        elif way not in (REFUSED, KILLED):
            whole()
        self._live()
        if way in (REFUSED, ANSWER_LOST):
            raise OSError(f"InternalError: {way}")

    def _live(self) -> None:
        if self._dead:
            raise GoneError


class FlakyStream:
    """An upload; published when it is closed, also when that is not meant, as pyarrow's are."""

    def __init__(self, system: FlakySystem, path: str) -> None:
        self._system = system
        self._path = path
        self._content = b""
        self._closed = False

    def write(self, data: bytes | memoryview) -> None:
        def write(content: bytes) -> None:
            self._content += content

        self._system.change(lambda: write(bytes(data)), lambda: write(bytes(data[: len(data) // 2])))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            half = self._content[: len(self._content) // 2]
            put = self._system.put
            self._system.change(lambda: put(self._path, self._content), lambda: put(self._path, half))


def flaky_back_end(root: str, failing: int = -1, way: str = "") -> tuple[ObjectBackEnd, FlakySystem]:
    """Objects below a directory, behind a FlakySystem."""
    system = FlakySystem(pyarrow.fs.LocalFileSystem(), failing, way)
    return ObjectBackEnd(ObjectSystem(system, root), root), system
