"""The files of a checkpoint's parts: which they are, whether they are there, how they are removed and made durable.

A part is what one writer adds: data files, and the manifest of the chunks in them. What their bytes are is checked by
whoever reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable

from ckptd.core.errors import FormatError, NotFoundError
from ckptd.format.commit import Part
from ckptd.tiers.store import names
from ckptd.tiers.store.backend import BackEnd, Path, for_each
from ckptd.tiers.store.files import read_file, size_of


def data_of(directory: str, part: Part) -> dict[Path, int]:
    """The data files of a part and their lengths."""
    return {names.data_file(directory, part.writer, number): length for number, length in enumerate(part.data)}


def files_of(directory: str, part: Part) -> list[Path]:
    """All files of a part."""
    return [names.manifest_part(directory, part.writer), *data_of(directory, part)]


def has_data(back_end: BackEnd, directory: str, part: Part) -> bool:
    """Whether the data files of a part are there, of the right length."""
    try:
        return all(size_of(back_end, path) == length for path, length in data_of(directory, part).items())
    except (NotFoundError, FormatError):
        return False


def has_manifest(back_end: BackEnd, directory: str, part: Part) -> bool:
    """Whether the manifest of a part is there, to the byte."""
    try:
        manifest = read_file(back_end, names.manifest_part(directory, part.writer), part.size)
    except (NotFoundError, FormatError):
        return False
    return hashlib.sha256(manifest).hexdigest() == part.sha256


def discard(back_end: BackEnd, directory: str, unwanted: Callable[[Path], bool]) -> None:
    """Removes the manifests and data files of a checkpoint that are `unwanted`."""
    for folder in names.folders(directory):
        with contextlib.suppress(NotFoundError):  # an object store has no directory without an object
            paths = [(*folder, entry.name) for entry in back_end.list(folder)]
            for_each(back_end, back_end.discard, [p for p in paths if names.writer_of(p) is not None and unwanted(p)])


def discard_unfinished(back_end: BackEnd, directory: str) -> None:
    """Removes what an earlier attempt to commit has left beside the parts, so that there can be another one."""
    found = {entry.name for entry in back_end.list((directory,))}
    for name in found & {names.OBJECTS, names.COMMIT_TEMPORARY}:
        back_end.discard((directory, name))


def settle(back_end: BackEnd, directory: str) -> None:
    """Makes the names of all manifests and data files durable, as far as this node has made them."""
    for folder in names.folders(directory):
        back_end.settle(folder)
