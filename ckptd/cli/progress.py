"""A progress bar for whatever takes longer than a second: on stderr, and only if that is a terminal.

Owns nothing but the bar. Work that ends sooner, and work whose stderr is a file, prints nothing.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE_S = 1.0
"""How long work may last before its bar appears."""

Report = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); both may grow."""


class _Bar:
    """Draws itself from the first report that comes after PATIENCE_S."""

    def __init__(self, label: str, clock: Callable[[], float]) -> None:
        self._label = label
        self._clock = clock
        self._started = clock()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def report(self, done: int, total: int) -> None:
        if self._progress is None:
            if self._clock() - self._started < PATIENCE_S:
                return
            self._progress = _new_progress()
            self._task = self._progress.add_task(self._label, total=total)
            self._progress.start()
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _new_progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)


@contextlib.contextmanager
def progress_bar(label: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Report | None]:
    """A report function for the body to call, or None where nobody could see the bar."""
    if not sys.stderr.isatty():
        yield None
        return
    bar = _Bar(label, clock)
    try:
        yield bar.report
    finally:
        bar.close()
