"""`ckptd reshard SRC DST`: writes a checkpoint anew, its chunks laid out for a mesh; --dry-run prints the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd.cli import options, output
from ckptd.cli.progress import progress_bar

if TYPE_CHECKING:
    from ckptd.operations.reshard import Outcome, Plan
    from ckptd.plan.layout import Layout


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help=options.CHECKPOINT_HELP)],
    target: Annotated[str, typer.Argument(metavar="DST", help="The store to write to; made if it is not there.")],
    mesh: options.Mesh = "",
    layout: options.Layout = None,
    memory: options.Memory = "1G",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, with bytes.")] = False,
    json: options.Json = False,
) -> None:
    """Write a checkpoint anew, with chunks laid out for another mesh of ranks."""
    from ckptd.operations.reshard import plan_reshard, reshard
    from ckptd.tiers.store import open_checkpoint

    wanted, room = read_layout(mesh, layout), options.parse_bytes(memory, "--memory")
    with open_checkpoint(source) as opened:
        if dry_run:
            plan = plan_reshard(opened, wanted, memory=room)
            if json:
                output.print_json(plan_document(plan))
            else:
                print_plan(plan)
            return
        with progress_bar("resharding") as progress:
            outcome = reshard(opened, target, wanted, memory=room, progress=progress)
    if json:
        output.print_json(outcome_document(outcome))
    else:
        print_outcome(outcome, "resharded")


def read_layout(mesh: str, path: str | None) -> Layout:
    """The layout that two options name; without rules every tensor is whole."""
    from ckptd.core.errors import ConfigError
    from ckptd.plan.layout import Layout, Mesh

    parsed = Mesh.parse(mesh)
    if path is None:
        return Layout(parsed)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"layout {path}: cannot be read: {error}") from None
    return Layout.parse(text, parsed, path)


def plan_document(plan: Plan) -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "mesh": plan.mesh,
        "ranks": plan.ranks,
        "tensors": plan.tensors,
        "source_chunks": plan.source_chunks,
        "chunks": plan.chunks,
        "bytes": plan.bytes,
        "decodes": plan.decodes,
        "most_decodes": plan.most_decodes,
        "rank_bytes": {"least": plan.rank_bytes[0], "most": plan.rank_bytes[1]},
        "parts": [
            {
                "writer": part.writer,
                "stage": None if part.stage is None else list(part.stage),
                "tensors": part.tensors,
                "chunks": part.chunks,
                "bytes": part.bytes,
                "decodes": part.decodes,
            }
            for part in plan.parts
        ],
        "unused_rules": plan.unused,
    }


def print_plan(plan: Plan) -> None:
    """A plan as text: what there is, a row for each part, and rules that do nothing."""
    least, most = (output.format_bytes(count) for count in plan.rank_bytes)
    output.say(f"mesh        {plan.mesh}; a rank loads {least if least == most else f'{least} to {most}'} of tensors")
    output.say(
        f"writes      {output.format_count(plan.tensors, 'tensor')} in {output.format_count(plan.chunks, 'chunk')}, "
        f"{output.format_bytes(plan.bytes)} before compression"
    )
    output.say(
        f"reads       {output.format_count(plan.source_chunks, 'chunk')}, decoded {plan.decodes} times in all, "
        f"none more than {plan.most_decodes} times"
    )
    output.say("")
    output.table(
        ("WRITER", "STAGE", "TENSORS", "CHUNKS", "BYTES", "DECODES"),
        [
            [part.writer, _stage(part.stage), part.tensors, part.chunks, output.format_bytes(part.bytes), part.decodes]
            for part in plan.parts
        ],
        right=("WRITER", "TENSORS", "CHUNKS", "BYTES", "DECODES"),
    )
    note_unused(plan)


def note_unused(plan: Plan) -> None:
    """Rules that matched no tensor: often a misspelt pattern."""
    for rule in plan.unused:
        output.note(f"Note: no tensor matches {output.printable(rule)}")


def outcome_document(outcome: Outcome) -> dict[str, Any]:
    """What was done as JSON."""
    return {
        "checkpoint": outcome.location,
        "step": outcome.id.step,
        "epoch": str(outcome.id.epoch),
        "existed": outcome.existed,
        "parts": len(outcome.plan.parts),
        "reused_parts": outcome.reused,
        "plan": plan_document(outcome.plan),
    }


def print_outcome(outcome: Outcome, verb: str) -> None:
    """What was done as text."""
    note_unused(outcome.plan)
    where = output.printable(outcome.location)
    if outcome.existed:
        output.say(f"already there, whole: {where}")
        return
    reused = f", {outcome.reused} of an earlier run" if outcome.reused else ""
    output.say(
        f"{verb} {output.format_bytes(outcome.plan.bytes)} in {output.format_count(outcome.plan.chunks, 'chunk')}, "
        f"{output.format_count(len(outcome.plan.parts), 'part')}{reused}: {where}"
    )


def _stage(stage: tuple[int, ...] | None) -> str:
    """Coordinates on the mesh dimensions that have stages."""
    if stage is None:
        return "carried over"
    return ",".join(str(held) for held in stage if held >= 0) or "all"
