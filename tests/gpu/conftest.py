"""Everything here needs a CUDA device; each test is a node of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpointer.conftest import home as home


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(without)
