"""Arguments that StorageWriter and StorageReader have in common, checked where they are given."""

from __future__ import annotations

import os

from ckptd.core.errors import ConfigError

MAX_THREADS = 8


def checked_threads(count: int | None) -> int:
    """The number of threads to use, one per core if not given; raises ConfigError."""
    if count is None:
        return min(MAX_THREADS, len(os.sched_getaffinity(0)))
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"thread_count={count!r}; expected 1 or more, or None for one per core")
    return count


def checked_step(step: int | None) -> int | None:
    """`step`, if it can be one; raises ConfigError."""
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**18):
        raise ConfigError(f"step={step!r}; expected a number of completed steps, 0 or more")
    return step
