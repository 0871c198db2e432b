"""Runs of several nodes, as text."""

from __future__ import annotations

import pytest

from tests.protocol.cluster_transcript import FOLDER, RUNS, made


@pytest.mark.parametrize("name", sorted(RUNS))
def test_transcript(name: str) -> None:
    """The machines do today what the transcript says."""
    assert made(name) == (FOLDER / f"{name}.txt").read_text()


def test_every_transcript_is_compared() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(RUNS)
