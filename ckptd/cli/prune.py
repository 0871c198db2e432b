"""`ckptd prune STORE --keep N`: removes old checkpoints and what killed writers left, while no job uses the store.

The root of a running job prunes for itself, so removal wants `--offline` said in so many words, and is refused while
a daemon of the job runs on this node. Daemons of other nodes cannot be seen from here: that is what the word is for.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd.cli import options, output

if TYPE_CHECKING:
    from ckptd.operations.prune import Selection


def command(
    store: options.Store,
    keep: Annotated[
        int, typer.Option("--keep", metavar="N", min=1, help="How many of the newest checkpoints to keep.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="No job writes to this store now: remove.")] = False,
    json: options.Json = False,
) -> None:
    """Remove all but the newest checkpoints, and leftovers of writers that were killed."""
    from ckptd.operations.prune import prune, select
    from ckptd.tiers.store import Store

    if not (dry_run or offline):
        raise typer.BadParameter(
            "a running job prunes its store itself; say --offline if no job uses it now, or --dry-run to look",
            param_hint="--offline",
        )
    opened = Store.open(store)
    selection = select(opened, keep)
    if not dry_run:
        refuse_running(opened.uri, selection.jobs)
        selection = prune(opened, keep)
    if json:
        output.print_json(_document(opened.uri, selection, removed=not dry_run))
    else:
        _print(selection, "would remove" if dry_run else "removed")


def refuse_running(uri: str, names: set[str]) -> None:
    """ConfigError where a daemon on this node belongs to one of the jobs `names`, or flushes to the store `uri`."""
    from ckptd.core.errors import CkptdError, ConfigError, DaemonError
    from ckptd.daemon.address import addresses
    from ckptd.daemon.client import Control

    for address in addresses():
        name = address.job.name
        try:
            control = Control(address)
        except DaemonError:
            continue  # nobody listens: what is left of a daemon that was killed
        try:
            with contextlib.closing(control):
                found = control.status()
        except CkptdError as error:
            raise ConfigError(
                f"{uri}: cannot tell whether job {name!r} uses this store, its daemon does not answer ({error}); "
                "end it with `ckptd stop`, then prune"
            ) from None
        if name in names or uri in (name, found.get("store")):
            raise ConfigError(
                f"{uri}: job {name!r} uses this store, its daemon runs with pid {found['pid']}; it prunes by itself "
                "(option `keep`), or end it with `ckptd stop` first"
            )


def _document(uri: str, selection: Selection, removed: bool) -> dict[str, Any]:
    return {
        "store": uri,
        "removed": removed,
        "kept": selection.kept,
        "checkpoints": selection.doomed,
        "leftovers": selection.leftovers,
    }


def _print(selection: Selection, verb: str) -> None:
    for name in selection.doomed:
        output.say(f"{verb} checkpoint {output.printable(name)}")
    for name in selection.leftovers:
        output.say(f"{verb} leftover   {output.printable(name)}")
    output.say(
        f"{verb} {output.format_count(len(selection.doomed), 'checkpoint')} and "
        f"{output.format_count(len(selection.leftovers), 'leftover')}; kept: {len(selection.kept)}"
    )
