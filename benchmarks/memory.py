"""Memory that a set of processes occupies together, each page counted once, and the CPU time they use.

Private and file pages by PSS (/proc/PID/smaps). Memory files (memfd) count by what is allocated to them, whether or not
anybody has them mapped: a daemon may hold gigabytes through a descriptor alone, which no PSS shows.
"""

from __future__ import annotations

import os
import re
import threading

import psutil

_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+)\s*(.*)")


def marked(name: str, value: str) -> list[int]:
    """Process ids of everything alive with this variable in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                found.append(process.pid)
        except psutil.Error:
            continue  # gone, or another user's
    return found


def occupied(pids: list[int]) -> int:
    """Bytes that these processes occupy together; those that have gone count nothing."""
    files: dict[int, int] = {}
    for pid in pids:
        files.update(_memory_files(pid))
    return sum(files.values()) + sum(_proportional(pid, files) for pid in pids)


def _memory_files(pid: int) -> dict[int, int]:
    """inode -> allocated bytes of the memory files a process holds open."""
    found: dict[int, int] = {}
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return found
    for descriptor in descriptors:
        path = f"/proc/{pid}/fd/{descriptor}"
        try:
            if os.readlink(path).startswith("/memfd:"):
                status = os.stat(path)
                found[status.st_ino] = status.st_blocks * 512
        except OSError:
            continue
    return found


def _proportional(pid: int, counted: dict[int, int]) -> int:
    """PSS of a process without its mappings of memory files already counted."""
    total, skip = 0, False
    try:
        with open(f"/proc/{pid}/smaps") as smaps:
            for line in smaps:
                if line.startswith("Pss:"):
                    total += 0 if skip else int(line.split()[1]) * 1024
                elif (match := _MAPPING.match(line)) is not None:
                    skip = match[2].startswith("/memfd:") and int(match[1]) in counted
    except OSError:
        return 0
    return total


def _cpu_s(pid: int) -> tuple[tuple[int, float], float] | None:
    """((process id, when it started), CPU seconds of all its threads); None if it has gone."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return (pid, process.create_time()), times.user + times.system
    except psutil.Error:
        return None


class Sampler:
    """Follows the memory and CPU time of marked processes in a thread, seldom enough not to disturb them."""

    def __init__(self, name: str, value: str, period_s: float = 0.5) -> None:
        self._name, self._value, self._period_s = name, value, period_s
        self._peak = 0
        self._cpu_s: dict[tuple[int, float], float] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self._sample()

    def _sample(self) -> None:
        pids = marked(self._name, self._value)
        now, used = occupied(pids), dict(filter(None, map(_cpu_s, pids)))
        with self._lock:
            self._peak = max(self._peak, now)
            self._cpu_s |= used

    def take(self) -> tuple[int, float]:
        """(peak in bytes since the last call, at least what is occupied now; CPU seconds since the beginning, of those
        that have gone too, up to the last sample of them)."""
        self._sample()
        with self._lock:
            peak, self._peak = self._peak, 0
            return peak, sum(self._cpu_s.values())

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
