"""A network of the laboratory's own: a network namespace for each node, joined by a bridge in one more.

Owns the namespaces and their links. A namespace lives as long as the process in it that waits for the end of its
standard input, and whoever else was started there: with the process of the tests all of them end, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence

from tests.faults.lab import LIMIT_S, until


class UnavailableError(Exception):
    """Namespaces cannot be made here."""


class _Space:
    """One namespace."""

    def __init__(self) -> None:
        self._keeper = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        own = os.readlink("/proc/self/ns/net")
        until(lambda: self._keeper.poll() is not None or self._net() != own, "a network namespace")
        if self._keeper.poll() is not None:
            assert self._keeper.stderr is not None
            raise UnavailableError(self._keeper.stderr.read().decode().strip())
        self.prefix = ("nsenter", f"--net=/proc/{self.pid}/ns/net")
        self.ip("link set lo up")

    @property
    def pid(self) -> int:
        return self._keeper.pid

    def ip(self, words: str) -> None:
        """A command of `ip` in there."""
        done = subprocess.run(
            [*self.prefix, "ip", *words.split()], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert done.returncode == 0, f"ip {words}: {done.stderr}"

    def end(self) -> None:
        for stream in (self._keeper.stdin, self._keeper.stderr):
            assert stream is not None
            stream.close()
        self._keeper.wait(LIMIT_S)

    def _net(self) -> str:
        """Which namespace the process in it is in by now."""
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{self._keeper.pid}/ns/net")
        return ""


class Lan:
    """Use as a context manager. Raises UnavailableError. Nodes are known by the addresses that `join` has given."""

    def __init__(self) -> None:
        self._spaces: dict[str, _Space] = {}
        self._hub = _Space()
        self._hub.ip("link add hub type bridge")
        self._hub.ip("link set hub up")

    def __enter__(self) -> Lan:
        return self

    def __exit__(self, *failure: object) -> None:
        for space in (*self._spaces.values(), self._hub):
            space.end()

    def join(self) -> str:
        """The address of one more node."""
        number, space = len(self._spaces) + 1, _Space()
        address = f"10.0.0.{number}"
        self._spaces[address] = space
        self._hub.ip(f"link add {self._port(address)} type veth peer name lan netns {space.pid}")
        self._hub.ip(f"link set {self._port(address)} master hub up")
        space.ip(f"address add {address}/24 dev lan")
        space.ip("link set lan up")
        return address

    def prefix(self, address: str) -> Sequence[str]:
        """Of a command that is to run on this node."""
        return self._spaces[address].prefix

    @contextlib.contextmanager
    def cut(self, *addresses: str) -> Iterator[None]:
        """Nothing goes to these nodes or comes from them meanwhile."""
        for address in addresses:
            self._hub.ip(f"link set {self._port(address)} down")
        yield
        for address in addresses:
            self._hub.ip(f"link set {self._port(address)} up")

    @contextlib.contextmanager
    def swallow(self, source: str, target: str) -> Iterator[None]:
        """What one node sends to another gets lost meanwhile; the other direction is open."""
        self._spaces[source].ip(f"route add blackhole {target}/32")
        yield
        self._spaces[source].ip(f"route del blackhole {target}/32")

    @staticmethod
    def _port(address: str) -> str:
        return "port" + address.rpartition(".")[2]
