"""`python -m ckptd.daemon`: how the keeper starts a daemon."""

from __future__ import annotations

import argparse
import sys

from ckptd.daemon.server import run

parser = argparse.ArgumentParser(prog="python -m ckptd.daemon")
parser.add_argument("--job", required=True)
parser.add_argument("--keeper", type=int, default=None)
arguments = parser.parse_args()
sys.exit(run(arguments.job, arguments.keeper))
