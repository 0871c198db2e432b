"""A job on several nodes, with everything that can go wrong, from one seed.

The real MemberMachines and Launches; network, memory and clock are simulated in one thread. At each turn one of the
things that can happen next is drawn: a message arrives, a step ends, an encoding completes, a daemon or a node dies.
After the last fault the job must protect again; then as many nodes as promised are lost at once, and it must restore.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import plan_groups
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.epoch import Launch
from ckptd.protocol.cluster.facts import Shape
from tests.simulate.node import Node, Task
from tests.simulate.oracle import BrokenPromiseError, Oracle, Store

TURNS = 500
FINAL_TURNS = 16_000
Event = Callable[[], None]
LAYOUTS = ((1, "none"), (2, "1+1"), (3, "2+1"), (3, "1+2"), (4, "2+2"), (4, "1+1"), (5, "auto"), (6, "2+1"))


class Start:
    """A start of the job: its launch, and how far it has come (`stage`: asking, recording, beginning, running)."""

    def __init__(self, number: int, launch: Launch, stored_choice: bool) -> None:
        self.number, self.launch = number, launch
        self.name = f"launch {number}"
        self.stage = "asking"
        self.ended = False
        self.stored_choice = stored_choice


class Simulation:
    """See the module docstring."""

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.trace: list[str] | None = [] if trace else None
        self.count, self.redundancy = self.random.choice(LAYOUTS)
        self.slots = self.random.choice((2, 3, 4))
        self.fan_out = self.random.choice((1, 2, 16))
        self.danger = self.random.choice((0.01, 0.02, 0.05))
        self.loss = self.random.choice((0.0, 0.05, 0.2))
        self.elastic = self.random.random() < 0.25
        """Whether the job comes back on more or fewer nodes."""
        self.faults = True
        self.nodes: dict[str, Node] = {}
        self.store = Store()
        self.oracle = Oracle(self.nodes, self.store)
        self.starts: list[Start] = []
        self.network: list[tuple[str, str, bytes]] = []
        self.cut: set[tuple[str, str]] = set()
        self.slow: set[str] = set()
        self._names = 0

    # --- what happens

    def run(self, turns: int) -> None:
        """`turns` with faults, then on to protected snapshots and a last restart. Raises BrokenPromiseError."""
        try:
            for _ in range(turns):
                self.turn()
            self._heal()
            self._protects_again()
            self._last_losses()
        except BrokenPromiseError:
            raise
        except Exception as error:
            raise BrokenPromiseError(f"{type(error).__name__}: {error}") from error

    def turn(self) -> None:
        """One event."""
        fault = self.faults and self.random.random() < self.danger
        events = list(self._fault_events() if fault else self._events())
        if not events:
            return
        weight = self.random.random() * sum(event[0] for event in events)
        for chance, name, event in events:  # noqa: B007
            weight -= chance
            if weight <= 0:
                break
        self.say(name)
        event()
        self.oracle.check()

    def say(self, text: str) -> None:
        """For people."""
        if self.trace is not None:
            self.trace.append(text)

    def _events(self) -> Iterator[tuple[float, str, Event]]:
        if self.network:
            yield 1.0 + len(self.network), "message", self._deliver
        for node in self.nodes.values():
            if not node.alive or node.stopped:
                continue
            pace = 0.1 if node.arena in self.slow else 1.0
            if node.machine is None:
                yield 1, f"{node.arena}: daemon starts", node.start
                continue
            for task in node.tasks:
                yield pace, f"{node.arena}: {task}", lambda n=node, t=task: self._work(n, t)
            if node.trainer is not None:
                for snapshot in node.trainer.copying:
                    yield pace, f"{node.arena}: copied {snapshot.step}", lambda n=node, s=snapshot: n.copied(s)
                if self._may_step(node):
                    yield pace, f"{node.arena}: step {node.trainer.step + 1}", node.step
            yield 0.1, f"{node.arena}: repeats", lambda n=node: n.event(lambda machine: machine.repeat())
            for holding in node.machine.state.holdings:
                yield 0.002, f"{node.arena}: deadline", lambda n=node, s=holding.snapshot: self._deadline(n, s)
            yield 0.02, f"{node.arena}: scrubs", lambda n=node: n.event(lambda machine: machine.scrub())
        for start in self.starts:
            if not start.ended and start.stage != "running":
                yield 2, f"{start.name}: {start.stage}", lambda s=start: self._goes_on(s)
        if all(start.ended for start in self.starts):
            yield 1, "the job starts", self._start

    def _fault_events(self) -> Iterator[tuple[float, str, Event]]:
        pick = self.random.choice
        alive = [node for node in self.nodes.values() if node.alive]
        running = [node for node in alive if node.machine is not None]
        if alive:
            node = pick(alive)
            yield 1, f"{node.arena} is lost", lambda: self._lose(node)
            yield 1, f"{node.arena} stops or goes on", lambda: setattr(node, "stopped", not node.stopped)
            yield 0.7, f"{node.arena} is cut off", lambda: self._cut_off(node)
            yield 0.7, "all links are back", self.cut.clear
            yield 0.5, f"{node.arena} is slow", lambda: self.slow.symmetric_difference_update({node.arena})
            yield 1, "the job is killed", self._kill_job
            if len(self.starts) < 60:
                yield 0.3, "a second launch", self._start
            yield 0.7, f"{node.arena} is damaged", lambda: self._damage(node)
        if running:
            node = pick(running)
            yield 2, f"{node.arena}: daemon dies", node.kill
            yield 1, f"{node.arena}: daemon is doomed", lambda: setattr(node, "budget", self.random.randrange(4))
            yield 1, f"{node.arena}: flush", lambda: node.event(lambda machine: machine.want_flush())
            if node.state.holdings:
                snapshot = pick(node.state.holdings).snapshot
                yield 0.5, f"{node.arena}: no parity", lambda: node.event(lambda x: x.give_up_parity(snapshot))
                yield 0.5, f"{node.arena}: too late", lambda: node.event(lambda x: x.expire(snapshot))
            if node.trainer is not None and node.trainer.copying:
                snapshot = pick(list(node.trainer.copying))
                yield 1, f"{node.arena}: mutated", lambda: node.copied(snapshot, missed=True)

    # --- the network

    def send(self, source: str, target: str, message: m.BetweenDaemons) -> None:
        """A message is under way; it may be lost, arrive twice, and in any order."""
        self.say(f"    {source} -> {target}: {message}")
        copies = 1
        if self.faults and self.random.random() < self.loss:
            copies = self.random.choice((0, 2))
        self.network += [(source, target, m.encode(message))] * copies

    def _deliver(self) -> None:
        index = self.random.randrange(len(self.network))
        source, target, data = self.network[index]
        self.network[index] = self.network[-1]
        self.network.pop()
        if (source, target) in self.cut:
            return
        message = m.decode(data)
        self.say(f"    {source} => {target}: {message}")
        start = next((s for s in self.starts if s.name == target), None)
        if start is not None:
            if not start.ended and isinstance(message, m.Promise | m.Refuse | m.Begun):
                start.launch.heard(message)
                self._look(start)
            return
        node = self.nodes[target]
        if node.alive and node.stopped:
            self.network.append((source, target, data))
        elif node.up:
            node.event(lambda machine: machine.handle(message, source))
            trainer = node.trainer
            if trainer is not None and node.state.frozen and self._start_of(node) is not None:
                self._fence(node)

    def reach(self, source: str, target: str) -> Node | None:
        """A node that answers to another one."""
        node = self.nodes[target]
        cut = (source, target) in self.cut or (target, source) in self.cut
        return node if node.up and not cut else None

    def announced(self, node: Node, announce: m.Announce) -> None:
        """A daemon tells its trainers."""
        self.say(f"    {node.arena}: {announce.snapshot} is {announce.level}")
        self.oracle.announced(node, announce)

    # --- training

    def drifts(self) -> bool:
        """Whether a node uses a grant a step later than others: what no rank should do, and what must not matter."""
        return self.faults and self.random.random() < 0.03

    def _may_step(self, node: Node) -> bool:
        """Collectives keep all nodes of a launch within a step of each other."""
        assert node.trainer is not None
        start = self.starts[node.trainer.launch]
        for arena in start.launch.arenas:
            other = self.nodes[arena].trainer
            if other is None or other.launch != start.number or other.step < node.trainer.step:
                return False
        return True

    def _deadline(self, node: Node, snapshot: SnapshotId) -> None:
        """Time is only a reason to give up."""
        node.event(lambda machine: machine.give_up_parity(snapshot))

    def _work(self, node: Node, task: Task) -> None:
        node.work(task, self.faults and self.random.random() < 0.05)

    # --- starts of the job

    def _start(self) -> None:
        """Nodes that are there, replacements for others, and whoever else may still hold something as a guest."""
        if self.elastic and self.random.random() < 0.3:
            self.count = max(2, self.count + self.random.choice((-1, 1)))
            self.redundancy = "auto"
        for node in self.nodes.values():
            if self.random.random() < 0.9:
                node.end_training()
        alive = [node for node in self.nodes.values() if node.alive]
        sound = [node.arena for node in alive if not node.stopped and not self._is_cut(node.arena)]
        last = self.starts[-1].launch.arenas if self.starts else ()
        sound.sort(key=lambda arena: arena not in last)
        arenas = sound[: self.count]
        while len(arenas) < self.count:
            arenas.append(self._new_node())
        guests = [node.arena for node in alive if node.arena not in arenas]
        self.random.shuffle(arenas)
        grouping = plan_groups([str(number) for number in range(self.count)], self.redundancy)
        shape = Shape(tuple(group.nodes for group in grouping.groups), grouping.groups[0].parity_count)
        nonce = f"{self.random.getrandbits(64):016x}"
        number = 1 + max((record.epoch.number for record in self.store.records), default=0)
        launch = Launch(
            arenas,
            guests,
            shape,
            self.slots,
            nonce,
            number=number,
            records=list(self.store.records),
            stored=set(self.store.committed),
        )
        self.starts.append(Start(len(self.starts), launch, False))

    def _new_node(self) -> str:
        self._names += 1
        name = f"n{self._names}"
        self.nodes[name] = Node(name, self)
        return name

    def _goes_on(self, start: Start) -> None:
        """What a launch does when it waits."""
        if any(not self.nodes[arena].alive for arena in start.launch.arenas):
            self._end(start)
        elif start.stage == "recording":
            assert start.launch.record is not None
            self.store.records.append(start.launch.record)
            assert start.launch.choice is not None
            self.oracle.recorded(start.launch.epoch, start.launch.choice, start.launch.promises)
            start.launch.recorded()
            start.stage = "beginning"
        elif start.stage == "asking" and self.random.random() < 0.1:
            start.launch.expire()
            self._look(start)
        else:
            for arena, message in start.launch.messages():
                assert isinstance(message, m.Prepare | m.Begin)
                self.send(start.name, arena, message)
            hopeless = self._is_overtaken(start) or any(self._is_gone(arena) for arena in start.launch.arenas)
            if hopeless and self.random.random() < 0.02:
                self._end(start)

    def _look(self, start: Start) -> None:
        """A launch has heard something."""
        launch = start.launch
        if start.stage == "asking" and launch.choice is not None:
            start.stage = "recording"
            self.say(f"    {start.name}: {launch.choice}")
            self.oracle.chosen(launch.epoch, launch.choice, launch.promises.keys())
        elif start.stage == "beginning" and launch.done:
            start.stage = "running"
            assert launch.choice is not None
            for arena in launch.arenas:
                node = self.nodes[arena]
                if node.state.epoch == launch.epoch and not node.state.frozen and node.alive:
                    node.begin_training(start.number, launch.choice.step)

    def _is_gone(self, arena: str) -> bool:
        node = self.nodes[arena]
        return not node.alive or node.stopped or self._is_cut(arena)

    def _is_cut(self, arena: str) -> bool:
        return any(arena in link for link in self.cut)

    def _is_overtaken(self, start: Start) -> bool:
        states = [self.nodes[arena].state for arena in start.launch.arenas]
        return any(state.promised is not None and state.promised > start.launch.epoch for state in states)

    def _start_of(self, node: Node) -> Start | None:
        return None if node.trainer is None else self.starts[node.trainer.launch]

    def _fence(self, node: Node) -> None:
        """The daemon has disconnected its trainers; they end."""
        start = self._start_of(node)
        node.end_training()
        if start is not None and start.stage == "running":
            self._end(start)

    def _end(self, start: Start) -> None:
        """The launcher kills what is left of a launch."""
        start.ended = True
        for arena in start.launch.arenas:
            node = self.nodes[arena]
            if node.trainer is not None and node.trainer.launch == start.number and not node.stopped:
                node.end_training()

    # --- faults

    def _lose(self, node: Node) -> None:
        """Mostly no more than the promise covers; sometimes more."""
        found = self.oracle.protected
        if found is not None and node.arena in found.holders and self.random.random() < 0.9:
            group = found.shape.group_of(found.holders.index(node.arena))
            lost = sum(not self._lives(found.holders[number]) for number in group)
            if lost >= found.shape.parity:
                return
        node.lose()
        for start in self.starts:
            if node.arena in start.launch.arenas and not start.ended:
                self._end(start)

    def _lives(self, arena: str) -> bool:
        return arena in self.nodes and self.nodes[arena].alive

    def _cut_off(self, node: Node) -> None:
        """From all or one, in one direction or both."""
        others = [name for name in self.nodes if name != node.arena]
        if others and self.random.random() < 0.3:
            others = [self.random.choice(others)]
        ways = self.random.choice(((True, True), (True, False), (False, True)))
        self.cut |= {(node.arena, other) for other in others if ways[0]}
        self.cut |= {(other, node.arena) for other in others if ways[1]}

    def _kill_job(self) -> None:
        for start in self.starts:
            if not start.ended:
                self._end(start)

    def _damage(self, node: Node) -> None:
        """A bit flips in a string or a parity."""
        kinds: list[tuple[str, dict[SnapshotId, Any]]] = [("data", node.data), ("parity", node.parity)]
        name, held = self.random.choice(kinds)
        known = [s for s, found in held.items() if len(found) and (h := node.state.find(s)) and not h.capturing]
        if known:
            snapshot = self.random.choice(known)
            held[snapshot][self.random.randrange(len(held[snapshot]))] ^= 1
            node.damaged.add((snapshot, name))

    # --- the end

    def _heal(self) -> None:
        """No more faults. Zombies and everything under way live on."""
        self.say("--- no more faults")
        self.faults, self.elastic = False, False
        self.cut.clear()
        self.slow.clear()
        for node in self.nodes.values():
            node.stopped, node.budget = False, None
        self._kill_job()

    def _protects_again(self) -> None:
        """Three protected snapshots in one epoch."""
        before = dict(self.oracle.protections)
        for turn in range(FINAL_TURNS):
            if turn == FINAL_TURNS // 2 and any(node.damaged for node in self.nodes.values() if node.alive):
                self._kill_job()  # two slots, and R damaged beyond what it tolerated: goes on from P
            self.turn()
            if any(n >= before.get(epoch, 0) + 3 for epoch, n in self.oracle.protections.items()):
                return
        raise BrokenPromiseError("nothing is protected any more")

    def _last_losses(self) -> None:
        """As many nodes of each group as were promised are lost at one moment; the job starts again."""
        found = self.oracle.protected
        assert found is not None
        for group in found.shape.groups:
            for number in self.random.sample(group, found.shape.parity):
                self.say(f"{found.holders[number]} is lost")
                self.nodes[found.holders[number]].lose()
        self._kill_job()
        self._protects_again()
