"""A job on one node, with everything that can go wrong, from one seed. `python -m tests.protocol.simulate --seed N`.

The real NodeMachine; trainers as in trainer.py; launches as trainer/start.py does them. At each turn one of the things
that can happen next is drawn: a message arrives, a step ends, a copy completes, a process or connection or daemon dies.
After the last fault the job must go on sealing, and a clean close must end the daemon and leave nothing behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from ckptd.core.types import Epoch, SnapshotId
from ckptd.protocol import messages as m
from ckptd.protocol.cluster.epoch import beginning, choose
from ckptd.protocol.cluster.facts import Shape
from tests.protocol.node import JOB, Connection, Node, Process
from tests.protocol.oracle import BrokenPromiseError, Oracle
from tests.protocol.trainer import SLOT_BYTES, Memory, Trainer

STORE, ELSEWHERE = "/store", "/elsewhere"
TURNS = 600
Event = Callable[[], None]


@dataclasses.dataclass(eq=False)
class Proc:
    """A process of a rank. `stage`: joining, loading, running, closing. `noticed`: its pidfd has fired."""

    launch: Launch
    trainer: Trainer
    identity: Process
    connection: Connection | None = None
    stage: str = "joining"
    alive: bool = True
    noticed: bool = False
    restore: list[Memory] = dataclasses.field(default_factory=list)
    stalled: int = 0


@dataclasses.dataclass(eq=False)
class Launch:
    """A start of the job. `stage`: prepare, promise, begin, running; its rank 0 may die on the way (`ended`)."""

    number: int
    world: int
    policy: m.Policy
    stage: str = "prepare"
    least: int = 1
    epoch: Epoch | None = None
    choice: SnapshotId | None = None
    from_memory: bool = False
    connection: Connection | None = None
    ended: bool = False
    requests: set[int] = dataclasses.field(default_factory=set)
    processes: list[Proc] = dataclasses.field(default_factory=list)


class Simulation:
    """See the module docstring."""

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.trace: list[tuple[Any, ...]] | None = [] if trace else None
        self.world = self.random.choice((1, 2, 2, 3))
        self.store = self.random.choice((STORE, STORE, None))
        room = 3 * SLOT_BYTES * self.random.choice((2, 100))  # the least that is always enough, or plenty
        self.node = Node(room, self._lived, self._sent)
        self.oracle = Oracle()
        self.processes: list[Proc] = []
        self.launches: list[Launch] = []
        self.control: Connection | None = None
        self.faults = True
        self.closing = False
        self.updates = 1.0 if self.random.random() < 0.7 else 0.7
        self.pace = self.random.choice((0.5, 2.0, 2.0, 8.0))
        """Of training, beside messages: where it is high, grants come late and lead grows."""
        self.haste = self.random.choice((2.0, 2.0, 0.1))
        """Of rank 0 at start-up."""
        self.danger = self.random.choice((0.005, 0.01, 0.02, 0.05))
        """Chance of a fault a turn."""
        self._identity = 100
        self.node.start()

    # --- what happens

    def run(self, turns: int) -> None:
        """`turns` with faults, then on to a clean end. Raises BrokenPromiseError."""
        try:
            for _ in range(turns):
                self._turn()
            self._heal()
            self._go_on_sealing()
            self._close()
        except BrokenPromiseError:
            raise
        except Exception as error:
            raise BrokenPromiseError(f"{type(error).__name__}: {error}") from error

    def _turn(self) -> None:
        fault = self.faults and self.random.random() < self.danger
        events = list(self._fault_events() if fault else self._events())
        if not events:
            return
        weight = self.random.random() * sum(e[0] for e in events)
        for chance, name, subject, event in events:  # noqa: B007
            weight -= chance
            if weight <= 0:
                break
        if self.trace is not None:
            self.trace.append((name, subject))
        event()
        if self.node.exited is not None:
            self._exits()
        self.oracle.check(self.node, [p.trainer for p in self.processes if p.alive])

    def _events(self) -> Iterator[tuple[float, str, Any, Event]]:
        node = self.node
        if node.machine is None:
            yield 3, "daemon starts", None, node.start
        else:
            for connection in list(node.connections.values()):
                if connection.up:
                    yield 3, "to daemon", connection.up[0], lambda c=connection: node.deliver(c)
            if node.flush is not None:
                yield 1, "flush commits", node.flush, lambda: node.flush_ends(None)
                if self.faults:
                    yield 0.3, "flush fails", node.flush, lambda: node.flush_ends("disk full")
            if node.records:
                yield 1, "record written", node.records[0], lambda: node.record_ends(None)
            yield 0.05, "tick", node.now_s + 10, lambda: node.ticks(node.now_s + 10)
        for process in self.processes:
            if process.alive:
                yield from self._process_events(process)
            elif not process.noticed and node.machine is not None:
                yield 1, "pidfd", process.trainer.hello.instance, lambda p=process: self._notice(p)
        for launch in self.launches:
            if not launch.ended and launch.stage != "running":
                yield self.haste, f"launch: {launch.stage}", launch.number, lambda x=launch: self._launch_goes_on(x)
        if not self.closing and all(launch.ended for launch in self.launches):
            yield 2, "job starts", None, self._start_job

    def _process_events(self, process: Proc) -> Iterator[tuple[float, str, Any, Event]]:
        trainer, connection, name = process.trainer, process.connection, process.trainer.hello.instance
        if connection is not None and connection.lost and not connection.down:
            yield 1, "connection noticed lost", name, lambda: self._loses_connection(process)
            connection = None
        if process.stage == "joining":
            if connection is None:
                yield 2, "joins", name, lambda: self._joins(process)
            elif connection.down:
                yield 3, "answer to Hello", connection.down[0], lambda: self._joined(process)
            return
        if process.stage == "loading":
            yield 1, "loads", name, lambda: self._loads(process)
            return
        if connection is None:
            yield 1, "comes back", name, lambda: self._comes_back(process)
        elif connection.down:
            yield 3, "to trainer", (name, connection.down[0]), lambda: self._receives(process)
        if trainer.making:
            yield 1, "makes slot", (name, trainer.making[0]), lambda: trainer.makes()
        if process.stalled:
            process.stalled -= 1
        elif trainer.copy is not None:
            yield 1, "copied", name, lambda: trainer.copied(None)
            if self.faults:
                yield 0.05, "mutated", name, lambda: trainer.copied("mutated")
        elif trainer.requested is not None:
            yield 1, "waits in snapshot", name, lambda: trainer.looks()
        elif process.stage == "running" and self._may_step(process):
            yield self.pace, "step", (name, trainer.step + 1), lambda: self._steps(process)

    def _fault_events(self) -> Iterator[tuple[float, str, Any, Event]]:
        node, pick = self.node, self.random.choice
        alive = [p for p in self.processes if p.alive]
        running = [p for p in alive if p.stage == "running"]
        if node.machine is not None:
            yield 0.1, "kill daemon", None, lambda: node.kill(keeper=False)
            yield 0.05, "kill daemon and keeper", None, self._lose_arena
            if node.budget is None:
                yield 0.2, "doom daemon", None, lambda: node.doom(self.random.randrange(6))
            if node.connections:
                yield 0.15, "cut", None, lambda: pick(list(node.connections.values())).lose()
            yield 0.05, "tool flushes", None, self._tool
        if alive:
            yield 0.1, "kill one", None, lambda: self._kill(pick(alive))
            yield 0.05, "kill job", None, lambda: [self._kill(p) for p in alive]
            yield 0.05, "stall", None, lambda: setattr(pick(alive), "stalled", 40)
        if running:
            yield 0.05, "leaves", None, lambda: self._leaves(pick(running))
            yield 0.05, "new layout", None, lambda: self._new_layout(pick(running).launch)
            yield 0.05, "SIGTERM", None, lambda: pick(running).trainer.asks(m.Terminating())
            yield 0.1, "snapshot on request", None, lambda: self._request(pick(running).launch)
            yield 0.05, "gives up waiting", None, lambda: setattr(pick(running).trainer, "requested", None)
        if len([x for x in self.launches if not x.ended]) < 3:
            yield 0.06, "second launch", None, self._start_job
        if node.records:
            yield 0.1, "record fails", None, lambda: node.record_ends("disk full")

    # --- processes

    def _lived(self, identity: Process) -> bool:
        return any(p.alive and p.identity == identity for p in self.processes)

    def _kill(self, process: Proc) -> None:
        process.alive = False
        process.launch.ended = True
        if process.trainer.copy is not None:
            process.trainer.copy.memory.writer = None
        if process.connection is not None:
            connection, process.connection = process.connection, None
            if not connection.lost:
                self.node.closed(connection)

    def _notice(self, process: Proc) -> None:
        process.noticed = True
        assert self.node.machine is not None
        if process.trainer.hello.instance in self.node.machine.state.processes:
            self.node.ended(process.trainer.hello.instance)

    def _connect(self, process: Proc) -> bool:
        process.connection = self.node.connect(process.identity)
        return process.connection is not None

    def _say(self, process: Proc, message: m.Message, memory: Memory | None = None) -> None:
        if process.connection is not None and not process.connection.lost:
            process.connection.up.append((m.decode(m.encode(message), "to"), memory))

    def _joins(self, process: Proc) -> None:
        if self._connect(process):
            self._say(process, process.trainer.hello)

    def _joined(self, process: Proc) -> None:
        assert process.connection is not None
        message, memories = process.connection.down.popleft()
        if isinstance(message, m.Welcome):
            process.stage, process.restore = "loading", memories
            process.trainer.sealed = -1
        else:
            self._expect_fenced(process, message)
            self._kill(process)

    def _loads(self, process: Proc) -> None:
        """Every rank reads the restore point, then all go on together."""
        launch = process.launch
        if any(p.stage == "joining" for p in launch.processes):
            return
        if launch.from_memory and self._is_current(launch):
            found = {memory.content for memory in process.restore}
            if found != {launch.choice}:
                raise BrokenPromiseError(
                    f"{process.trainer.hello.instance} restores {launch.choice} from {process.restore}"
                )
        process.restore = []
        process.stage = "loaded" if any(p.stage == "loading" for p in launch.processes if p is not process) else "all"
        if process.stage == "all":
            for each in launch.processes:
                each.stage = "running"

    def _loses_connection(self, process: Proc) -> None:
        process.connection = None
        if process.stage == "joining":
            self._kill(process)

    def _comes_back(self, process: Proc) -> None:
        if self._connect(process):
            hello = msgspec.structs.replace(process.trainer.hello, granted=process.trainer.granted)
            for message in (hello, *process.trainer.repeat()):
                self._say(process, message)

    def _receives(self, process: Proc) -> None:
        assert process.connection is not None
        message, memories = process.connection.down.popleft()
        trainer = process.trainer
        if isinstance(message, m.Refuse) and not trainer.standing:
            self._expect_fenced(process, message)
        trainer.received(message, memories)
        if trainer.drained or (trainer.closed and process.stage == "closing"):
            self._kill(process)

    def _expect_fenced(self, process: Proc, message: m.Message) -> None:
        """A trainer of the newest epoch is refused nothing."""
        newest = max((x.epoch for x in self.launches if x.epoch is not None), default=None)
        if process.launch.epoch == newest and self.node.machine is not None:
            promised = self.node.machine.state.promised
            if promised is None or promised <= process.trainer.epoch:
                raise BrokenPromiseError(f"{process.trainer.hello.instance}, of the live epoch, gets {message}")

    def _may_step(self, process: Proc) -> bool:
        """Collectives keep ranks within a step of each other; who was refused ends at the next boundary."""
        others = [p for p in process.launch.processes if p is not process]
        return all(p.stage == "running" and p.trainer.step >= process.trainer.step and p.alive for p in others)

    def _steps(self, process: Proc) -> None:
        trainer = process.trainer
        if trainer.refused is not None:
            self._leaves(process)
            return
        trainer.ends_step(updated=self.updates == 1.0 or _updated(self.seed, trainer.step + 1))
        if trainer.step in process.launch.requests:
            trainer.requests()

    def _leaves(self, process: Proc) -> None:
        """An exception: says so, and is gone."""
        self._say(process, m.Leave())
        if process.connection is not None:
            while process.connection.up and self.node.machine is not None:
                self.node.deliver(process.connection)
        self._kill(process)

    def _new_layout(self, launch: Launch) -> None:
        for process in launch.processes:
            process.trainer.version += 1

    def _request(self, launch: Launch) -> None:
        launch.requests.add(max(p.trainer.step for p in launch.processes) + 1)

    # --- launches

    def _start_job(self) -> None:
        for launch in self.launches:
            if launch.ended and self.random.random() < 0.8:  # the launcher kills what is left; others stay as zombies
                for process in [p for p in launch.processes if p.alive]:
                    self._kill(process)
        world = self.world if self.random.random() < 0.8 else self.random.choice((1, 2, 3))
        policy = m.Policy(
            store=self.store,
            snapshot_steps=self.random.choice((1, 1, 2, 3)),
            flush_steps=self.random.choice((None, 2, 5)),
            flush_s=None,
            keep=3,
            overhead_budget=0.01,
            memory_bytes=None,
            linger_s=1e6,
        )
        self.launches.append(Launch(len(self.launches), world, policy))

    def _launch_goes_on(self, launch: Launch) -> None:
        """Rank 0's part of start.py: one exchange."""
        connection = launch.connection
        if launch.stage == "prepare":
            self._prepares(launch)
        elif connection is None or connection.lost:
            launch.connection, launch.stage = None, "prepare"
        elif connection.down:
            answer, _ = connection.down.popleft()
            match answer:
                case m.Promise():
                    self._begins(launch, answer)
                case m.Begun():
                    self._spawns(launch)
                    self._hang_up(launch)
                case m.Refuse() if answer.promised is not None:
                    launch.least = answer.promised.number + 1
                    self._hang_up(launch)
                    launch.stage = "prepare"
                case m.Refuse():
                    launch.ended = True
                    self._hang_up(launch)
        elif self.faults and self.random.random() < 0.02 * self.danger:
            launch.ended = True  # rank 0 is killed on the way
            self._hang_up(launch)

    def _hang_up(self, launch: Launch) -> None:
        connection, launch.connection = launch.connection, None
        if connection is not None and not connection.lost:
            self.node.closed(connection)

    def _prepares(self, launch: Launch) -> None:
        stored = self.node.stores[self.store] if self.store is not None else None
        known = [] if stored is None else [r.epoch.number for r in stored.records]
        known += [] if stored is None else [s.epoch.number for s in stored.committed]
        number = max([launch.least, *(n + 1 for n in known)])
        launch.epoch = Epoch(number, f"{self.random.getrandbits(64):016x}")
        launch.connection = self.node.connect((1, 1))
        if launch.connection is not None:
            launch.connection.up.append((m.Prepare(m.PROTOCOL, JOB, launch.epoch), None))
            launch.stage = "promise"

    def _begins(self, launch: Launch, promise: m.Promise) -> None:
        stored = self.node.stores[self.store] if self.store is not None else None
        durable = set() if stored is None else stored.committed
        records = [] if stored is None else stored.records
        chosen = choose([promise.promise], records, durable)
        if chosen.name is not None and self.faults and self.random.random() < 0.1:  # restore(before=...)
            newest = chosen.name
            before = choose([promise.promise], records, durable, lambda name: name < newest)
            chosen = chosen if before.name is None else before
        launch.choice, launch.from_memory = chosen.name, bool(chosen.held)
        assert launch.connection is not None
        assert launch.epoch is not None
        begin = beginning(launch.epoch, chosen, [promise.promise.arena], (), Shape(((0,),), 0), launch.world)
        ranks = list(range(launch.world))
        launch.connection.up.append((m.Begin(begin, ranks, launch.policy), None))
        launch.stage = "begin"

    def _spawns(self, launch: Launch) -> None:
        launch.stage = "running"
        assert launch.epoch is not None
        for rank in range(launch.world):
            self._identity += 1
            hello = m.Hello(
                m.PROTOCOL,
                JOB,
                launch.epoch,
                rank,
                launch.world,
                list(range(launch.world)),
                f"launch {launch.number} rank {rank}",
                launch.choice,
                launch.policy,
            )
            process = Proc(launch, None, (self._identity, 1))  # type: ignore[arg-type]
            process.trainer = Trainer(hello, lambda message, memory, p=process: self._say(p, message, memory))
            if self.faults and self.random.random() < self.danger:
                process.trainer.common = 2 + rank
            launch.processes.append(process)
            self.processes.append(process)

    def _is_current(self, launch: Launch) -> bool:
        """No newer launch has been promised anything, and the arena is that of the launch's Begin."""
        state = None if self.node.machine is None else self.node.machine.state
        return state is not None and state.promised == launch.epoch and state.epoch == launch.epoch

    # --- the node

    def _sent(self, connection: Connection, message: m.Message) -> None:
        if self.trace is not None:
            self.trace.append(("    sends", connection.number, message))
        self.oracle.sent(self.node, message)

    def _lose_arena(self) -> None:
        self.node.kill(keeper=True)
        self.oracle.forget()
        for launch in self.launches:
            launch.from_memory = False

    def _exits(self) -> None:
        """The daemon has ended by itself; its arena with it."""
        self.trace_line("exit", self.node.exited)
        self.node.kill(keeper=True)
        self.oracle.forget()

    def _tool(self) -> None:
        connection = self.node.connect((2, 2))
        if connection is not None:
            connection.up.append((m.Flush(self.random.choice((None, ELSEWHERE))), None))

    def trace_line(self, *words: Any) -> None:
        """For people."""
        if self.trace is not None:
            self.trace.append(words)

    # --- the end

    def _heal(self) -> None:
        """No more faults. If no launch is whole, a new one comes; zombies live on."""
        self.trace_line("--- no more faults")
        self.faults, self.node.budget, self.pace = False, None, 0.5
        self.haste = 2.0
        for launch in self.launches:
            launch.ended = launch.stage != "running" or not self._is_live(launch)
        for process in self.processes:
            process.stalled = 0
            process.trainer.requested = None  # some rank may have given up waiting: now all have
            process.launch.requests.clear()

    def _is_live(self, launch: Launch) -> bool:
        newest = max((x.epoch for x in self.launches if x.epoch is not None and x.stage == "running"), default=None)
        whole = all(p.alive and p.trainer.refused is None and not p.trainer.standing for p in launch.processes)
        return launch.epoch == newest and whole

    def _go_on_sealing(self) -> None:
        """Three more seals in one epoch."""
        start = dict(self.oracle.seals)
        for _ in range(20_000):
            self._turn()
            if any(count >= start.get(epoch, 0) + 3 for epoch, count in self.oracle.seals.items()):
                return
        raise BrokenPromiseError("the run does not go on sealing")

    def _close(self) -> None:
        """Everybody ends cleanly; zombies are killed first."""
        running = [x for x in self.launches if not x.ended and x.stage == "running"]
        launch = max(running, key=lambda x: x.epoch or Epoch(0, ""))
        for process in self.processes:
            if process.alive and process.launch is not launch:
                self._kill(process)
        for _ in range(3000):
            self._turn()
            if len({p.trainer.step for p in launch.processes}) == 1 and not any(
                p.trainer.copy is not None or p.trainer.requested is not None for p in launch.processes
            ):
                break
        else:
            raise BrokenPromiseError("the ranks do not come to one boundary")
        self._check_leaks(launch)
        self.closing = True
        for process in launch.processes:
            process.stage = "closing"
            process.trainer.asks(m.Close())
        for _ in range(3000):
            self._turn()
            if all(not p.alive for p in launch.processes):
                return
        raise BrokenPromiseError("the job does not close")

    def _check_leaks(self, launch: Launch) -> None:
        if self.node.machine is None:
            return
        table = self.node.machine.state.table
        if set(self.node.slots) - {slot.slot for slot in table.slots}:
            raise BrokenPromiseError(f"slots {sorted(self.node.slots)} are kept, {table.slots} are known")


def _updated(seed: int, step: int) -> bool:
    """Whether an optimizer steps in a step: the same on every rank."""
    return random.Random(seed * 1_000_003 + step).random() < 0.7


def main(arguments: list[str]) -> int:
    """Replays seeds and prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=TURNS, help="turns with faults")
    parser.add_argument("--count", type=int, default=1, help="so many seeds from this one on, without a trace")
    chosen = parser.parse_args(arguments)
    for seed in range(chosen.seed, chosen.seed + chosen.count):
        simulation = Simulation(seed, trace=chosen.count == 1)
        try:
            simulation.run(chosen.steps)
        except BrokenPromiseError as violation:
            for line in simulation.trace or []:
                print(*line)
            print(f"seed {seed}: {violation}")
            if violation.__cause__ is not None and chosen.count == 1:
                raise
            return 1
    if simulation.trace is not None:
        for line in simulation.trace:
            print(*line)
    print(f"{chosen.count} seeds: everything held")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
