"""What every command prints with: JSON documents, tables, one-line notes, and numbers as people read them.

Invariants: results go to stdout and notes to stderr; with `--json` stdout holds exactly one JSON document. Text that
comes out of a checkpoint never reaches a terminal with control characters in it. Away from a terminal nothing is
truncated or wrapped. Rich is imported on first use, so that `ckptd --help` stays quick.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_UNBOUNDED_COLUMNS = 1 << 16


def printable(text: object) -> str:
    """`text` with every control character spelled as an escape: what a checkpoint says cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def one_line(message: object) -> str:
    """A message that may list several things on several lines, as one line."""
    return "; ".join(printable(line.strip()) for line in str(message).splitlines() if line.strip())


def format_count(count: int, word: str) -> str:
    """`1 chunk`, `2 chunks`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def format_bytes(count: int | float) -> str:
    """`1.5 GiB`; powers of 1024, as everywhere in ckptd."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def format_seconds(seconds: float) -> str:
    """`42s`, `3m 20s`, `5h 12m`, `3d 4h`; what lies in the future, by a clock that was set back, is `0s`."""
    whole = max(int(seconds), 0)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller}{smaller_unit}"
    return f"{whole}s"


def format_time(seconds: float | None) -> str | None:
    """A UNIX time as ISO 8601 in UTC, for JSON; None stays None."""
    if seconds is None:
        return None
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def format_ratio(raw: int, stored: int) -> str:
    """How much smaller the stored bytes are: `1.39x`; `-` where nothing is stored."""
    return f"{raw / stored:.2f}x" if stored else "-"


def json_number(value: float | None) -> float | str | None:
    """A float as JSON can hold it: `"nan"`, `"inf"` and `"-inf"` are spelled out."""
    return value if value is None or math.isfinite(value) else str(value)


def print_json(document: Any) -> None:
    """The one JSON document of a command."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def say(message: str, style: str | None = None) -> None:
    """One line of a result, on stdout."""
    _console(sys.stdout).print(message, style=style, soft_wrap=True)


def note(message: str, style: str | None = None) -> None:
    """One line beside the result, on stderr."""
    _console(sys.stderr).print(message, style=style, soft_wrap=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
    """Rows under headings on stdout; the columns named in `right` are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        made.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    show(made)


def show(renderable: RenderableType) -> None:
    """Anything rich can draw, on stdout."""
    _console(sys.stdout).print(renderable)


def _console(file: Any) -> Console:
    """A console on `file` as it is now (tests and pipes replace it): no markup, as wide as needed unless a terminal."""
    from rich.console import Console

    width = None if file.isatty() else _UNBOUNDED_COLUMNS
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)
