"""`ckptd daemon --job J`: runs the daemon of a job in the foreground, where a container or Slurm would take along one
that a trainer started."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    job: Annotated[
        str | None, typer.Option("--job", metavar="JOB", help="Name of the job whose snapshots it keeps.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="STORE", help="Instead of --job: the job named after this store.")
    ] = None,
) -> None:
    """Run the daemon of a job in the foreground until the job is done or it is stopped."""
    if (job is None) == (store is None):
        raise typer.BadParameter("name the job by one of --job and --store", param_hint="--job")
    from ckptd.daemon.server import run

    raise typer.Exit(run(job if job is not None else _job_of(str(store))))


def _job_of(store: str) -> str:
    """The name that a job without an explicit one takes from its store."""
    from ckptd.tiers.store import Store

    return Store.open(store, create=True).uri
