"""`python -m tests.simulate --seed N` replays a seed with its trace; `--count M` runs M of them from N on, `--seconds
S` as many as fit into that time, `--processes P` side by side. `--members M` measures the traffic of a quiet job."""

from __future__ import annotations

import argparse
import sys

from tests.simulate.quiet import Quiet
from tests.simulate.search import search
from tests.simulate.simulation import Simulation

PROTECTIONS = 3
"""Snapshots that a quiet job protects."""


def replay(seed: int) -> int:
    """One schedule, with its trace."""
    simulation = Simulation(seed, trace=True)
    try:
        simulation.run()
    finally:
        print("\n".join(simulation.trace or []))
    return 0


def measure(members: int) -> int:
    """What the busiest member of a job without faults sends and receives."""
    peak = Quiet(members).run(PROTECTIONS)
    print(
        f"{members} members, {peak.ticks} ticks for {PROTECTIONS} protected snapshots; the most of a member in a tick: "
        f"sent {peak.sent.messages} messages, {peak.sent.size} bytes, "
        f"received {peak.received.messages} messages, {peak.received.size} bytes"
    )
    return 0


def main(arguments: list[str]) -> int:
    """Exit status 1 for a broken promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulate", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="so many seeds from this one on, without a trace")
    parser.add_argument("--seconds", type=float, help="as many seeds from this one on as fit, without a trace")
    parser.add_argument("--processes", type=int, default=1, help="how many run side by side (default 1)")
    parser.add_argument("--members", type=int, help="members of a job without faults, in groups of four")
    chosen = parser.parse_args(arguments)
    if chosen.members is not None:
        if chosen.members < 4 or chosen.members % 4:
            parser.error(f"--members {chosen.members}: expected a multiple of 4, the members of a group")
        return measure(chosen.members)
    if chosen.count is None and chosen.seconds is None:
        return replay(chosen.seed)
    return search(chosen.seed, chosen.count, chosen.seconds, chosen.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
