"""`ckptd ls STORE`: the checkpoints of a store, newest first, and the directories that are none."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import typer

from ckptd.cli import options, output

if TYPE_CHECKING:
    from ckptd.operations.inspect import CheckpointSummary, StoreSummary


def command(store: options.Store, json: options.Json = False) -> None:
    """List the checkpoints of a store, newest first."""
    from ckptd.operations.inspect import summarize_store
    from ckptd.tiers.store import Store

    summary = summarize_store(Store.open(store))
    if json:
        output.print_json(_document(summary))
    else:
        _print(summary)
    if summary.broken:
        raise typer.Exit(1)


def _document(summary: StoreSummary) -> dict[str, Any]:
    return {
        "store": summary.uri,
        "checkpoints": [_checkpoint_document(checkpoint) for checkpoint in summary.checkpoints],
        "uncommitted": summary.uncommitted,
        "broken": [{"name": name, "reason": reason} for name, reason in summary.broken],
    }


def _checkpoint_document(checkpoint: CheckpointSummary) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "step": checkpoint.id.step,
        "epoch": str(checkpoint.id.epoch),
        "job": checkpoint.job,
        "live": checkpoint.live,
        "created": output.format_time(checkpoint.created_s),
        "bytes": checkpoint.bytes,
        "chunks": checkpoint.chunks,
        "writers": checkpoint.writers,
    }


def _print(summary: StoreSummary) -> None:
    if not summary.checkpoints:
        output.say(f"no checkpoints in {output.printable(summary.uri)}")
    else:
        now = time.time()
        output.table(
            ("STEP", "EPOCH", "AGE", "SIZE", "WRITERS", "LINEAGE", "NAME"),
            [_row(checkpoint, now) for checkpoint in summary.checkpoints],
            right=("STEP", "EPOCH", "AGE", "SIZE", "WRITERS"),
        )
    for name in summary.uncommitted:
        output.say(f"uncommitted {output.printable(name)}: being written, or left by a writer that was killed")
    for name, reason in summary.broken:
        output.say(f"broken {output.printable(name)}: {output.one_line(reason)}", style="red")


def _row(checkpoint: CheckpointSummary, now: float) -> list[object]:
    return [
        checkpoint.id.step,
        checkpoint.id.epoch.number,
        "-" if checkpoint.created_s is None else output.format_seconds(now - checkpoint.created_s),
        output.format_bytes(checkpoint.bytes),
        checkpoint.writers,
        {True: "live", False: "dead", None: "unknown"}[checkpoint.live],
        checkpoint.name,
    ]
