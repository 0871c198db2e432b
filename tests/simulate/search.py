"""Many schedules, in several processes; knows nothing of what is in one."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import time
from collections.abc import Iterable

from tests.simulate.oracle import BrokenPromiseError
from tests.simulate.simulation import Simulation

TOGETHER = 20
"""Schedules that a process runs at a time."""


def broken(seed: int) -> str | None:
    """What a schedule says if it breaks a promise."""
    try:
        Simulation(seed).run()
    except BrokenPromiseError as violation:
        return f"seed {seed}: {violation}; replay it with: python -m tests.simulate --seed {seed}"
    return None


def broken_in(seeds: range) -> list[str]:
    """What schedules say that break a promise."""
    return [found for seed in seeds if (found := broken(seed)) is not None]


def search(first: int, count: int | None, seconds: float | None, processes: int) -> int:
    """Schedules from `first` on until there are enough, or the time is over."""
    began, held = time.perf_counter(), 0
    end = None if count is None else first + count
    starts: Iterable[int] = itertools.count(first, TOGETHER) if end is None else range(first, end, TOGETHER)
    chunks = (range(start, min(start + TOGETHER, end or start + TOGETHER)) for start in starts)
    failures: list[str] = []
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver")) as pool:
        running = {pool.submit(broken_in, seeds): len(seeds) for seeds in itertools.islice(chunks, 2 * processes)}
        while running:
            for done in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                held += running.pop(done) - len(done.result())
                failures += done.result()
            if not failures and (seconds is None or time.perf_counter() - began < seconds):
                for seeds in itertools.islice(chunks, 2 * processes - len(running)):
                    running[pool.submit(broken_in, seeds)] = len(seeds)
    took = time.perf_counter() - began
    print("\n".join([*failures, f"{held} schedules held, {held / took:.1f} a second"]))
    return 1 if failures else 0
