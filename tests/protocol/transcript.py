"""Golden transcripts: what the machine is told, and what it does. `python -m tests.protocol.transcript --write`.

A transcript is a text file. `#` lines are for people, `>` lines are played, all other lines are what the machine did:

    > a: Hello rank=0           a message from the connection named a; fields that are not given have usual values
    > a gone                    its connection is lost; `a dead`: its process has ended as well
    > recorded                  the epoch record is written; `recorded not: TEXT`: it cannot be
    > written                   the files of the flush are written; `committed`: its COMMIT is; `flush fails: TEXT`
    > tick 10                   ten seconds pass
    > daemon restarts           killed; the next one reads what it left
    > slots                     prints what is in the slots
    > play NAME                 the `>` lines of another transcript, without output
    > policy field=value ...    the options of the next launch

`E1` is an epoch, `E1@3` a snapshot. Instances of processes are named as the connection and the epoch.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

import msgspec

from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol import actions
from ckptd.protocol import messages as m
from ckptd.protocol.cluster import messages as cluster
from ckptd.protocol.cluster.epoch import Choice, beginning
from ckptd.protocol.cluster.facts import Shape
from ckptd.protocol.cluster.standing import Flush
from ckptd.protocol.cluster.state import ClusterState
from ckptd.protocol.node import NodeMachine
from ckptd.protocol.state import NodeState, recover

FOLDER = Path(__file__).parent / "transcripts"
POLICY = {
    "store": "/store",
    "snapshot_steps": 1,
    "flush_steps": None,
    "flush_s": None,
    "keep": 3,
    "overhead_budget": 0.01,
    "memory_bytes": None,
    "linger_s": 100.0,
}


def epoch(number: int) -> Epoch:
    """E1, E2 ..."""
    return Epoch(number, f"{number:016x}")


class Script:
    """A machine, its connections by name, and a way to say what it did in words."""

    def __init__(self, **policy: Any) -> None:
        self.machine = NodeMachine(NodeState("job", ClusterState("n")), 0.0)
        self.now_s = 0.0
        self.names: dict[str, int] = {}
        self.instances: dict[str, str] = {}
        self.policy = {**POLICY, **policy}
        self.usual: dict[str, Any] = {"epoch": epoch(1), "world": 1, "restore_point": None}
        self.flush: Flush | None = None
        self.record: actions.WriteRecord | None = None
        self.room = 10**6
        self.connections = 0

    def play(self, lines: str) -> list[str]:
        """Plays the `>` lines of a text; returns what the machine did."""
        return [word for line in lines.splitlines() if line.strip().startswith(">") for word in self.line(line)]

    def line(self, line: str) -> list[str]:
        """One `>` line."""
        words = line.strip().removeprefix(">").strip()
        head, _, rest = words.partition(" ")
        if head == "play":
            self.play((FOLDER / f"{rest}.txt").read_text())
            return []
        if head == "policy":
            self.policy |= fields(rest)
            return []
        if head == "slots":
            return self._slots()
        if head == "room":
            self.room = int(rest)
            return []
        if head.endswith(":"):
            self._message(head[:-1], rest)
        else:
            self._event(head, rest)
        return self._did()

    def _message(self, name: str, text: str) -> None:
        if name not in self.names:
            self.connections += 1
            self.names[name] = self.connections
        kind, _, rest = text.partition(" ")
        given = fields(rest)
        made = self._usual(name, getattr(m, kind), given)
        message = m.decode(m.encode(made), "to")
        process = (self.names[name], 1) if kind == "Hello" and given.get("seen", True) else None
        self.machine.handle(self.names[name], message, self.now_s, process=process, available_bytes=self.room)

    def _usual(self, name: str, kind: type[m.Message], given: dict[str, Any]) -> m.Message:
        known = msgspec.structs.fields(kind)
        if kind in (m.Prepare, m.Begin, m.Hello):
            self.usual |= {k: v for k, v in given.items() if k in self.usual}
        usual = {
            **self.usual,
            "protocol": m.PROTOCOL,
            "job": "job",
            "policy": m.Policy(**self.policy),
            "instance": f"{name}{self.usual['epoch'].number}",
            "step_s": 1.0,
        }
        usual["ranks"] = list(range(self.usual["world"]))
        if kind is m.Begin:
            usual["begin"] = self._begin(self.usual["epoch"], self.usual["restore_point"])
        if kind is m.Hello:
            self.instances[name] = given.get("instance", usual["instance"])
        if kind is m.Captured:
            given.setdefault("step", given["grant"])
        if kind is m.Layout:
            given.setdefault("generation", self.machine.state.generation)
        if kind is m.Pieces:
            given.setdefault("generation", self.machine.state.generation)
        values = {**usual, **given}
        return kind(**{field.name: values[field.name] for field in known if field.name in values})

    def _begin(self, begun: Epoch, name: SnapshotId | None) -> cluster.Begin:
        """From `name` in memory if it is held there, else in the store."""
        held = [h.held() for h in self.machine.state.cluster.holdings if h.name == name and h.data]
        point = name if not held or held[0] is None else held[0].snapshot
        found = {"n": held[0]} if held and held[0] is not None else {}
        chosen = Choice(point, 0 if name is None else name.step, found, 0, point if found else None)
        return beginning(begun, chosen, ["n"], (), Shape(((0,),), 0), self.usual["world"])

    def _event(self, head: str, rest: str) -> None:
        machine, now = self.machine, self.now_s
        what, _, text = rest.partition(": ")
        match head, what:
            case "tick", _:
                self.now_s += float(rest)
                machine.tick(self.now_s)
            case "recorded", _:
                assert self.record is not None
                machine.recorded(self.record.peer, text or None, now)
            case "written", _:
                assert self.flush is not None
                machine.job.written(self.flush.number)
            case "committed", _:
                assert self.flush is not None
                machine.job.committed(self.flush.number)
            case "flush", "fails":
                assert self.flush is not None
                machine.job.flush_failed(self.flush.number, text)
            case "daemon", "restarts":
                state = msgspec.msgpack.decode(msgspec.msgpack.encode(machine.state), type=NodeState)
                recover(state, [slot.slot for slot in state.table.slots if slot.ready])
                self.machine, self.names = NodeMachine(state, now), {}
            case name, "gone":
                machine.gone(self.names.pop(name), now)
            case name, "dead":
                machine.dead(self.instances[name], now)
                if name in self.names:
                    machine.gone(self.names.pop(name), now)
            case _:
                raise ValueError(f"> {head} {rest}")

    def _did(self) -> list[str]:
        return [f"    {self._words(action)}" for action in self.machine.take()]

    def _words(self, action: actions.Action) -> str:
        names = {number: name for name, number in self.names.items()}
        match action:
            case actions.Send(peer=peer, message=message):
                beside = {"slots": action.slots, "readable": action.readable}
                with_fds = "".join(f" + {kind} {shown(list(found))}" for kind, found in beside.items() if found)
                with_fds += " + pieces" if action.pieces else ""
                return f"{names.get(peer, peer)} < {shown(message)}{with_fds}"
            case actions.Disconnect(peer=peer):
                self.names = {name: number for name, number in self.names.items() if number != peer}
                return f"disconnects {names.get(peer, peer)}"
            case actions.WriteRecord():
                self.record = action
                return f"writes the record of {shown(action.record.epoch)} from {shown(action.record.restore_point)}"
            case cluster.Write(flush=flush):
                self.flush = flush
                return f"writes {shown(SnapshotId(flush.snapshot.epoch, flush.step))} to {flush.store}"
            case cluster.Commit(flush=flush):
                return f"commits {shown(SnapshotId(flush.snapshot.epoch, flush.step))} to {flush.store}"
            case cluster.Free():
                return f"frees {shown(action.snapshot)}"
            case actions.Drop():
                return f"drops slot {action.slot}"
            case actions.Exit():
                return f"exits: {action.reason}"

    def _slots(self) -> list[str]:
        table = self.machine.state.table
        held = {number: shown(s.snapshot) for s in table.sealed for number in s.slots.values()}
        for granted in table.granted:
            for rank, number in granted.slots.items():
                if not granted.dead or rank in granted.silent:
                    held[number] = "quarantined" if granted.dead else f"granted {granted.grant}"
        words = [
            f"{s.slot} of rank {s.rank} {held.get(s.slot, 'free' if s.ready else 'in the making')}" for s in table.slots
        ]
        return [f"    slots: {'; '.join(words) or 'none'}"]


def fields(text: str) -> dict[str, Any]:
    """`a=1 b='x' c=E1@3` as a mapping."""
    return {name: value(word) for name, _, word in (part.partition("=") for part in text.split())}


def value(word: str) -> Any:
    """A literal, an epoch or a snapshot."""
    if word[:1] == "E" and word[1:2].isdigit():
        number, _, step = word[1:].partition("@")
        return SnapshotId(epoch(int(number)), int(step)) if step else epoch(int(number))
    return ast.literal_eval(word)


def shown(found: Any) -> str:
    """A value in few words."""
    match found:
        case Epoch():
            return f"E{found.number}"
        case SnapshotId():
            return f"{shown(found.epoch)}@{found.step}"
        case list():
            return "[" + ", ".join(shown(item) for item in found) + "]"
        case m.SlotInfo():
            return str(found.slot)
        case m.Report():
            return "Report"
        case str():
            return repr(str(found))
        case msgspec.Struct():
            every = [(f, getattr(found, f.name)) for f in msgspec.structs.fields(found)]
            parts = [(f.name, item) for f, item in every if item or f.default is not False]
            return " ".join([type(found).__name__, *(f"{name}={shown(item)}" for name, item in parts)])
        case _:
            return repr(found)


def replay(text: str) -> str:
    """The transcript as the machine of today would have it."""
    script, lines = Script(), []
    for line in text.splitlines():
        if line.startswith(("#", ">")) or not line.strip():
            lines.append(line)
        if line.startswith(">"):
            lines += script.line(line)
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Shows what would change, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args(arguments)
    for path in sorted(FOLDER.glob("*.txt")):
        made = replay(path.read_text())
        if chosen.write:
            path.write_text(made)
        else:
            print(f"== {path.stem}\n{made}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
