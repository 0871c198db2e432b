"""`ckptd show CHECKPOINT`: its header, totals, tensors, and with --objects everything that is not a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd.cli import options, output

if TYPE_CHECKING:
    from rich.tree import Tree

    from ckptd.operations.inspect import Contents, TensorSummary


def command(
    checkpoint: options.Checkpoint,
    tensors: Annotated[
        str | None,
        typer.Option("--tensors", metavar="GLOB", help="Only the tensors whose key matches, such as 'model/*'."),
    ] = None,
    objects: Annotated[
        bool, typer.Option("--objects", help="Also the objects: everything that is not a tensor.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Show what a checkpoint holds."""
    from ckptd.operations.inspect import inspect_checkpoint
    from ckptd.tiers.store import open_checkpoint

    with open_checkpoint(checkpoint) as opened:
        contents = inspect_checkpoint(opened, pattern=tensors, with_values=objects)
    if json:
        output.print_json(_document(contents))
    else:
        _print(contents)


def _document(contents: Contents) -> dict[str, Any]:
    from ckptd.operations.describe import jsonable

    summary, totals = contents.summary, contents.totals
    document: dict[str, Any] = {
        "name": summary.name,
        "job": summary.job,
        "step": summary.id.step,
        "epoch": str(summary.id.epoch),
        "created": output.format_time(summary.created_s),
        "format": contents.format,
        "totals": {
            "tensors": totals.tensors,
            "objects": totals.objects,
            "chunks": totals.chunks,
            "bytes": totals.bytes,
            "stored": totals.stored,
            "writers": totals.writers,
        },
        "tensors": [_tensor_document(tensor) for tensor in contents.tensors],
    }
    if contents.objects is not None:
        document["objects"] = {path: jsonable(value) for path, value in contents.objects.items()}
    return document


def _tensor_document(tensor: TensorSummary) -> dict[str, Any]:
    return {
        "key": tensor.key,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "chunks": tensor.chunks,
        "bytes": tensor.bytes,
        "stored": tensor.stored,
        "ratio": round(tensor.bytes / tensor.stored, 4) if tensor.stored else None,
        "ranks": tensor.ranks,
    }


def _print(contents: Contents) -> None:
    summary, totals = contents.summary, contents.totals
    output.say(f"checkpoint  {output.printable(summary.name)}")
    output.say(f"job         {output.printable(summary.job)}")
    output.say(f"step        {summary.id.step} (epoch {summary.id.epoch})")
    created = output.format_time(summary.created_s)
    output.say(f"created     {created or 'unknown'}, format version {contents.format}")
    counts = (
        (totals.tensors, "tensor"),
        (totals.objects, "object"),
        (totals.chunks, "chunk"),
        (totals.writers, "writer"),
    )
    output.say(f"holds       {', '.join(output.format_count(*count) for count in counts)}")
    output.say(
        f"bytes       {output.format_bytes(totals.bytes)}, stored as {output.format_bytes(totals.stored)} "
        f"({output.format_ratio(totals.bytes, totals.stored)})"
    )
    output.say("")
    output.table(
        ("KEY", "DTYPE", "SHAPE", "CHUNKS", "BYTES", "STORED", "RATIO"),
        [_row(tensor) for tensor in contents.tensors],
        right=("CHUNKS", "BYTES", "STORED", "RATIO"),
    )
    if contents.objects is not None:
        output.say("")
        output.show(_tree(contents.objects))


def _row(tensor: TensorSummary) -> list[object]:
    return [
        tensor.key + (f" (+{len(tensor.ranks)} per rank)" if tensor.ranks else ""),
        tensor.dtype,
        list(tensor.shape),
        tensor.chunks,
        output.format_bytes(tensor.bytes),
        output.format_bytes(tensor.stored),
        output.format_ratio(tensor.bytes, tensor.stored),
    ]


def _tree(objects: dict[str, object]) -> Tree:
    from rich.tree import Tree

    root = Tree("objects")
    for path, value in objects.items():
        _grow(root, path, value)
    return root


def _grow(parent: Tree, name: object, value: object) -> None:
    """Adds a value under `parent`; dictionaries, and sequences that hold containers, branch; others are a leaf."""
    from rich.text import Text

    from ckptd.operations.describe import describe

    label = output.printable(name)
    inner: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(element, (dict, list, tuple)) for element in value):
        inner = enumerate(value)
    if inner and value:
        branch = parent.add(Text(label))
        for key, element in inner:
            _grow(branch, key, element)
    else:
        parent.add(Text(f"{label}: {output.printable(describe(value))}"))
