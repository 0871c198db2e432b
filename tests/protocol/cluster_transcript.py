"""Transcripts of several nodes. After a change that is meant: `python -m tests.protocol.cluster_transcript --write`.

Each is a run of real machines, told as who says what to whom and what each asks its daemon to do. `E1@4` is a snapshot.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.facts import Entry, Shape
from ckptd.protocol.cluster.member import MemberMachine
from ckptd.protocol.cluster.standing import Standing
from ckptd.protocol.cluster.state import ClusterState
from tests.protocol.cluster import POLICY
from tests.simulate.launch import Launch

FOLDER = Path(__file__).parent / "cluster_transcripts"


class Script:
    """Two nodes or more, whose messages arrive in order; work is done when the script says so."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.lines: list[str] = []
        self.machines: dict[str, MemberMachine] = {}
        self._queue: list[tuple[str, str, m.BetweenDaemons]] = []
        self._launch: Launch | None = None
        self._number = 0

    def say(self, text: str) -> None:
        """For people."""
        self.lines += ["", f"# {text}"]

    def start(self, *arenas: str) -> None:
        """The job starts on these nodes; those that are not here yet have new memory."""
        for arena in arenas:
            self.machines.setdefault(arena, MemberMachine(ClusterState(arena), POLICY))
        self._number += 1
        launch = self._launch = Launch(arenas, (), self.shape, "0" * 16, number=self._number)
        self._ask(launch)
        launch.recorded()
        self.lines.append(f"the record of {shown(launch.epoch)} is written")
        self._ask(launch)

    def does(self, arena: str, event: str, *given: Any) -> None:
        """An event at a node, and all that follows."""
        self.lines.append(f"> {arena}: {' '.join([event, *map(shown, given)])}")
        getattr(self.machines[arena], event)(*given)
        self._carry_out(arena)
        self._settle()

    def _ask(self, launch: Launch) -> None:
        for arena, message in launch.messages():
            assert isinstance(message, m.Prepare | m.Begin)
            self._queue.append(("launch", arena, message))
        self._settle()

    def _settle(self) -> None:
        while self._queue:
            source, target, message = self._queue.pop(0)
            self.lines.append(f"  {source} -> {target}  {shown(message)}")
            if target == "launch":
                assert self._launch is not None
                assert isinstance(message, m.Promise | m.Refuse | m.Begun)
                self._launch.heard(message)
            elif target in self.machines:
                self.machines[target].handle(message, source)
                self._carry_out(target)

    def _carry_out(self, arena: str) -> None:
        for action in self.machines[arena].take():
            if isinstance(action, m.Tell):
                self._queue.append((arena, action.arena, action.message))
            else:
                fields = " ".join(shown(value) for value in vars(action).values())
                self.lines.append(f"    {arena} {type(action).__name__} {fields}")


def shown(found: Any) -> str:
    """A value in few words."""
    match found:
        case Epoch():
            return f"E{found.number}"
        case SnapshotId():
            return f"E{found.epoch.number}@{found.step}"
        case Entry():
            facts = {"sealed": found.sealed, "parity": found.parity}
            return " ".join(
                [shown(found.snapshot), *(f"{k}={'yes' if v else 'no'}" for k, v in facts.items() if v is not None)]
            )
        case Shape():
            return f"{len(found.groups)} group(s), m={found.parity}"
        case tuple():
            return "[" + ", ".join(map(shown, found)) + "]"
        case bytes():
            return "..."
        case msgspec.Struct():
            values = [(f, getattr(found, f)) for f in found.__struct_fields__]
            parts = [f"{name}={shown(item)}" for name, item in values if item not in (None, (), {}, False)]
            return " ".join([type(found).__name__, *parts])
        case _:
            return str(found)


def two_nodes() -> Script:
    """1+1, up to the first protected snapshot."""
    script = Script(Shape(((0, 1),), 1))
    script.say("Two nodes that mirror each other start. Nothing is there to restore.")
    script.start("a", "b")
    script.say("Their ranks train; when both nodes are heard of, the root grants step 2.")
    script.does("b", "stands", Standing(0, 1))
    script.does("a", "stands", Standing(0, 1))
    two = SnapshotId(Epoch(1, "0" * 16), 2)
    script.say("Both capture it. With the second Sealed it is sealed by all, and the root names it to be encoded.")
    script.does("a", "captured", two, 2)
    script.does("b", "captured", two, 2)
    script.say("Each says what its string consists of; who knows that of its whole group can encode.")
    script.does("a", "described", two, b"a")
    script.does("b", "described", two, b"b")
    script.say("With the second Parity it is protected.")
    script.does("b", "encoded", two)
    script.does("a", "encoded", two)
    return script


def a_loss() -> Script:
    """A node is lost and replaced; its string is rebuilt, and protected again."""
    script = two_nodes()
    script.lines.clear()
    script.say(
        "After two_nodes.txt: b is lost with its memory, and the launcher starts the job on a and a new node, c."
    )
    del script.machines["b"]
    script.start("a", "c")
    two = SnapshotId(Epoch(1, "0" * 16), 2)
    script.say("What was b's is rebuilt on c; only then E1@2 is sealed by all again, and c can hold its parity.")
    script.does("c", "rebuilt", two, b"b")
    script.does("c", "encoded", two)
    return script


RUNS: dict[str, Callable[[], Script]] = {"two_nodes": two_nodes, "a_loss": a_loss}


def made(name: str) -> str:
    """A transcript as the machines of today would have it."""
    return "\n".join(RUNS[name]().lines).strip() + "\n"


def main(arguments: list[str]) -> int:
    """Shows what would be written, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args(arguments)
    for name in RUNS:
        if chosen.write:
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / f"{name}.txt").write_text(made(name))
        else:
            print(f"== {name}\n{made(name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
