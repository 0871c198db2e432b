"""Memory is counted once, also where only a descriptor holds it: that is how a daemon holds snapshots."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.memory import marked, occupied

SIZE = 32 * 2**20
NOISE = 8 * 2**20


@pytest.fixture
def memory_file() -> Iterator[int]:
    descriptor = os.memfd_create("ckptd-test")
    os.posix_fallocate(descriptor, 0, SIZE)
    yield descriptor
    os.close(descriptor)


def test_a_memory_file_counts_though_nobody_maps_it(memory_file: int) -> None:
    with_it = occupied([os.getpid()])
    os.ftruncate(memory_file, 0)
    assert with_it - occupied([os.getpid()]) == pytest.approx(SIZE, abs=NOISE)


def test_a_mapped_memory_file_counts_once(memory_file: int) -> None:
    before = occupied([os.getpid()])
    with mmap.mmap(memory_file, SIZE) as mapping:
        mapping.write(b"\1" * SIZE)
        assert occupied([os.getpid()]) == pytest.approx(before, abs=NOISE)


def test_a_file_that_two_processes_hold_counts_once(memory_file: int) -> None:
    command = [sys.executable, "-c", "print(flush=True); input()"]
    child = subprocess.Popen(command, pass_fds=[memory_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    alone = occupied([os.getpid()])
    both = occupied([os.getpid(), child.pid])
    child.communicate(b"\n", timeout=10)
    assert both - alone < SIZE


def test_processes_are_found_by_their_mark() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        env={**os.environ, "CKPTD_TEST_MARK": "here"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    assert marked("CKPTD_TEST_MARK", "here") == [child.pid]
    child.communicate(b"\n", timeout=10)
    assert marked("CKPTD_TEST_MARK", "here") == []


def test_a_process_that_has_gone_counts_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert occupied([child.pid]) == 0
