"""One contract for every back end: files on the real and the simulated disk, and objects of several kinds."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from ckptd.core.errors import CorruptionError, FormatError, NotFoundError, StoreError
from ckptd.tiers.store.backend import BackEnd, Entry, for_each
from ckptd.tiers.store.files import read_file
from ckptd.tiers.store.object_store import RANGE_BYTES

DIRECTORY = ("step-00000001.1-00000000000000aa", "data")


@pytest.fixture
def directory(back_end: BackEnd) -> tuple[str, ...]:
    """A directory in a directory."""
    back_end.make_directory(DIRECTORY[:1])
    back_end.make_directory(DIRECTORY)
    return DIRECTORY


@pytest.mark.parametrize("sizes", [[], [0], [1], [4095, 2], [100, 8192, 5], [RANGE_BYTES, 3], [5 * 2**20, 6 * 2**20]])
def test_what_is_written_is_read(back_end: BackEnd, directory: tuple[str, ...], sizes: list[int]) -> None:
    pieces = [os.urandom(size) for size in sizes]
    file = back_end.create((*directory, "file"))
    for piece in pieces:
        file.write(memoryview(piece))
    file.sync()
    file.close()
    file.close()
    back_end.settle(directory)
    assert read_file(back_end, (*directory, "file"), 2**30) == b"".join(pieces)
    assert back_end.list(directory) == [Entry("file", False)]


def test_ranges_are_read_by_many_threads_from_one_file(back_end: BackEnd, directory: tuple[str, ...]) -> None:
    content = os.urandom(3 * RANGE_BYTES + 7)
    back_end.write((*directory, "file"), content)
    file = back_end.open((*directory, "file"))
    assert file.size == len(content)
    places = [(0, len(content)), (1, 5), (RANGE_BYTES - 1, 2), (7, 2 * RANGE_BYTES), (len(content), 0)] * 4

    def read(place: tuple[int, int]) -> bool:
        into = bytearray(place[1])
        file.read_into(place[0], memoryview(into))
        return into == content[place[0] : sum(place)]

    assert all(for_each(back_end, read, places))
    for offset, size in [(len(content) - 1, 2), (len(content) + 1, 1), (5, len(content))]:
        with pytest.raises(CorruptionError, match="truncated"):
            file.read_into(offset, memoryview(bytearray(size)))
    file.close()
    file.close()
    with pytest.raises(FormatError, match="expected at most 4"):
        read_file(back_end, (*directory, "file"), 4)


def test_a_file_is_created_once(back_end: BackEnd, directory: tuple[str, ...]) -> None:
    path = (*directory, "file")
    back_end.write(path, b"one")
    for again in (lambda: back_end.create(path), lambda: back_end.write(path, b"two")):
        with pytest.raises(StoreError, match=r"file: create: .*exists"):
            again()
    assert read_file(back_end, path, 3) == b"one"


def test_a_prepared_file_is_not_there_before_it_is_published(back_end: BackEnd, directory: tuple[str, ...]) -> None:
    path, temporary = (*directory, "COMMIT"), (*directory, "COMMIT.tmp")
    for content in (b"one", b"other"):
        publish = back_end.prepare(path, temporary, content)
        if content == b"one":
            with pytest.raises(NotFoundError):
                back_end.open(path)
        publish()
        back_end.settle(directory)
        assert read_file(back_end, path, 5) == content
        assert back_end.list(directory) == [Entry("COMMIT", False)]


def test_a_file_that_was_given_up_is_not_gone_on_with(back_end: BackEnd, directory: tuple[str, ...]) -> None:
    file = back_end.create((*directory, "file"))
    file.write(b"half")
    file.close()
    for again in (file.sync, lambda: file.write(b"more")):
        with pytest.raises(StoreError, match="given up"):
            again()


@pytest.mark.parametrize(
    "act",
    [
        lambda back_end: back_end.open(("missing",)),
        lambda back_end: back_end.open(("missing", "file")),
        lambda back_end: back_end.list(("missing",)),
    ],
)
def test_what_is_missing_is_named(back_end: BackEnd, act: Callable[[BackEnd], object]) -> None:
    with pytest.raises(NotFoundError, match="missing"):
        act(back_end)


def test_directories_are_listed_and_removed_whole(back_end: BackEnd, directory: tuple[str, ...]) -> None:
    top = directory[:1]
    for path in [(*directory, "one"), (*directory, "two"), (*top, "three")]:
        back_end.write(path, b"x")
    assert sorted(back_end.list(top)) == [Entry("data", True), Entry("three", False)]
    assert back_end.list(()) == [Entry(top[0], True)]
    back_end.discard((*directory, "one"))
    back_end.discard((*directory, "one"))
    assert back_end.list(directory) == [Entry("two", False)]
    back_end.remove_tree(top)
    back_end.remove_tree(top)
    assert back_end.list(()) == []
    back_end.make_directory(("epochs",), exist_ok=True)
    back_end.write(("epochs", "1"), b"x")
    back_end.make_directory(("epochs",), exist_ok=True)
    assert back_end.list(("epochs",)) == [Entry("1", False)]


def test_what_may_be_in_doubt_is_made_sure_of(back_end: BackEnd, directory: tuple[str, ...]) -> None:
    path, temporary = (*directory, "COMMIT"), (*directory, "COMMIT.tmp")
    back_end.prepare(path, temporary, b"one")()
    for _ in range(2):
        back_end.confirm(path, temporary, b"one")
        assert read_file(back_end, path, 3) == b"one"
        assert back_end.list(directory) == [Entry("COMMIT", False)]


def test_modified_is_a_time(back_end: BackEnd, directory: tuple[str, ...]) -> None:
    back_end.write((*directory, "file"), b"x")
    assert back_end.open((*directory, "file")).modified >= 0.0


def test_a_file_appears_under_a_second_name(back_end: BackEnd, directory: tuple[str, ...]) -> None:
    """By a link, or copied where it is; it stays when the first name goes."""
    content, first, second = os.urandom(70_000), (*directory, "first"), (*directory, "second")
    back_end.write(first, content)
    assert back_end.link(first, second, len(content))
    back_end.settle(directory)
    back_end.discard(first)
    assert read_file(back_end, second, 2**20) == content
    assert back_end.list(directory) == [Entry("second", False)]


def test_what_cannot_be_linked_leaves_nothing(back_end: BackEnd, directory: tuple[str, ...]) -> None:
    """One that is gone, one of another length; and a name that is taken keeps what it has."""
    first, second = (*directory, "first"), (*directory, "second")
    assert not back_end.link(first, second, 3)
    back_end.write(first, b"one")
    assert not back_end.link(first, second, 4)
    assert back_end.list(directory) == [Entry("first", False)]
    back_end.write(second, b"other")
    assert not back_end.link(first, second, 3)
    assert read_file(back_end, second, 5) == b"other"
