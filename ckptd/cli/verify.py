"""`ckptd verify PATH`: reads every file and every chunk, and says what is not as it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd.cli import options, output
from ckptd.cli.progress import progress_bar

if TYPE_CHECKING:
    from ckptd.operations.verify import Report


def command(
    path: options.Checkpoint,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of the store, not only the newest.")] = False,
    json: options.Json = False,
) -> None:
    """Verify every file and chunk of a checkpoint."""
    from ckptd.operations.verify import verify

    with progress_bar("verifying") as progress:
        report = verify(path, every=every, progress=progress)
    if json:
        output.print_json(_document(report))
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(1)


def _document(report: Report) -> dict[str, Any]:
    return {
        "path": report.path,
        "ok": report.ok,
        "checkpoints": [
            {"name": verdict.name, "ok": not verdict.problems, "bytes": verdict.bytes, "problems": verdict.problems}
            for verdict in report.verdicts
        ],
        "uncommitted": report.uncommitted,
    }


def _print(report: Report) -> None:
    for verdict in report.verdicts:
        name = output.printable(verdict.name)
        if not verdict.problems:
            output.say(f"ok      {name}  {output.format_bytes(verdict.bytes)}")
        for problem in verdict.problems:
            output.say(f"BROKEN  {name}  {output.one_line(problem)}", style="red")
    for name in report.uncommitted:
        output.say(f"skipped {output.printable(name)}  uncommitted: being written, or left by a writer that was killed")
