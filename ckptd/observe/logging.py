"""Logs: the standard library's logging under the name `ckptd`."""

from __future__ import annotations

import logging
import sys


def to_stderr(name: str) -> None:
    """Sends this process's ckptd log, from INFO up, to standard error; `name` says who speaks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}[%(process)d] %(levelname)s %(message)s"))
    logger = logging.getLogger("ckptd")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
