"""`python -m benchmarks.protection`: from sealed to protected, and back after a loss, beside plain Flight and TCP.

All nodes of a group are processes on this machine, which pull over loopback and share its cores. A pair of processes
that has them for itself would be no measure of that. What is compared is therefore as many processes that move the same
bytes between the same nodes at the same time:

- encode: all nodes encode at once. Beside it every node pulls just as many bytes from each node as encoding makes it
  pull, all at once: over TCP (one connection a node pulled from, `sendall` from memory, `recv_into` a buffer of
  16 MiB), and by plain Flight (one `do_get` each of a table in memory, in batches of 4 MiB, dropped on arrival).
- rebuild: one node pulls k times its string and decodes it, into new memory. Beside it, the same pulls by that node.

Contenders take turns within each round; ratios are medians of those of neighbours in time. CPU seconds are those of all
processes. The contenders that are not ours verify nothing, keep nothing and compute nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers_transfer import cpu_s
from benchmarks.protection_node import Pulls, run
from ckptd.core.config import parse_size
from ckptd.plan.stripe import Group, Striping
from ckptd.tiers.peers import new_token
from ckptd.tiers.protection import SealRecord

DEADLINE_S = 120
GOALS = {("encode", "flight"): 0.70, ("encode", "tcp"): 0.45, ("rebuild", "flight"): 0.50}


class Contender(NamedTuple):
    """Something that is measured: what nodes do, with TLS or without, all nodes or one."""

    what: str
    work: str
    tls: bool

    def __str__(self) -> str:
        names = {
            "tcp": "TCP",
            "flight": "plain Flight",
            "encode": "encode",
            "rebuild": "rebuild",
            "describe": "seal record",
        }
        return names[self.what] + (" with TLS" if self.tls else "")


CONTENDERS = [
    Contender(what, work, tls)
    for work, ways in (("encode", ("tcp", "flight", "encode")), ("rebuild", ("tcp", "flight", "rebuild")))
    for tls in (False, True)
    for what in ways
] + [Contender("describe", "seal", False)]


class Sample(NamedTuple):
    """Seconds until the last node was done, and CPU seconds of all."""

    seconds: float
    cpu_s: float


def answer(pipe: Connection) -> Any:
    """What a node says, within a deadline."""
    if not pipe.poll(DEADLINE_S):
        raise SystemExit(f"a node has not answered for {DEADLINE_S} s")
    return pipe.recv()


class Nodes:
    """The processes of one group, of one kind; see protection_node."""

    def __init__(self, kind: str, group: Group, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        token = new_token()
        self.pipes: list[Connection] = []
        self.processes = []
        for number in group.nodes:
            pipe, far_end = context.Pipe()
            process = context.Process(target=run, args=(kind, number, size, token, far_end), daemon=True)
            process.start()
            far_end.close()
            self.pipes.append(pipe)
            self.processes.append(process)
        everyone = [answer(pipe) for pipe in self.pipes]
        self.joined = self.all("join", everyone, group)

    def all(self, name: str, *arguments: Any) -> list[Any]:
        """Every node does the same; what they return."""
        return self.each(name, [arguments] * len(self.pipes))

    def each(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Every node for which there are arguments."""
        chosen = self.pipes[: len(arguments)]
        for pipe, own in zip(chosen, arguments, strict=True):
            pipe.send((name, own))
        return [answer(pipe) for pipe in chosen]

    def cpu_s(self) -> float:
        """Of all, so far."""
        return sum(cpu_s(process.pid) for process in self.processes if process.pid is not None)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()


def plan_pulls(striping: Striping, work: str) -> list[Pulls]:
    """What each node that works pulls from whom; for seal records, what it reads."""
    if work == "seal":
        return [[(number, size)] for number, size in zip(striping.group.nodes, striping.sizes, strict=True)]
    found: list[Counter[int]] = []
    if work == "rebuild":
        found.append(Counter())
        for read in striping.rebuild(0, {0}):
            for source in read.sources:
                found[0][source.node] += source.size
    else:
        for number in striping.group.nodes:
            found.append(Counter())
            for row in striping.encoding(number):
                for source in row.sources:
                    found[-1][source.node] += source.size
            for row in striping.shares(number):
                found[-1][row.encoder] += row.length
    return [sorted((node, size) for node, size in taken.items() if size) for taken in found]


