"""`ckptd status [JOB]`: the jobs of this node, as their daemons tell it, and what about them needs a look."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ckptd.cli import options, output
from ckptd.core.errors import CkptdError

_LEVELS = ("captured", "sealed", "protected", "durable")


def command(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="Only this job (default: all of this node).")
    ] = None,
    json: options.Json = False,
) -> None:
    """Show the jobs of this node: ranks, newest snapshots, memory, flush, errors."""
    from ckptd.core.config import node_name, runtime_dir

    statuses = _ask(job)
    problems = {str(status["job"]): find_problems(status) for status in statuses}
    if json:
        documents = [{**status, "problems": problems[str(status["job"])]} for status in statuses]
        output.print_json({"node": node_name(), "runtime_dir": str(runtime_dir()), "jobs": documents})
    else:
        if not statuses:
            output.say(f"no jobs on node {output.printable(node_name())} ({output.printable(runtime_dir())})")
        for position, status in enumerate(statuses):
            if position:
                output.say("")
            _print(status, problems[str(status["job"])])
    if any(problems.values()):
        raise typer.Exit(1)


def _ask(job: str | None) -> list[Mapping[str, Any]]:
    """The status of `job`, or of every job of this node; a daemon that does not answer is told by its error."""
    from ckptd.daemon.address import addresses
    from ckptd.daemon.client import Control

    if job is not None:
        with contextlib.closing(Control.connect(job)) as control:
            return [control.status()]
    statuses: list[Mapping[str, Any]] = []
    for address in addresses():
        try:
            with contextlib.closing(Control(address)) as control:
                statuses.append(control.status())
        except CkptdError as error:
            if not address.directory.exists():
                continue  # it left between the listing and now
            statuses.append({"job": address.job.name, "digest": address.job.digest, "unreachable": str(error)})
    return statuses


def find_problems(status: Mapping[str, Any]) -> list[str]:
    """What makes the exit status 1, one line each."""
    if "unreachable" in status:
        return [f"the daemon does not answer: {status['unreachable']}"]
    problems = [f"rank {rank['rank']} is dead" for rank in status.get("ranks", ()) if not rank["alive"]]
    for lost in status.get("not_reached", ()):
        lasting = output.format_seconds(lost["for_s"])
        problems.append(f"node {lost['node']} is not reached for {lasting}, and nothing is protected: {lost['why']}")
    problems += [f"protection fails: {failure}" for failure in status.get("failing", ())]
    if status.get("last_error"):
        problems.append(f"last error: {status['last_error']}")
    return problems


def _print(status: Mapping[str, Any], problems: list[str]) -> None:
    pid = status.get("pid")
    daemon = "no daemon answers" if pid is None else f"daemon pid {pid}"
    output.say(f"job       {output.printable(status['job'])} ({daemon}, {status['digest']})")
    if "unreachable" not in status:
        for heading, text in _lines(status):
            output.say(f"{heading:<9} {output.printable(text)}")
    for problem in problems:
        output.say(f"PROBLEM   {output.one_line(problem)}", style="red")


def _lines(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [("epoch", f"{status.get('epoch') or 'none yet'} on node {status.get('node')}")]
    unnamed = "none: memory only" if status.get("epoch") else "not told yet"
    lines.append(("store", str(status.get("store") or unnamed)))
    if (status.get("nodes") or 1) > 1:
        lines.append(("nodes", f"{status['nodes']}, of which each group may lose {status['parity']}"))
    ranks = status.get("ranks") or []
    lines.append(("ranks", "; ".join(_rank(rank) for rank in ranks) or "none connected"))
    lines.append(("newest", ", ".join(_level(status, level) for level in _LEVELS)))
    slots = status.get("slots") or []
    lines.append(("slots", ", ".join(_slot(slot) for slot in slots) or "none"))
    lines.append(("memory", _memory(status)))
    lines.append(("flush", _flush(status.get("flush"))))
    counters = status.get("counters") or {}
    lines.append(("counted", ", ".join(f"{counters[name]} {name}" for name in sorted(counters)) or "nothing yet"))
    if status.get("lingering_s") is not None:
        lines.append(("lingering", f"no rank for {output.format_seconds(status['lingering_s'])}"))
    return lines


def _rank(rank: Mapping[str, Any]) -> str:
    state = "connected" if rank["connected"] else "not connected"
    process = f"pid {rank['pid']}, {state}" if rank["alive"] else "dead"
    step = "" if rank.get("step") is None else f", step {rank['step']}"
    return f"{rank['rank']} ({process}{step})"


def _level(status: Mapping[str, Any], level: str) -> str:
    step = (status.get("newest") or {}).get(level)
    return f"{level} {'-' if step is None else step}"


def _memory(status: Mapping[str, Any]) -> str:
    held, parity = status.get("memory_bytes") or 0, status.get("parity_bytes") or 0
    return output.format_bytes(held) + (f", and {output.format_bytes(parity)} of parities" if parity else "")


def _slot(slot: Mapping[str, Any]) -> str:
    step = "" if slot.get("step") is None else f" {slot['step']}"
    return f"rank {slot['rank']}/{slot['slot']} {slot['state']}{step}"


def _flush(flush: Mapping[str, Any] | None) -> str:
    if flush is None:
        return "none running"
    done, total = flush["done_bytes"], flush["total_bytes"]
    share = f" ({100 * done // total} %)" if total else ""
    return f"step {flush['step']}: {output.format_bytes(done)} of {output.format_bytes(total)}{share}"
