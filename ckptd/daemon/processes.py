"""Watching processes end. Liveness is the pidfd: a forked DataLoader worker may hold its parent's socket open after the
parent's death. A process is named by pid and start time, so that a reused pid is another one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path


def identify(pid: int) -> tuple[int, int] | None:
    """(pid, clock ticks from boot to its start); None where the process is gone, or in another pid namespace."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return pid, int(text.rpartition(")")[2].split()[19])


class Watch:
    """Tells `ended(instance)` when the process of a trainer instance has ended."""

    def __init__(self, ended: Callable[[str], None]) -> None:
        self._told = ended
        self._watched: dict[str, int] = {}

    def add(self, instance: str, process: tuple[int, int]) -> bool:
        """Watches a process; False where it has ended already. Idempotent."""
        if instance in self._watched:
            return True
        try:
            descriptor = os.pidfd_open(process[0])
        except ProcessLookupError:
            return False
        if identify(process[0]) != process:
            os.close(descriptor)
            return False
        self._watched[instance] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._ended, instance)
        return True

    def _ended(self, instance: str) -> None:
        descriptor = self._watched.pop(instance)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        self._told(instance)
