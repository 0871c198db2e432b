"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

STORE_HELP = "A store: the directory or URI that a job checkpoints to."
CHECKPOINT_HELP = "A checkpoint: one step-... directory, or a store, which means its newest checkpoint."

Store = Annotated[str, typer.Argument(metavar="STORE", help=STORE_HELP)]
Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help=CHECKPOINT_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
