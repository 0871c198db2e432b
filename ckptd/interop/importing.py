"""Foreign files as a checkpoint: which format they are of, what is in them, and writing it into a store.

The bytes go the way of `operations.reshard`: bounded memory, chunks laid out as asked, going on after a kill. Nothing
in the files is executed; no torch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

from ckptd.core.errors import FormatError, NotFoundError
from ckptd.core.types import join_key
from ckptd.interop import dcp_files, safetensors, torch_files
from ckptd.interop.pickles import TensorView
from ckptd.interop.pieces import Files, Piece, origin_of_pieces
from ckptd.interop.trees import split
from ckptd.operations.recut import DEFAULT_MEMORY, Room
from ckptd.operations.reshard import Origin, Outcome, Plan, Progress, Recutting, write_checkpoint
from ckptd.plan.layout import Layout
from ckptd.tiers.store import Store

SAFETENSORS, DCP, TORCH = "safetensors", "dcp", "torch"


class Imported(NamedTuple):
    """What foreign files hold: their format, tensors as an origin of chunks, and objects, encoded, by path."""

    format: str
    origin: Origin
    objects: dict[str, bytes]


def format_of(path: str) -> str:
    """safetensors, dcp or torch; FormatError for what is none of them."""
    if not os.path.lexists(path):
        raise NotFoundError(f"{path}: no such file or directory")
    if dcp_files.is_dcp(path):
        return DCP
    if safetensors.is_safetensors(path):
        return SAFETENSORS
    if torch_files.is_torch_file(path):
        return TORCH
    raise FormatError(
        f"{path}: expected a .safetensors file, an index of such or a directory with either; a directory of "
        "torch.distributed.checkpoint (with .metadata); or a file of torch.save (in its zip format)"
    )


def read_foreign(path: str, files: Files, name: str = "model", *, objects: bool = True) -> Imported:
    """What is at `path`, under the top-level name `name` (empty: names as they are)."""
    kind = format_of(path)
    made: dict[str, bytes] = {}
    if kind == SAFETENSORS:
        root = (name,) if name else ()
        pieces = [
            piece._replace(key=join_key(*root, key)) for key, piece in sorted(safetensors.read(path, files).items())
        ]
    elif kind == DCP:
        tree, spelled_bytes = dcp_files.read(path, files, objects=objects)
        taken = split(tree, name, dcp_files.is_tensor, path, spelled_bytes)
        made = taken.objects
        pieces = [
            piece for key in sorted(taken.tensors) for piece in dcp_files.pieces_of(key, taken.tensors[key], files)
        ]
    else:
        pieces, made = _torch_pieces(path, files, name)
    if not objects:
        made = {}
    return Imported(kind, origin_of_pieces(pieces, files, path), made)


def _torch_pieces(path: str, files: Files, name: str) -> tuple[list[Piece], dict[str, bytes]]:
    archive, number = torch_files.read(path, files)
    taken = split(archive.value, name, lambda leaf: isinstance(leaf, TensorView), path, archive.pickle_bytes)
    piece: Callable[[TensorView, str], Piece] = functools.partial(
        torch_files.piece_of, archive=archive, file=number, what=path
    )
    return [piece(taken.tensors[key], key) for key in sorted(taken.tensors)], taken.objects


def plan_import(found: Imported, layout: Layout, *, memory: int = DEFAULT_MEMORY) -> Plan:
    """What `import_checkpoint` would do."""
    return Recutting(found.origin, layout, Room.of(memory)).plan()


def import_checkpoint(
    found: Imported,
    target: str,
    layout: Layout,
    *,
    step: int = 0,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Outcome:
    """Writes what was read as the checkpoint of `step` of the store `target`. Its job is the store's own name."""
    recutting = Recutting(found.origin, layout, Room.of(memory))
    job = Store.open(target, create=True).uri
    return write_checkpoint(recutting, target, step, job, found.objects, progress=progress)
