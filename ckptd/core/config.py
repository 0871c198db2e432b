"""Options of a Checkpointer and what the environment says of this process and node.

Every option has an environment variable CKPTD_<NAME>, which wins over the default and loses to an explicit argument.
Reads `os.environ`; no other I/O.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ckptd.core.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user can choose. Units are in the names; `memory` is bytes per node; bytes a second are
    `protection_bandwidth`, that a node pulls from others, and `flush_bandwidth`, that it writes to the store."""

    snapshot_every: Literal["auto"] | int = "auto"
    flush_every: int | datetime.timedelta | None = 500
    keep: int | None = 3
    resume: Literal["auto", "never", "must"] | int = "auto"
    job: str | None = None
    redundancy: str = "auto"
    capture: Literal["auto", "lazy", "eager"] = "auto"
    audit: bool = False
    memory: Literal["auto"] | int = "auto"
    overhead_budget: float = 0.01
    max_stall_s: float = 1.0
    grace_s: float = 25.0
    linger_s: float = 1800.0
    protection_bandwidth: int | None = None
    flush_bandwidth: int | None = None
    trace: str | None = None
    tls_dir: str | None = None

    @classmethod
    def resolve(cls, given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Options:
        """Arguments over environment over defaults; raises ConfigError naming every option that cannot be."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = set(given) - names
        if unknown:
            raise ConfigError(f"unknown options {sorted(unknown)}; known: {', '.join(sorted(names))}")
        values = dict(given)
        for name in sorted(names - set(given)):
            text = environ.get(f"CKPTD_{name.upper()}")
            if text is not None:
                values[name] = _parse(name, text)
        options = cls(**values)
        options._check()
        return options if options.trace is None else dataclasses.replace(options, trace=os.path.abspath(options.trace))

    def _check(self) -> None:
        wrong = []

        def require(good: bool, name: str, expected: str) -> None:
            if not good:
                wrong.append(f"{name}={getattr(self, name)!r}: expected {expected}")

        def whole(value: object, least: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        require(
            self.snapshot_every == "auto" or whole(self.snapshot_every, 1),
            "snapshot_every",
            "'auto' or a number of steps from 1 up",
        )
        require(
            self.flush_every is None
            or whole(self.flush_every, 1)
            or (isinstance(self.flush_every, datetime.timedelta) and self.flush_every.total_seconds() > 0),
            "flush_every",
            "a number of steps from 1 up, a positive timedelta, or None",
        )
        require(self.keep is None or whole(self.keep, 1), "keep", "a number from 1 up, or None for all")
        require(
            self.resume in ("auto", "never", "must") or whole(self.resume, 0),
            "resume",
            "'auto', 'never', 'must' or a step",
        )
        require(self.job is None or (isinstance(self.job, str) and 0 < len(self.job) <= 4096), "job", "a name or None")
        require(
            self.redundancy in ("auto", "none") or re.fullmatch(r"[1-9]\d?\+[1-9]\d?", self.redundancy) is not None,
            "redundancy",
            "'auto', 'none' or K+M such as '4+2'",
        )
        require(self.capture in ("auto", "lazy", "eager"), "capture", "'auto', 'lazy' or 'eager'")
        require(isinstance(self.audit, bool), "audit", "True or False")
        require(self.memory == "auto" or whole(self.memory, 1), "memory", "'auto' or bytes per node")
        require(0 < self.overhead_budget <= 1, "overhead_budget", "a fraction in (0, 1]")
        for name in ("protection_bandwidth", "flush_bandwidth"):
            limit = getattr(self, name)
            require(limit is None or whole(limit, 1), name, "bytes a second from 1 up, or None for no limit")
        require(
            self.trace is None or (isinstance(self.trace, str) and 0 < len(self.trace) <= 4096),
            "trace",
            "a directory for traces, or None",
        )
        require(
            self.tls_dir is None or (isinstance(self.tls_dir, str) and 0 < len(self.tls_dir) <= 4096),
            "tls_dir",
            "a directory with ca.pem, cert.pem and key.pem, or None",
        )
        for name in ("max_stall_s", "grace_s", "linger_s"):
            require(0 <= getattr(self, name) < 10**9, name, "seconds from 0 up")
        if wrong:
            raise ConfigError("; ".join(wrong))


def _parse(name: str, text: str) -> Any:
    """The value of option `name` as an environment variable spells it."""
    text = text.strip()
    try:
        if name in ("snapshot_every", "resume") and not text.isdigit():
            return text
        if name == "memory":
            return text if text == "auto" else parse_size(text)
        if name in ("protection_bandwidth", "flush_bandwidth"):
            return None if text.lower() == "none" else parse_size(text)
        if name in ("flush_every", "keep") and text.lower() in ("none", "all", "never"):
            return None
        if name == "flush_every" and not text.isdigit():
            return parse_duration(text)
        if name in ("snapshot_every", "flush_every", "keep", "resume"):
            return int(text)
        if name == "audit":
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if name in ("overhead_budget", "max_stall_s", "grace_s", "linger_s"):
            return float(text)
    except (ValueError, KeyError):
        raise ConfigError(f"CKPTD_{name.upper()}={text!r}: not a value of {name}") from None
    return text


def parse_size(text: str) -> int:
    """Bytes from '8G', '512MiB', '1000'; powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 8G or 512MiB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def parse_duration(text: str) -> datetime.timedelta:
    """A duration from '90s', '10min', '1.5h'. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 90s, 10min or 2h")
    return datetime.timedelta(seconds=float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]])


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where sockets, locks and logs of this node's daemons live."""
    chosen = environ.get("CKPTD_RUNTIME_DIR")
    if chosen:
        return Path(chosen).absolute()
    user = Path(f"/run/user/{os.getuid()}")
    return user / "ckptd" if user.is_dir() else Path(f"/tmp/ckptd-{os.getuid()}")


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """This node's name: CKPTD_NODE, else the host name."""
    return environ.get("CKPTD_NODE") or socket.gethostname()


@dataclasses.dataclass(frozen=True)
class World:
    """This process's place in the job, as torchrun's environment says it. One process alone: rank 0 of 1."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> World:
        """Raises ConfigError where the variables contradict each other."""
        try:
            rank, size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
            local = int(environ.get("LOCAL_RANK", str(rank)))
            local_size = int(environ.get("LOCAL_WORLD_SIZE", str(size)))
        except ValueError as error:
            raise ConfigError(f"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE: {error}") from None
        if not (0 <= rank < size and 0 <= local < local_size <= size):
            raise ConfigError(
                f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local} of LOCAL_WORLD_SIZE={local_size} cannot be"
            )
        return cls(rank, size, local, local_size)
