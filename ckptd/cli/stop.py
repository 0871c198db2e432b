"""`ckptd stop [JOB]`: ends a job's daemon on this node now and frees its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ckptd.cli import output


def command(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="The job (default: the only one of this node).")
    ] = None,
) -> None:
    """Stop the daemon of a job on this node and free the memory it holds."""
    from ckptd.daemon.client import Control

    with contextlib.closing(Control.connect(job)) as control:
        status = control.status()
        control.stop()
    lost = find_lost(status)
    if lost is not None:
        output.note(f"Note: {lost}")
    output.say(f"stopped job {output.printable(status['job'])} (pid {status['pid']})")


def find_lost(status: Mapping[str, Any]) -> str | None:
    """The snapshot that only existed in the memory that was freed, in words."""
    newest = status.get("newest") or {}
    sealed, durable = newest.get("sealed"), newest.get("durable")
    if sealed is None or (durable is not None and durable >= sealed):
        return None
    held = "nothing" if durable is None else f"step {durable}"
    return f"step {sealed} was only in memory and is gone; durable is {held}"
