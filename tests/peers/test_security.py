"""Who is let in: certificates, tokens, epochs, jobs; and what is said to the others."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ckptd.core.errors import CkptdError, ConfigError, DaemonError, FormatError, VersionError
from ckptd.core.types import Epoch, Job
from ckptd.tiers.peers import Announcement, Credentials, Identity, Peer, PeerServer, new_token
from ckptd.tiers.peers.address import Listener
from ckptd.tiers.peers.sources import Sources
from ckptd.tiers.peers.wire import check_headers, headers
from tests.peers.nodes import EPOCH, SNAPSHOT, TOKEN, WAIT_S, Node, Scripted, credentials, random_bytes


def _try(node: Node, shown: Credentials, announcement: Announcement | None = None) -> None:
    """Both kinds of call, each of which must be let in."""
    peer = Peer(shown, announcement or node.announcement, deadline_s=WAIT_S)
    try:
        peer.ask("Ping", b"")
        peer.pull(SNAPSHOT, "string", 0, np.zeros(10, np.uint8).data)
    finally:
        peer.close()


_IMPOSTORS: dict[str, tuple[Callable[[Credentials], Credentials], type[CkptdError], str]] = {
    "token": (lambda c: dataclasses.replace(c, token=new_token()), ConfigError, "another token than epoch 7-"),
    "token of zeros": (lambda c: dataclasses.replace(c, token=bytes(32)), ConfigError, "another token"),
    "older epoch": (
        lambda c: dataclasses.replace(c, epoch=Epoch(6, "fedcba9876543210")),
        DaemonError,
        "of epoch '6-fedcba9876543210', this node is in 7-0123456789abcdef",
    ),
    "same number, other launch": (
        lambda c: dataclasses.replace(c, epoch=Epoch(7, "fedcba9876543210")),
        DaemonError,
        "of epoch '7-fedcba9876543210'",
    ),
    "job": (
        lambda c: dataclasses.replace(c, job=Job("another")),
        ConfigError,
        "of another job .* not 'tests of peers'",
    ),
    "stranger": (lambda c: dataclasses.replace(c, node="stranger"), ConfigError, "'stranger' is not a member"),
}


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("name", _IMPOSTORS)
def test_refused_by_what_is_wrong(name: str, tls: bool) -> None:
    """Messages and pulls alike, before anything of the request is looked at."""
    change, kind, text = _IMPOSTORS[name]
    here = credentials("here", tls=tls)
    asked = []
    with Node("there", [here], tls=tls, answer=lambda *message: asked.append(message) or b"") as node:
        source = Scripted(random_bytes(10))
        node.sources.register(SNAPSHOT, "string", source)
        _try(node, here)
        assert (len(asked), len(source.reads)) == (1, 1)
        peer = Peer(change(here), node.announcement, deadline_s=WAIT_S)
        with pytest.raises(kind, match=f"node there at .*: refused: .*{text}"):
            peer.ask("Ping", b"")
        with pytest.raises(kind, match=f"node there at .*: refused: .*{text}"):
            peer.pull(SNAPSHOT, "string", 0, np.zeros(10, np.uint8).data)
        peer.close()
        assert (len(asked), len(source.reads)) == (1, 1)


def test_headers_that_are_missing_or_twice_are_refused() -> None:
    own = credentials("here", tls=False)
    good = {name.decode(): [value.decode()] for name, value in headers(own)}
    assert check_headers(good, own, {"here"}) == "here"
    for name in good:
        for bad in ([], good[name] * 2, [""], [good[name][0] + "0"], [b"bytes"]):
            with pytest.raises((ConfigError, DaemonError, VersionError), match="refused"):
                check_headers(good | {name: bad}, own, {"here"})  # type: ignore[dict-item]
        with pytest.raises((ConfigError, DaemonError, VersionError), match="refused"):
            check_headers({key: value for key, value in good.items() if key != name}, own, {"here"})
    with pytest.raises(ConfigError):
        check_headers(good | {"ckptd-token": ["é" * 64]}, own, {"here"})


def test_node_names_may_be_anything() -> None:
    here = credentials("knoten/ü \r\n x: y")
    with Node("there", [here], answer=lambda node, kind, body: node.encode()) as node:
        peer = Peer(here, node.announcement)
        assert peer.ask("Name", b"").decode() == here.node
        peer.close()


def _first_bytes(port: int, context: ssl.SSLContext) -> bytes:
    """What a server says first; nothing if it does not let one in. TLS 1.3 tells a client only after the handshake."""
    context.set_alpn_protocols(["h2"])
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), WAIT_S) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        return wrapped.recv(9)
    return b""


def test_a_server_accepts_the_members_certificates_alone(tmp_path: Path) -> None:
    """Right token and name, but a certificate that the membership exchange did not carry; and none at all."""
    here = credentials("here")
    assert here.identity is not None
    with Node("there", [here], answer=lambda *message: b"") as node:
        with pytest.raises(DaemonError, match=r"node there at .* does not accept this node's certificate"):
            _try(node, credentials("here"))
        context = ssl.create_default_context(cadata=node.announcement.certificate)
        context.check_hostname = False
        assert _first_bytes(node.announcement.port, context) == b""
        pair = tmp_path / "pair.pem"
        pair.write_bytes(here.identity.certificate + here.identity.key)
        context.load_cert_chain(pair)
        assert _first_bytes(node.announcement.port, context) != b""


def test_a_client_accepts_the_peers_certificate_alone() -> None:
    """Another member that listens where the peer should: not even its messages are sent there."""
    here, third = credentials("here"), credentials("third")
    with Node("there", [here, third], answer=lambda *message: b"") as node:
        moved = third.announce("127.0.0.1", node.announcement.port)
        with pytest.raises(ConfigError, match=r"node third at .* another certificate than it announced"):
            _try(node, here, moved)


def test_no_authority_can_be_made_of_a_certificate() -> None:
    """A member signs a certificate for itself under another's name with its own key: nobody accepts it."""
    here = credentials("here")
    assert here.identity is not None
    issuer = x509.load_pem_x509_certificate(here.identity.certificate)
    issuer_key = serialization.load_pem_private_key(here.identity.key, None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    forged = _certificate("forged.ckptd", issuer.subject, issuer_key)
    with Node("there", [here], answer=lambda *message: b"") as node:
        chain = dataclasses.replace(forged, certificate=forged.certificate + here.identity.certificate)
        for identity in (forged, chain):
            with pytest.raises(DaemonError, match="certificate"):
                _try(node, dataclasses.replace(here, identity=identity))


def test_tls_and_no_tls_do_not_mix() -> None:
    here = credentials("here")
    with Node("there", [here], answer=lambda *message: b"") as node, pytest.raises(DaemonError):
        _try(node, dataclasses.replace(here, identity=None))
    with Node("there", [here], tls=False) as node, pytest.raises(FormatError, match="announced no certificate"):
        _try(node, here)


def test_ipv6() -> None:
    here = credentials("here")
    with Node("there", [here], host="::1", answer=lambda *message: b"") as node:
        node.give(random_bytes(10))
        _try(node, here)


def test_secrets_are_not_shown() -> None:
    shown = repr(credentials("here"))
    assert "PRIVATE" not in shown
    assert repr(TOKEN) not in shown
    assert TOKEN.hex() not in shown


def test_a_port_that_is_taken() -> None:
    here = credentials("here")
    with (
        Node("there", [here]) as node,
        pytest.raises(ConfigError, match=r"127\.0\.0\.1:\d+: cannot be listened at .*CKPTD_ADDRESS"),
    ):
        Listener.reserve("127.0.0.1", node.announcement.port)
    first, second = Listener.reserve("127.0.0.1"), Listener.reserve("127.0.0.1")
    assert first.port != second.port
    twin = Listener.reserve("127.0.0.1", first.port)
    server = PeerServer(here, first, [], Sources())
    with pytest.raises(ConfigError, match="does not start"):
        PeerServer(here, twin, [], Sources())
    assert server.close()
    second.release()


@pytest.mark.parametrize(
    "change",
    [{"host": "name.example"}, {"host": ""}, {"certificate": "no PEM"}, {"certificate": "x" * 20_000}],
    ids=str,
)
def test_announcements_are_checked(change: dict[str, str]) -> None:
    good = credentials("here").announce("10.0.0.1", 5)
    with pytest.raises(FormatError, match="here"):
        Announcement(**({field: getattr(good, field) for field in good.__struct_fields__} | change)).check()  # type: ignore[arg-type]


# --- a site's own authority


def _certificate(
    name: str, issuer: x509.Name | None, issuer_key: ec.EllipticCurvePrivateKey | None, **how: object
) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=-1 if how.get("expired") else 1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if not how.get("nameless"):
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Identity(
        name, builder.sign(issuer_key or key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), private
    )


class Site:
    """An authority, and directories with what it issues."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = _certificate("site authority", None, None)
        self.key = serialization.load_pem_private_key(self.authority.key, None)
        self.subject = x509.load_pem_x509_certificate(self.authority.certificate).subject

    def issue(self, name: str, **how: object) -> Path:
        folder = self.directory / name
        folder.mkdir()
        assert isinstance(self.key, ec.EllipticCurvePrivateKey)
        found = _certificate(name, self.subject, self.key, **how)
        for file, content in [("ca", self.authority.certificate), ("cert", found.certificate), ("key", found.key)]:
            (folder / f"{file}.pem").write_bytes(content)
        return folder


def test_a_sites_own_authority(tmp_path: Path) -> None:
    """Certificates of the site are enough, without having been announced; those of others are not, with any token."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    site, other = Site(tmp_path / "one"), Site(tmp_path / "two")
    there = Identity.load(site.issue("there.example"))
    here = dataclasses.replace(credentials("here"), identity=Identity.load(site.issue("here.example")))
    assert there.name == "there.example"
    with Node("there", [here], credentials={"identity": there}, answer=lambda *message: b"") as node:
        node.give(random_bytes(10))
        _try(node, here)
        for wrong in (Identity.load(other.issue("here.example")), Identity.ephemeral("here", EPOCH)):
            with pytest.raises((ConfigError, DaemonError), match="certificate"):
                _try(node, dataclasses.replace(here, identity=wrong))


def test_a_tls_directory_that_cannot_work_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with pytest.raises(ConfigError, match=r"ca\.pem: No such file"):
        Identity.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"it is 2.*renew"):
        Identity.load(site.issue("expired", expired=True))
    with pytest.raises(ConfigError, match="without a DNS name"):
        Identity.load(site.issue("nameless", nameless=True))
    mixed = site.issue("mixed")
    (mixed / "key.pem").write_bytes(site.authority.key)
    with pytest.raises(ConfigError, match=r"key\.pem is not the key of cert\.pem"):
        Identity.load(mixed)
    (mixed / "cert.pem").write_text("rubbish")
    with pytest.raises(ConfigError, match="expected unencrypted PEM"):
        Identity.load(mixed)


def test_a_token_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="expected 32"):
        credentials("here", token=b"short")
