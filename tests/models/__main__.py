"""`python -m tests.models 2+1 --groups 2 --slots 3`: explores one model and prints its states, or a counterexample."""

from __future__ import annotations

import argparse
import time

from tests.models.explore import explore, stuck
from tests.models.protection import MUTATIONS, PROTECTED, Model


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__)
    parser.add_argument("code", help="K+M, the nodes of a group")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--slots", type=int, default=2, help="snapshots that a node has room for (default 2)")
    parser.add_argument("--lazy", type=int, default=0, metavar="COLUMNS", help="free step by step; snapshots at a time")
    parser.add_argument("--hasty", action="store_true", help="give up parity before anything newer is sealed")
    parser.add_argument("--mutation", choices=MUTATIONS, help="a rule to leave out")
    parser.add_argument("--most-states", type=int, default=10**7)
    options = parser.parse_args()
    data, parity = map(int, options.code.split("+"))
    model = Model(
        data,
        parity,
        groups=options.groups,
        slots=options.slots,
        hasty=options.hasty,
        lazy=options.lazy > 0,
        most_columns=options.lazy or Model.most_columns,
        mutation=options.mutation,
    )
    started = time.process_time()
    explored = explore(model.initial(), model.successors, model.broken, most_states=options.most_states)
    end = "all" if explored.complete else "not all"
    print(f"{model}: {len(explored.parents)} states, {end}, {time.process_time() - started:.1f} s of CPU")
    if explored.broken is not None:
        print(f"broken: {explored.broken}")
        return 1
    if explored.complete:
        states = stuck(explored, model.epoch_steps, lambda label: label.endswith(PROTECTED))
        print(f"{len(states)} states from which nothing is protected again without a restart")
        if states:
            print(f"the nearest after: {'; '.join(explored.path(states[0]))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
