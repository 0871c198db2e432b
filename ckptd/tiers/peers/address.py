"""Where a daemon listens for its peers, and how it keeps the port until it does.

The address is announced in the membership exchange, whose answers the server needs before it can start (it pins the
certificates of the others). So the port is taken first, by a bound socket that does not listen. Invariant: from
`reserve` to the server's own bind nobody else is given the port.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ckptd.core.errors import ConfigError

if TYPE_CHECKING:
    from ckptd.tiers.peers.identity import Announcement

_BRACKETED = re.compile(r"\[([^\]]+)\](?::(\d{1,5}))?")
_ROUTE_PORT = 9
"""Of no importance: connecting a UDP socket looks up the route and sends nothing."""


def listening_address(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """The numeric host and the port (0: any) to listen at: CKPTD_ADDRESS, else the own end of the route to MASTER_ADDR.

    ConfigError where neither is set, or it leads nowhere.
    """
    given = environ.get("CKPTD_ADDRESS", "").strip()
    if given:
        host, port = split_address(given)
        return _resolve(host, f"CKPTD_ADDRESS={given!r}"), port
    master = environ.get("MASTER_ADDR", "").strip()
    if not master:
        raise ConfigError(
            "no address to listen at: expected MASTER_ADDR (torchrun sets it) or CKPTD_ADDRESS, found neither; "
            "set CKPTD_ADDRESS to an address of this node that the other nodes reach"
        )
    return _route_to(master), 0


def split_address(text: str) -> tuple[str, int]:
    """Host and port (0 if none) of `host`, `host:port`, `::1`, `[::1]` or `[::1]:port`; ConfigError."""
    bracketed = _BRACKETED.fullmatch(text)
    if bracketed is not None:
        host, port = bracketed[1], bracketed[2] or "0"
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        host, port = text, "0"
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"CKPTD_ADDRESS={text!r}: expected HOST, HOST:PORT or [IPV6]:PORT with a port up to 65535")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`, as it stands in a URI."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolve(host: str, what: str) -> str:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{what}: {host!r} is not an address or a name that resolves ({error})") from None
    return _usable(str(found[0][4][0]), what)


def _usable(numeric: str, what: str) -> str:
    """The address, if others can use it; ConfigError."""
    address = ipaddress.ip_address(numeric.partition("%")[0])
    if address.is_unspecified:
        raise ConfigError(f"{what}: {numeric} is every address and none; expected one that the other nodes reach")
    if address.version == 6 and address.is_link_local:
        raise ConfigError(f"{what}: {numeric} means another node on each link; set CKPTD_ADDRESS to a routed address")
    return numeric


def _route_to(master: str) -> str:
    try:
        found = socket.getaddrinfo(master, _ROUTE_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"MASTER_ADDR={master!r} does not resolve ({error}); or set CKPTD_ADDRESS") from None
    failures = []
    for family, kind, protocol, _, target in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                own = str(probe.getsockname()[0])
            return _usable(own, f"MASTER_ADDR={master!r}")
        except OSError as error:
            failures.append(f"{target[0]}: {error.strerror}")
    raise ConfigError(f"MASTER_ADDR={master!r}: no route ({'; '.join(failures)}); set CKPTD_ADDRESS")


class Listener:
    """A reserved port at a numeric host. Whoever serves it calls `release` afterwards."""

    def __init__(self, host: str, port: int, reservation: socket.socket) -> None:
        self.host, self.port = host, port
        self._reservation = reservation

    @classmethod
    def reserve(cls, host: str, port: int = 0) -> Listener:
        """Takes a port (0: a free one) without listening; ConfigError if it cannot be had."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        reservation = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Two sockets with this option may share a port as long as neither listens: ours never does.
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reservation.bind((host, port))
        except OSError as error:
            reservation.close()
            raise ConfigError(
                f"{join_address(host, port)}: cannot be listened at ({error.strerror}); set CKPTD_ADDRESS to an "
                "address of this node, with a free port or none"
            ) from None
        return cls(host, int(reservation.getsockname()[1]), reservation)

    def release(self) -> None:
        """Gives the reservation up. Idempotent."""
        with contextlib.suppress(OSError):
            self._reservation.close()


def check_reachable(members: Sequence[Announcement]) -> None:
    """ConfigError where some nodes announce a loopback address and others do not: these cannot reach those."""
    hosts = {member.node: ipaddress.ip_address(member.host.partition("%")[0]) for member in members}
    loopback = [node for node, host in hosts.items() if host.is_loopback]
    if loopback and len(loopback) < len(hosts):
        shown = ", ".join(f"{node} ({hosts[node]})" for node in loopback[:8])
        raise ConfigError(
            f"nodes {shown} listen at a loopback address that other nodes cannot reach, as MASTER_ADDR leads there on "
            "them; set CKPTD_ADDRESS on each to an address of its network"
        )
