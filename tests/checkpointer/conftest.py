"""Every test here is a node of its own, and must leave nothing behind on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpointer.home import Home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Fails a test after which a daemon, a keeper or a runtime directory is left."""
    made = Home(tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(1)
    yield made
    try:
        made.assert_nothing_left()
    finally:
        made.kill()
