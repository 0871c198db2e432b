"""The pictures in docs/ are what the code draws now."""

from __future__ import annotations

import runpy
from pathlib import Path

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


def test_pictures_are_of_this_code() -> None:
    drawn = runpy.run_path(str(PICTURES / "boxes.py"))["pictures"]()
    assert drawn == {path.name: path.read_text() for path in PICTURES.glob("*.svg")}


def test_every_picture_is_shown() -> None:
    text = (PICTURES.parent / "resharding.md").read_text()
    for path in PICTURES.glob("*.svg"):
        assert f"(pictures/{path.name})" in text
