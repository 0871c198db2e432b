"""`python -m tests.simulate --seed N` replays a seed with its trace; `--count M` runs M of them from N on, `--seconds
S` as many as fit into that time, `--processes P` side by side."""

from __future__ import annotations

import argparse
import sys

from tests.simulate.search import search
from tests.simulate.simulation import Simulation


def replay(seed: int) -> int:
    """One schedule, with its trace."""
    simulation = Simulation(seed, trace=True)
    try:
        simulation.run()
    finally:
        print("\n".join(simulation.trace or []))
    return 0


def main(arguments: list[str]) -> int:
    """Exit status 1 for a broken promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulate", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="so many seeds from this one on, without a trace")
    parser.add_argument("--seconds", type=float, help="as many seeds from this one on as fit, without a trace")
    parser.add_argument("--processes", type=int, default=1, help="how many run side by side (default 1)")
    chosen = parser.parse_args(arguments)
    if chosen.count is None and chosen.seconds is None:
        return replay(chosen.seed)
    return search(chosen.seed, chosen.count, chosen.seconds, chosen.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
