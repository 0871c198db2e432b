"""`ckptd flush --job J`: makes the newest sealed snapshot of a job durable; prints its step."""

from __future__ import annotations

import contextlib
import os
from typing import Annotated

import typer

from ckptd.cli import output
from ckptd.core.errors import NotFoundError


def command(
    job: Annotated[
        str | None, typer.Option("--job", metavar="JOB", help="The job (default: the only one of this node).")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="PATH", help="Another store than the job's own: a rescue when that one fails."),
    ] = None,
) -> None:
    """Write the newest sealed snapshot of a job to its store, and print its step."""
    from ckptd.daemon.client import Control

    with contextlib.closing(Control.connect(job)) as control:
        step = control.flush(None if to is None else absolute(to))
    if step is None:
        raise NotFoundError("the job has no sealed snapshot yet; nothing was written")
    output.say(str(step))


def absolute(store: str) -> str:
    """A store as the daemon, whose working directory is not ours, must be told of it."""
    return store if "://" in store else os.path.abspath(store)