def measure(code: str, size: int, rounds: int) -> dict[str, Any]:
    """All samples of one code."""
    k, m = map(int, code.split("+"))
    group = Group(tuple(range(k + m)), m)
    ours, plain = Nodes("ours", group, size), Nodes("plain", group, size)
    try:
        records: list[SealRecord] = ours.joined
        ours.all("seal", dict(enumerate(records)))
        striping = Striping(group, tuple(record.size for record in records))
        pulls = {work: plan_pulls(striping, work) for work in ("encode", "rebuild", "seal")}

        def sample(contender: Contender) -> Sample:
            nodes = plain if contender.what in ("tcp", "flight") else ours
            if nodes is ours:
                ours.all("prepare", contender.what, contender.tls)
            cpu, started = nodes.cpu_s(), time.perf_counter()
            nodes.each(contender.what, [(own, contender.tls) for own in pulls[contender.work]])
            seconds = time.perf_counter() - started
            return Sample(seconds, nodes.cpu_s() - cpu)

        for contender in CONTENDERS:  # connections are made, memory is touched
            sample(contender)
        samples: dict[Contender, list[Sample]] = {contender: [] for contender in CONTENDERS}
        for _ in range(rounds):
            for contender in CONTENDERS:
                samples[contender].append(sample(contender))
        ours.all("prepare", "rebuild", False)
        ours.all("check")
    finally:
        ours.close()
        plain.close()
    moved = {work: sum(part for own in all_pulls for _, part in own) for work, all_pulls in pulls.items()}
    strings = sum(striping.sizes)
    return {"code": code, "string_bytes": strings, "moved_bytes": moved, "rows": rows(samples, moved, strings)}


def rows(samples: dict[Contender, list[Sample]], moved: dict[str, int], strings: int) -> list[dict[str, Any]]:
    """One a contender."""
    found = []
    for contender, taken in samples.items():
        work, tls = contender.work, contender.tls
        size = moved[work]

        def ratio(other: str, work: str = work, tls: bool = tls, taken: list[Sample] = taken) -> float | None:
            base = samples.get(Contender(other, work, tls))
            if base is None:
                return None
            return statistics.median(one.seconds / own.seconds for one, own in zip(base, taken, strict=True))

        rates = sorted(size / sample.seconds / 1e9 for sample in taken)
        cpu = statistics.median(sample.cpu_s for sample in taken)
        found.append(
            {
                "work": work,
                "what": contender.what,
                "tls": tls,
                "name": str(contender),
                "gb_per_s": statistics.median(rates),
                "least": rates[0],
                "greatest": rates[-1],
                "of_flight": ratio("flight"),
                "of_tcp": ratio("tcp"),
                "cpu_s_per_gb_moved": cpu / size * 1e9,
                "cpu_s_per_gb_protected": cpu / strings * 1e9 if contender.what == "encode" else None,
            }
        )
    return found


def markdown(results: Sequence[dict[str, Any]], options: argparse.Namespace, load: tuple[float, float]) -> str:
    """The tables, and how they came about."""
    lines = [
        "# Protection",
        "",
        f"- {os.cpu_count()} cores, load {load[0]:.1f} before and {load[1]:.1f} after; a string of "
        f"{options.size / 1e6:.0f} MB a node; {options.rounds} interleaved rounds; median (least to greatest)",
        "- GB/s: bytes that all nodes together pulled, a second; seal record: bytes read",
        "- of plain Flight, of TCP: the same pulls, by as many processes at once, with TLS where it says so",
        "- CPU: of all processes; the last column for each GB of snapshot that was protected",
    ]
    for result in results:
        lines += [
            "",
            f"## {result['code']}",
            "",
            "| | GB/s | of plain Flight | of TCP | CPU s/GB moved | CPU s/GB protected |",
            "| --- | --: | --: | --: | --: | --: |",
        ]
        work = ""
        for row in result["rows"]:
            if row["work"] != work:
                work = row["work"]
                titles = {
                    "encode": "all nodes at once",
                    "rebuild": "one node pulls",
                    "seal": "all nodes at once, no transfer",
                }
                lines.append(f"| *{titles[work]}* | | | | | |")
            lines.append(
                f"| {row['name']} | {row['gb_per_s']:.2f} ({row['least']:.2f} to {row['greatest']:.2f}) | "
                f"{_ratio(row, 'flight')} | {_ratio(row, 'tcp')} | {row['cpu_s_per_gb_moved']:.2f} | "
                f"{_number(row['cpu_s_per_gb_protected'])} |"
            )
    return "\n".join([*lines, ""])


def _ratio(row: dict[str, Any], other: str) -> str:
    ratio = row[f"of_{other}"]
    if ratio is None or row["what"] == other:
        return ""
    goal = None if row["tls"] else GOALS.get((row["what"], other))
    verdict = "" if goal is None else f" (goal {goal:.0%}: {'reached' if ratio >= goal else 'MISSED'})"
    return f"{ratio:.0%}{verdict}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.protection", description=__doc__)
    parser.add_argument("codes", nargs="*", default=["2+1", "2+2"], help="K+M ... (default 2+1 2+2)")
    parser.add_argument("--size", type=parse_size, default=2**28, help="bytes of a node's snapshot (default 256 MiB)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory for the tables")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    before = os.getloadavg()[0]
    results = [measure(code, options.size, options.rounds) for code in options.codes]
    text = markdown(results, options, (before, os.getloadavg()[0]))
    (options.output / "protection.md").write_text(text)
    (options.output / "protection.json").write_text(
        json.dumps({"size": options.size, "results": results}, indent=1) + "\n"
    )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
