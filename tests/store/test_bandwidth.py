"""A flush writes no faster than it is told, gives way to everything else, and can be given up while it waits."""

from __future__ import annotations

import os
import threading

import numpy as np
import psutil
import pytest

from ckptd.core.box import CHUNK_BYTES
from ckptd.core.catalog import Catalog
from ckptd.core.native import crc32c
from ckptd.daemon.flush import workers
from ckptd.daemon.priority import FLUSHING
from ckptd.tiers.store.pipeline import encoded_rows
from ckptd.tiers.throttle import BURST_S, Throttle

CHUNKS, RAW = 40, 50_000
RATE = 100_000
UNTIL_S = 30.0


class Fake(Throttle):
    """Whose clock runs only while it is waited for."""

    def __init__(self, bandwidth: float | None) -> None:
        self.now = 0.0
        super().__init__(bandwidth, clock=lambda: self.now)

    def _wait(self, seconds: float | None) -> None:
        assert seconds is not None
        self.now += seconds


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    """What cannot be compressed."""
    return np.random.default_rng(1).integers(0, 256, (CHUNKS, RAW), np.uint8)


@pytest.fixture(scope="module")
def catalog(data: np.ndarray) -> Catalog:
    return Catalog.build(
        [("noise", "uint8", (CHUNKS, RAW))],
        [0] * CHUNKS,
        np.array([[row, 0] for row in range(CHUNKS)]),
        np.array([[1, RAW]] * CHUNKS),
        file_offset=[row * RAW for row in range(CHUNKS)],
        crc=[crc32c(row) for row in data],
    )


def test_no_more_than_the_rate_passes(data: np.ndarray, catalog: Catalog) -> None:
    """At no time more than rate x time, and the burst, and the chunk that passes now."""

    def view(row: int, buffer: memoryview) -> memoryview:
        return data[row].data

    throttle, written = Fake(RATE), 0
    for row in encoded_rows(catalog, range(CHUNKS), view, 2, lambda: False, throttle):
        written += len(row.stored)
        assert written <= RATE * (throttle.now + BURST_S) + len(row.stored)
    assert written >= CHUNKS * RAW
    assert throttle.now == pytest.approx(written / RATE, rel=0.1)
    assert RAW < CHUNK_BYTES


def test_without_a_limit_nobody_waits(data: np.ndarray, catalog: Catalog) -> None:
    def view(row: int, buffer: memoryview) -> memoryview:
        return data[row].data

    throttle = Fake(None)
    assert len(list(encoded_rows(catalog, range(CHUNKS), view, 2, lambda: False, throttle))) == CHUNKS
    assert throttle.now == 0.0


def test_a_flush_that_waits_can_be_given_up(data: np.ndarray, catalog: Catalog) -> None:
    """At a byte a second it would take weeks; and a limit that is lifted holds nobody any more."""

    def view(row: int, buffer: memoryview) -> memoryview:
        return data[row].data

    for lifted in (False, True):
        throttle, given_up, found = Throttle(1), threading.Event(), []

        def write(throttle: Throttle = throttle, given_up: threading.Event = given_up, found: list = found) -> None:
            found += encoded_rows(catalog, range(CHUNKS), view, 2, given_up.is_set, throttle)

        thread = threading.Thread(target=write)
        thread.start()
        if lifted:
            throttle.limit(None)
        else:
            given_up.set()
            throttle.wake()
        thread.join(UNTIL_S)
        assert not thread.is_alive()
        assert (len(found) == CHUNKS) == lifted


def test_a_flush_gives_way() -> None:
    """All its threads do, and no other thread."""

    def priority() -> tuple[int, tuple[int, int]]:
        thread = threading.get_native_id()
        return os.getpriority(os.PRIO_PROCESS, thread), tuple(psutil.Process(thread).ionice())

    def both() -> list[tuple[int, tuple[int, int]]]:
        found = [priority()]
        inner = threading.Thread(target=lambda: found.append(priority()))
        inner.start()
        inner.join(UNTIL_S)
        return found

    before = priority()
    with workers() as executor:
        found = executor.submit(both).result(UNTIL_S)
    assert found == [(FLUSHING, (psutil.IOPRIO_CLASS_BE, 7))] * 2
    assert priority() == before
