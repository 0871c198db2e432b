"""`python -m tests.simulate --seed N` replays a seed with its trace; `--count M` runs M of them from N on, `--seconds
S` as many as fit into that time."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulate.oracle import BrokenPromiseError
from tests.simulate.simulation import TURNS, Simulation


def main(arguments: list[str]) -> int:
    """Exit status 1 for a broken promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulate", description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--turns", type=int, default=TURNS, help="turns with faults")
    parser.add_argument("--count", type=int, default=1, help="so many seeds from this one on, without a trace")
    parser.add_argument("--seconds", type=float, help="as many seeds from this one on as fit, without a trace")
    chosen = parser.parse_args(arguments)
    began, seed = time.perf_counter(), chosen.seed
    alone = chosen.count == 1 and chosen.seconds is None
    while time.perf_counter() - began < chosen.seconds if chosen.seconds else seed < chosen.seed + chosen.count:
        simulation = Simulation(seed, trace=alone)
        broken: BrokenPromiseError | None = None
        try:
            simulation.run(chosen.turns)
        except BrokenPromiseError as violation:
            broken = violation
        for line in simulation.trace or []:
            print(line)
        if broken is not None:
            print(f"seed {seed}: {broken}; replay it with: python -m tests.simulate --seed {seed}")
            if broken.__cause__ is not None and alone:
                raise broken
            return 1
        seed += 1
    seconds, count = time.perf_counter() - began, seed - chosen.seed
    print(f"{count} schedules held, {count / seconds:.1f} a second")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
