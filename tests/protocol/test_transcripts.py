"""Whole runs of the protocol, as text. After a change that is meant: `python -m tests.protocol.transcript --write`."""

from __future__ import annotations

import pytest

from tests.protocol.transcript import FOLDER, replay

TRANSCRIPTS = sorted(path.stem for path in FOLDER.glob("*.txt"))


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcript(name: str) -> None:
    """The machine does today what the transcript says."""
    text = (FOLDER / f"{name}.txt").read_text()
    assert replay(text) == text


def test_the_main_runs_are_there() -> None:
    """A transcript that is not found is not tested."""
    assert len(TRANSCRIPTS) >= 17
