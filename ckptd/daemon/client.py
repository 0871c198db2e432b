"""Talking to daemons from outside a training loop: what the command line and rank 0's start-up use."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import ckptd.core.errors as errors
from ckptd.core.errors import CkptdError, ConfigError, DaemonError, DeadlineError, NotFoundError
from ckptd.core.types import Job
from ckptd.daemon.address import Address, addresses, connect
from ckptd.daemon.wire import MAX_PACKET, ask
from ckptd.protocol import messages as m

ANSWER_S = 10.0
FLUSH_S = 24 * 3600.0


class JobInfo(NamedTuple):
    """A daemon that answers on this node."""

    name: str
    digest: str
    directory: str
    pid: int


def refusal(answer: m.Refuse) -> CkptdError:
    """The error that a Refuse stands for."""
    kind = getattr(errors, answer.error, DaemonError)
    if not (isinstance(kind, type) and issubclass(kind, CkptdError)) or kind is CkptdError:
        kind = DaemonError
    return kind(answer.message)


def request(
    connection: socket.socket, message: m.Message, deadline_s: float = ANSWER_S, descriptors: Sequence[int] = ()
) -> Any:
    """The answer to a request; raises the error of a Refuse, DaemonError, DeadlineError."""
    answer, _ = ask(connection, message, deadline_s, descriptors)
    if isinstance(answer, m.Refuse):
        raise refusal(answer)
    return answer


class Control:
    """A connection to one job's daemon for the reading and controlling commands."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._connection = connect(address)

    @classmethod
    def connect(cls, job: str | None = None) -> Control:
        """By name or digest; without one, the only job on this node. Raises NotFoundError, ConfigError, DaemonError."""
        found = [a for a in addresses() if _answers(a)]
        if job is not None:
            chosen = [a for a in found if job in (a.job.name, a.job.digest)]
            if not chosen:
                chosen = [a for a in found if a.job == Job(_canonical(job))]
        else:
            chosen = found
        if not chosen:
            raise NotFoundError("no daemon runs on this node" if job is None else f"no daemon of job {job!r} here")
        if len(chosen) > 1:
            names = ", ".join(repr(a.job.name) for a in chosen)
            raise ConfigError(f"{len(chosen)} jobs run on this node, name one: {names}")
        return cls(chosen[0])

    def status(self) -> dict[str, Any]:
        """A JSON-able picture of the daemon."""
        report: dict[str, Any] = request(self._connection, m.Status()).report
        return report

    def stop(self) -> None:
        """Frees the job's memory and ends its daemon; returns when it is gone."""
        request(self._connection, m.Stop())
        self._connection.settimeout(ANSWER_S)
        try:
            while self._connection.recv(MAX_PACKET):
                pass
        except OSError as error:
            raise DeadlineError(f"the daemon of job {self.address.job.name!r} does not end: {error}") from None

    def flush(self, to: str | None = None, deadline_s: float = FLUSH_S) -> int | None:
        """Makes the newest sealed snapshot durable, in the job's store or another; its step, None if there is none."""
        step: int | None = request(self._connection, m.Flush(to), deadline_s).step
        return step

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def jobs() -> list[JobInfo]:
    """The jobs whose daemons answer on this node."""
    found = []
    for address in addresses():
        try:
            control = Control(address)
        except CkptdError:
            continue
        try:
            pid = int(control.status()["pid"])
            found.append(JobInfo(address.job.name, address.job.digest, str(address.directory), pid))
        except CkptdError:
            continue
        finally:
            control.close()
    return found


def _answers(address: Address) -> bool:
    try:
        connect(address).close()
    except DaemonError:
        return False
    return True


def _canonical(name: str) -> str:
    """A store path given for a job is its canonical URI."""
    from ckptd.tiers.store import Store

    try:
        return Store.open(name).uri
    except CkptdError:
        return name
