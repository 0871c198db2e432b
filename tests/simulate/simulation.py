"""A job on several nodes, with everything that can go wrong, from one seed.

The real MemberMachines and Launches; network, memory and clock are simulated in one thread. At each turn one of the
things that can happen next is drawn: a message arrives, a step ends, an encoding completes, a daemon or a node dies.
After the last fault the job must protect again; then as many nodes as promised are lost at once, and it must restore.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from ckptd.core.types import SnapshotId
from ckptd.plan.stripe import plan_groups
from ckptd.protocol.cluster import messages as m
from ckptd.protocol.cluster.facts import Shape
from ckptd.protocol.cluster.member import MemberMachine
from tests.simulate.launch import Launch
from tests.simulate.node import Node
from tests.simulate.oracle import BrokenPromiseError, Oracle, Store

FINAL_TURNS = 6_000
PATIENCE = 600
"""Turns after which the job is started again where something is damaged."""
LAYOUTS = ((1, "none"), (2, "1+1"), (3, "2+1"), (3, "1+2"), (4, "2+2"), (4, "3+1"), (4, "1+1"), (5, "auto"), (6, "2+1"))
MOST_STARTS = 60
THROUGH_BYTES = 0.1
"""How many messages are encoded and decoded on their way."""


class Chance(NamedTuple):
    """Something that may happen next."""

    weight: float
    act: Callable[..., object]
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        owner = getattr(self.act, "__self__", None)
        named = [owner] if isinstance(owner, Node) else []
        words = [getattr(word, "__name__", word) for word in (*named, self.act, *self.arguments)]
        return " ".join(str(word).strip("_") for word in words)


class Start:
    """A start of the job: its launch, and how far it has come (`stage`: asking, recording, beginning, running)."""

    def __init__(self, number: int, launch: Launch) -> None:
        self.number, self.launch = number, launch
        self.name = f"launch {number}"
        self.stage = "asking"
        self.said = ""
        """The stage of which everybody has been told at least once."""
        self.ended = False

    def __repr__(self) -> str:
        return f"{self.name} {self.stage}"


class Simulation:
    """See the module docstring."""

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.trace: list[str] | None = [] if trace else None
        self.count, self.redundancy = self.random.choice(LAYOUTS)
        self.slots = self.random.choice((2, 3, 4))
        self.fan_out = self.random.choice((1, 2, 16))
        self.danger = self.random.choice((0.01, 0.03, 0.08))
        self.loss = self.random.choice((0.0, 0.05, 0.2))
        self.turns = self.random.choice((50, 100, 200, 400))
        """How many of them with faults."""
        self.warm = self.random.random() < 0.6
        """Whether the first fault comes after something is protected."""
        self.elastic = self.random.random() < 0.25
        """Whether the job comes back on more or fewer nodes."""
        self.faults = False
        self.nodes: dict[str, Node] = {}
        self.living: list[Node] = []
        self.store = Store()
        self.oracle = Oracle(self.nodes, self.store)
        self.starts: list[Start] = []
        self.launches: dict[str, Start] = {}
        """Those that are not over, by name."""
        self.network: list[tuple[str, str, m.BetweenDaemons]] = []
        self.cut: set[tuple[str, str]] = set()
        self._names = 0

    # --- what happens

    def run(self) -> None:
        """Turns with faults, then on to protected snapshots and a last restart. Raises BrokenPromiseError."""
        try:
            if self.warm:
                self._protects_again(1)
            self.faults = True
            for _ in range(self.turns):
                self.turn()
            self._heal()
            self._protects_again(2)
            self._last_losses()
        except BrokenPromiseError:
            raise
        except Exception as error:
            raise BrokenPromiseError(f"{type(error).__name__}: {error}") from error

    def turn(self) -> None:
        """One event."""
        fault = self.faults and self.random.random() < self.danger
        chance = self._drawn(self._faults()) if fault else self._next()
        if chance is not None:
            self.say("{}", chance)
            chance.act(*chance.arguments)

    def say(self, text: str, *arguments: object) -> None:
        """For people; put together only if one listens."""
        if self.trace is not None:
            self.trace.append(text.format(*arguments))

    def _next(self) -> Chance | None:
        """What happens next of its own accord: somewhere first, then what; a message arrives where nothing else does.
        None: nothing can happen any more."""
        if not self.launches:
            return Chance(1, self._start)
        waiting = [start for start in self.launches.values() if start.stage != "running"]
        going_on = [Chance(0.1 if start.stage == start.said else 1, self._goes_on, (start,)) for start in waiting]
        if not self.network:
            return self._drawn(going_on + [chance for node in self.living for chance in self._chances_at(node)])
        place = int(self.random.random() * (1 + len(self.network) + len(self.living) + len(waiting)))
        found: Chance | None = None
        if place < len(self.living):
            found = self._drawn(self._chances_at(self.living[place]), 1)
        elif place < len(self.living) + len(waiting):
            found = self._drawn([going_on[place - len(self.living)]], 1)
        return found or Chance(1, self._deliver)

    def _drawn(self, chances: list[Chance], least: float = 0.0) -> Chance | None:
        """One of them, by weight; none now and then if together they weigh less than `least`."""
        place = self.random.random() * max(sum(chance.weight for chance in chances), least)
        for chance in chances:
            place -= chance.weight
            if place < 0:
                return chance
        return None

    def _chances_at(self, node: Node) -> list[Chance]:
        """Of one node that lives."""
        if node.stopped:
            return []
        if node.machine is None:
            return [Chance(1, node.start)]
        pace = 0.1 if node.slow else 1.0
        chances = [Chance(pace, node.work, (task,)) for task in node.tasks]
        if node.trainer is not None:
            chances += [Chance(pace, node.copied, (snapshot,)) for snapshot in node.trainer.copying]
            if self._may_step(node):
                chances.append(Chance(0.2 * pace, node.step))
        chances.append(Chance(0.02, node.event, (MemberMachine.repeat,)))
        chances.append(Chance(0.02, node.event, (MemberMachine.scrub,)))
        if node.machine.state.number == 0:
            chances.append(Chance(0.02, node.wants_flush))
        chances.append(Chance(0.01, self._deadline, (node,)))
        return chances

    def _faults(self) -> list[Chance]:
        """What goes wrong. Time is only a reason to give up."""
        pick = self.random.choice
        chances: list[Chance] = []
        if len(self.starts) < MOST_STARTS:
            chances.append(Chance(0.3, self._start))
        if not self.living:
            return chances
        node = pick(self.living)
        chances += [
            Chance(1, self._lose, (node,)),
            Chance(1, self._stop_or_continue, (node,)),
            Chance(0.7, self._cut_off, (node,)),
            Chance(0.7, self.cut.clear),
            Chance(0.5, self._slow_down, (node,)),
            Chance(1, self._kill_job),
            Chance(0.7, self._split),
            Chance(0.7, self._continue),
            Chance(0.7, self._damage, (node,)),
        ]
        if node.machine is None:
            return chances
        chances += [
            Chance(2, node.kill),
            Chance(1, self._doom, (node,)),
        ]
        if node.machine.state.holdings:
            snapshot = pick(node.machine.state.holdings).snapshot
            chances.append(Chance(0.5, node.event, (MemberMachine.give_up_parity, snapshot)))
            chances.append(Chance(0.5, node.event, (MemberMachine.missed, snapshot)))
        if node.trainer is not None and node.trainer.copying:
            chances.append(Chance(1, node.copied, (pick(list(node.trainer.copying)), True)))
        return chances

    # --- the network

    def send(self, source: str, target: str, message: m.BetweenDaemons) -> None:
        """A message is under way; it may be lost, arrive twice, and in any order. Of two Facts, or two Decided, a later
        one may take the place of an earlier."""
        self.say("    {} -> {}: {}", source, target, message)
        copies = 1
        if self.faults and self.random.random() < self.loss:
            copies = self.random.choice((0, 2))
        if isinstance(message, m.Facts | m.Decided) and (not self.faults or self.random.random() < 0.5):
            for index, (sender, receiver, other) in enumerate(self.network):
                if sender == source and receiver == target and type(other) is type(message):
                    self.network[index] = source, target, message
                    copies -= 1
                    break
        self.network += [(source, target, message)] * copies

    def _deliver(self) -> None:
        index = self.random.randrange(len(self.network))
        source, target, message = self.network[index]
        self.network[index] = self.network[-1]
        self.network.pop()
        if (source, target) in self.cut:
            return
        if self.random.random() < THROUGH_BYTES:
            message = m.decode(m.encode(message))
        self.say("    {} => {}: {}", source, target, message)
        node = self.nodes.get(target)
        if node is None:
            start = self.launches.get(target)
            if start is not None and isinstance(message, m.Promise | m.Refuse | m.Begun):
                start.launch.heard(message)
                self._look(start)
        elif node.alive and node.stopped:
            self.network.append((source, target, message))
        elif node.up:
            node.event(MemberMachine.handle, message, source)
            if node.trainer is not None and node.state.frozen:
                self._fence(node)

    def reach(self, source: str, target: str) -> Node | None:
        """A node that answers to another one."""
        node = self.nodes[target]
        cut = (source, target) in self.cut or (target, source) in self.cut
        return node if node.up and not cut else None

    def announced(self, node: Node, announce: m.Announce) -> None:
        """A daemon tells its trainers."""
        self.say("    {}: {} is {}", node, announce.snapshot, announce.level)
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

    def fails(self) -> bool:
        """Whether something cannot be read or written for once."""
        return self.faults and self.random.random() < 0.05

    def _deadline(self, node: Node) -> None:
        """What is being encoded or rebuilt takes too long."""
        under_way = [holding.snapshot for holding in node.state.holdings if holding.parity is None]
        if under_way:
            node.event(MemberMachine.give_up_parity, self.random.choice(under_way))

    # --- starts of the job

    def _start(self) -> None:
        """Nodes that are there, replacements for others, and whoever else may still hold something as a guest."""
        if self.elastic and self.random.random() < 0.3:
            self.count = max(2, self.count + self.random.choice((-1, 1)))
            self.redundancy = "auto"
        for node in self.nodes.values():
            if self.random.random() < 0.9:
                node.end_training()
        sound = [node.arena for node in self.living if not node.stopped and not self._is_cut(node.arena)]
        last = self.starts[-1].launch.arenas if self.starts else ()
        sound.sort(key=lambda arena: arena not in last)
        arenas = sound[: self.count]
        while len(arenas) < self.count:
            arenas.append(self._new_node())
        guests = [node.arena for node in self.living if node.arena not in arenas]
        self.random.shuffle(arenas)
        grouping = plan_groups([str(number) for number in range(self.count)], self.redundancy)
        shape = Shape(tuple(group.nodes for group in grouping.groups), grouping.groups[0].parity_count)
        nonce = f"{self.random.getrandbits(64):016x}"
        number = 1 + max((record.epoch.number for record in self.store.records), default=0)
        launch = Launch(
            arenas,
            guests,
            shape,
            nonce,
            number=number,
            records=list(self.store.records),
            stored=set(self.store.committed),
        )
        start = Start(len(self.starts), launch)
        self.starts.append(start)
        self.launches[start.name] = start

    def _new_node(self) -> str:
        self._names += 1
        name = f"n{self._names}"
        self.nodes[name] = Node(name, self)
        self.living.append(self.nodes[name])
        return name

    def lost(self, node: Node) -> None:
        """A node is gone, or its daemon has ended."""
        self.living.remove(node)

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
        elif start.stage == start.said == "asking" and self.random.random() < 0.3:
            start.launch.expire()
            self._look(start)
        else:
            start.said = start.stage
            for arena, message in start.launch.messages():
                assert isinstance(message, m.Prepare | m.Begin)
                self.send(start.name, arena, message)
            hopeless = self._is_overtaken(start) or any(self._is_gone(arena) for arena in start.launch.arenas)
            if hopeless and self.random.random() < 0.1:
                self._end(start)

    def _look(self, start: Start) -> None:
        """A launch has heard something."""
        launch = start.launch
        if start.stage == "asking" and launch.choice is not None:
            start.stage = "recording"
            self.say("    {}: {}", start.name, launch.choice)
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

    def _fence(self, node: Node) -> None:
        """The daemon has disconnected its trainers; they end."""
        assert node.trainer is not None
        start = self.starts[node.trainer.launch]
        node.end_training()
        if start.stage == "running" and not start.ended:
            self._end(start)

    def _end(self, start: Start) -> None:
        """The launcher kills what is left of a launch."""
        start.ended = True
        del self.launches[start.name]
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
        for start in list(self.launches.values()):
            if node.arena in start.launch.arenas:
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

    def _stop_or_continue(self, node: Node) -> None:
        node.stopped = not node.stopped

    def _split(self) -> None:
        """Many nodes stop, and the job with them: it goes on without them, from what the others have."""
        for node in self.living:
            node.stopped = node.stopped or self.random.random() < 0.5
        self._kill_job()

    def _continue(self) -> None:
        """All that had stopped are back, and know nothing of what went on."""
        for node in self.living:
            node.stopped = False

    def _slow_down(self, node: Node) -> None:
        node.slow = not node.slow

    def _doom(self, node: Node) -> None:
        """The daemon dies between two of its next actions."""
        node.budget = self.random.randrange(4)

    def declares(self, node: Node) -> None:
        """A daemon knows that something is protected, maybe as the only one. A good moment to die."""
        if self.faults and self.random.random() < 4 * self.danger:
            node.budget = self.random.randrange(3)

    def dies(self, node: Node) -> None:
        """The daemon, or with it the node."""
        node.kill()
        if self.faults and self.random.random() < 0.5:
            self._lose(node)

    def _kill_job(self) -> None:
        for start in list(self.launches.values()):
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
        for node in self.nodes.values():
            node.stopped, node.slow, node.budget = False, False, None
        self._kill_job()

    def _protects_again(self, count: int) -> None:
        """So many protected snapshots in one epoch."""
        before = dict(self.oracle.protections)
        for turn in range(FINAL_TURNS):
            if turn % PATIENCE == PATIENCE - 1 and any(node.damaged for node in self.living):
                self._kill_job()  # two slots, and R damaged beyond what it tolerated: goes on from P
            self.turn()
            if any(n >= before.get(epoch, 0) + count for epoch, n in self.oracle.protections.items()):
                return
        raise BrokenPromiseError("nothing is protected any more")

    def _last_losses(self) -> None:
        """As many nodes of each group as were promised are lost at one moment; the job starts again."""
        found = self.oracle.protected
        assert found is not None
        for group in found.shape.groups:
            for number in self.random.sample(group, found.shape.parity):
                self.say("{} is lost", found.holders[number])
                self.nodes[found.holders[number]].lose()
        self._kill_job()
        self._protects_again(2)
