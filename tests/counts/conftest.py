"""The node of tests/checkpointer."""

from tests.checkpointer.conftest import home

__all__ = ["home"]
