"""The `ckptd` program: registers every command and turns errors into exit statuses.

Exit status: 0 all is well; 1 something is wrong, said in one line on stderr (`diff`: a difference; `verify`: a
problem; `status`: a job that needs a look); 2 the command line is wrong; 130 interrupted. A reader that closes the
pipe is not an error to talk about.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import ckptd
from ckptd.cli import daemon, diff, export, flush, import_, ls, output, prune, reshard, show, status, stop, verify
from ckptd.core.errors import CkptdError


class Commands(TyperGroup):
    """The group of all commands; a CkptdError of any of them becomes one line on stderr and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CkptdError as error:
            output.note(f"Error: {output.one_line(error)}")
            raise typer.Exit(1) from None


app = typer.Typer(
    name="ckptd",
    cls=Commands,
    help="Asynchronous, fault-tolerant checkpoints for PyTorch training jobs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (ls, show, verify, diff, reshard, export, import_, prune, status, flush, stop, daemon):
    app.command(_module.__name__.rpartition(".")[2].rstrip("_"))(_module.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ckptd {ckptd.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Asynchronous, fault-tolerant checkpoints for PyTorch training jobs."""


def main() -> None:
    """The entry point of the `ckptd` script. Always leaves by SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a key in letters that the terminal lacks is no failure
    status_code: int | str | None = 0
    try:
        app(prog_name="ckptd")
    except SystemExit as leaving:
        status_code = leaving.code
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has enough. What is still buffered must go somewhere, or the interpreter would
        # complain about the pipe once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status_code = 1
    sys.exit(status_code)


if __name__ == "__main__":
    main()
