"""`ckptd export CHECKPOINT TARGET`: a checkpoint as safetensors, a directory of torch.distributed.checkpoint, or a
file of torch.save."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd.cli import options, output
from ckptd.cli.progress import progress_bar

if TYPE_CHECKING:
    from ckptd.interop.exporting import Exported


class Format(str, enum.Enum):
    """What can be written."""

    SAFETENSORS = "safetensors"
    DCP = "dcp"
    TORCH = "torch"


def command(
    checkpoint: options.Checkpoint,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A new directory; for torch a new file.")],
    kind: Annotated[
        Format, typer.Option("--format", help="safetensors: no pickle. dcp, torch: contain pickle, as torch wants.")
    ] = Format.SAFETENSORS,
    prefix: Annotated[
        str, typer.Option("--prefix", metavar="PREFIX", help="Only what is under it, named without it; '' for all.")
    ] = "model/",
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="Files of at most so much, but for torch.")
    ] = "5G",
    memory: options.Memory = "1G",
    json: options.Json = False,
) -> None:
    """Write a checkpoint, or a part of it, as other people's files."""
    from ckptd.interop.exporting import export
    from ckptd.tiers.store import open_checkpoint

    room, shard_bytes = options.parse_bytes(memory, "--memory"), options.parse_bytes(shard_size, "--shard-size")
    with open_checkpoint(checkpoint) as opened, progress_bar("exporting") as progress:
        done = export(
            opened, target, kind.value, prefix=prefix, shard_bytes=shard_bytes, memory=room, progress=progress
        )
    if json:
        output.print_json(_document(done))
    else:
        _print(done)


def _document(done: Exported) -> dict[str, Any]:
    return {
        "location": done.location,
        "tensors": done.tensors,
        "objects": done.objects,
        "bytes": done.bytes,
        "contains_pickle": done.pickle,
        "left_out": done.left_out,
    }


def _print(done: Exported) -> None:
    from ckptd.interop.exporting import PICKLE_NOTE

    for reason in done.left_out:
        output.note(f"Note: left out {output.one_line(reason)}")
    if done.pickle:
        output.note(f"Note: {output.printable(done.location)} {PICKLE_NOTE}")
    objects = f" and {output.format_count(done.objects, 'object')}" if done.objects else ""
    output.say(
        f"exported {output.format_count(done.tensors, 'tensor')}{objects}, {output.format_bytes(done.bytes)}: "
        f"{output.printable(done.location)}"
    )
