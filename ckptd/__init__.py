"""ckptd: asynchronous, fault-tolerant checkpointing for PyTorch training jobs.

Public names are resolved on first use (PEP 562), so that the daemon and the reading commands never load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ckptd.core.errors import (
        CkptdError,
        ConfigError,
        CorruptionError,
        DaemonError,
        DeadlineError,
        FormatError,
        MismatchError,
        NotFoundError,
        StoreError,
        UnrecoverableError,
        VersionError,
    )
    from ckptd.core.types import Level
    from ckptd.trainer.api import Checkpoint, load, open, save
    from ckptd.trainer.checkpointer import Checkpointer
    from ckptd.trainer.state_flat import FlatRange, FlatShards, flat_ranges

_HOMES = {
    "ckptd.core.errors": (
        "CkptdError",
        "ConfigError",
        "CorruptionError",
        "DaemonError",
        "DeadlineError",
        "FormatError",
        "MismatchError",
        "NotFoundError",
        "StoreError",
        "UnrecoverableError",
        "VersionError",
    ),
    "ckptd.core.types": ("Level",),
    "ckptd.trainer.api": ("Checkpoint", "load", "open", "save"),
    "ckptd.trainer.checkpointer": ("Checkpointer",),
    "ckptd.trainer.state_flat": ("FlatRange", "FlatShards", "flat_ranges"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "CkptdError",
    "ConfigError",
    "CorruptionError",
    "DaemonError",
    "DeadlineError",
    "FlatRange",
    "FlatShards",
    "FormatError",
    "Level",
    "MismatchError",
    "NotFoundError",
    "StoreError",
    "UnrecoverableError",
    "VersionError",
    "flat_ranges",
    "load",
    "open",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ckptd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
