"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

STORE_HELP = "A store: the directory or URI that a job checkpoints to."
CHECKPOINT_HELP = "A checkpoint: one step-... directory, or a store, which means its newest checkpoint."

Store = Annotated[str, typer.Argument(metavar="STORE", help=STORE_HELP)]
Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help=CHECKPOINT_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

Mesh = Annotated[
    str, typer.Option("--mesh", metavar="NAME=SIZE,...", help="The ranks to lay out for, such as dp=2,tp=4,pp=2.")
]
Layout = Annotated[
    str | None, typer.Option("--layout", metavar="FILE", help="Rules (TOML) of which rank holds what; else all of it.")
]
Memory = Annotated[str, typer.Option("--memory", metavar="SIZE", help="How much memory to use, from 320M up.")]


def parse_bytes(text: str, option: str) -> int:
    """Bytes that an option names."""
    from ckptd.core.config import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
