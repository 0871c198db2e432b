"""`ckptd import SRC STORE`: safetensors, a directory of torch.distributed.checkpoint or a file of torch.save, as a
checkpoint. Nothing in them is executed."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptd.cli import options, output
from ckptd.cli.progress import progress_bar
from ckptd.cli.reshard import outcome_document, plan_document, print_outcome, print_plan, read_layout


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A file or directory; what it is, is found out.")],
    target: Annotated[str, typer.Argument(metavar="STORE", help="The store to write to; made if it is not there.")],
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="Top-level name to put it under; '' for names as they are.")
    ] = "model",
    step: Annotated[int, typer.Option("--step", metavar="N", min=0, help="Completed steps that it stands for.")] = 0,
    tensors_only: Annotated[bool, typer.Option("--tensors-only", help="Leave out what is not a tensor.")] = False,
    mesh: options.Mesh = "",
    layout: options.Layout = None,
    memory: options.Memory = "1G",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, with bytes.")] = False,
    json: options.Json = False,
) -> None:
    """Read other people's files into a checkpoint."""
    from ckptd.interop.importing import import_checkpoint, plan_import, read_foreign
    from ckptd.interop.pieces import Files

    wanted, room = read_layout(mesh, layout), options.parse_bytes(memory, "--memory")
    with Files() as files:
        found = read_foreign(source, files, name, objects=not tensors_only)
        if dry_run:
            plan = plan_import(found, wanted, memory=room)
            if json:
                output.print_json({"format": found.format, "objects": len(found.objects)} | plan_document(plan))
            else:
                output.say(f"found       {found.format}, {output.format_count(len(found.objects), 'object')}")
                print_plan(plan)
            return
        with progress_bar("importing") as progress:
            outcome = import_checkpoint(found, target, wanted, step=step, memory=room, progress=progress)
    if json:
        output.print_json(
            {"format": found.format, "objects": len(found.objects)} | outcome_document(outcome),
        )
    else:
        print_outcome(outcome, f"imported {found.format},")
