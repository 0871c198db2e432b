"""The daemon's own state in memory: the newest whole one is found, whatever became of the last write."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ckptd.core.errors import DaemonError
from ckptd.tiers.arena import Ledger


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger.create()
    yield made
    os.close(made.descriptor)


def test_the_newest_state_is_read(ledger: Ledger) -> None:
    assert ledger.read() is None
    for payload in (b"first", b"second", b"", b"third" * 1000):
        ledger.write(payload)
        assert Ledger(ledger.descriptor).read() == payload


@pytest.mark.parametrize("torn_at", [0, 8, 20, 24, 30])
def test_a_torn_write_leaves_the_state_before(ledger: Ledger, torn_at: int) -> None:
    ledger.write(b"before" * 10)
    half = Ledger.HALF * (ledger._sequence % 2)
    ledger.write(b"after" * 10)
    other = Ledger.HALF - half
    byte = os.pread(ledger.descriptor, 1, other + torn_at)
    os.pwrite(ledger.descriptor, bytes([byte[0] ^ 1]), other + torn_at)
    fresh = Ledger(ledger.descriptor)
    assert fresh.read() == b"before" * 10
    fresh.write(b"again")
    assert Ledger(ledger.descriptor).read() == b"again"


def test_a_state_that_has_no_room_does_not_overwrite_the_other(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "HALF", 4096)
    ledger.write(b"small")
    with pytest.raises(DaemonError, match="4100 bytes"):
        ledger.write(b"x" * 4100)
    assert Ledger(ledger.descriptor).read() == b"small"
