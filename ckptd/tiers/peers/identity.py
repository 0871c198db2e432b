"""Who is a peer: certificates, the token of the epoch, and what the membership exchange carries of them.

By default each daemon makes a key and a self-signed certificate for each epoch, in memory, and pins the certificates
that came by the membership exchange: a client trusts for each peer that peer's certificate alone, a server those of the
members. A site's own authority takes the place of pinning where a directory is given.

Invariants: keys and tokens are never written to a file and never appear in a repr. Certificates do not expire, so that
safety does not depend on clocks: what ends them is the end of the epoch.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import ipaddress
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ckptd.core.errors import ConfigError, FormatError
from ckptd.core.types import Epoch, Job

TOKEN_BYTES = 32
MOST_CERTIFICATE_CHARACTERS = 16 * 1024
_ALWAYS = datetime.datetime(2000, 1, 1), datetime.datetime(9999, 12, 31, 23, 59, 59)


def new_token() -> bytes:
    """A secret of one epoch; made by rank 0 and carried by the job's own process group."""
    return secrets.token_bytes(TOKEN_BYTES)


@dataclasses.dataclass(frozen=True)
class Identity:
    """Certificate and key of this daemon, PEM. `name` is the DNS name in the certificate; `authority` is a site's CA
    (None: certificates are pinned). The key is a secret of the process: where it must outlive it, only in memory."""

    name: str
    certificate: bytes = dataclasses.field(repr=False)
    key: bytes = dataclasses.field(repr=False)
    authority: bytes | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def ephemeral(cls, node: str, epoch: Epoch) -> Identity:
        """A new key with a certificate signed by itself, for one node and epoch. No authority can be made of it."""
        name = f"n{hashlib.sha256(node.encode()).hexdigest()[:16]}.{epoch.nonce}.ckptd"
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_ALWAYS[0])
            .not_valid_after(_ALWAYS[1])
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return cls(name, certificate.public_bytes(serialization.Encoding.PEM), private)

    @classmethod
    def load(cls, directory: Path) -> Identity:
        """A site's own: `ca.pem`, `cert.pem` (the node's first, then intermediates) and `key.pem`, unencrypted.

        ConfigError for what is missing, does not belong together, is not valid now or has no DNS name.
        """
        found = {}
        for file in ("ca.pem", "cert.pem", "key.pem"):
            try:
                found[file] = (directory / file).read_bytes()
            except OSError as error:
                raise ConfigError(f"TLS directory {directory}: {file}: {error.strerror}") from None
        try:
            x509.load_pem_x509_certificates(found["ca.pem"])
            certificate = x509.load_pem_x509_certificates(found["cert.pem"])[0]
            key = serialization.load_pem_private_key(found["key.pem"], None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"TLS directory {directory}: expected unencrypted PEM files: {error}") from None
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"TLS directory {directory}: key.pem is not the key of cert.pem")
        now = datetime.datetime.now(datetime.UTC)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise ConfigError(
                f"TLS directory {directory}: cert.pem is valid from {certificate.not_valid_before_utc} to "
                f"{certificate.not_valid_after_utc}, and it is {now}; renew it, or set the clock"
            )
        try:
            name = _dns_name(certificate)
        except FormatError as error:
            raise ConfigError(f"TLS directory {directory}: cert.pem: {error}") from None
        return cls(name, found["cert.pem"], found["key.pem"], found["ca.pem"])


def _dns_name(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(x509.DNSName)[0]
    except (x509.ExtensionNotFound, IndexError, ValueError):
        raise FormatError("a certificate without a DNS name as subject alternative name") from None


class Announcement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the membership exchange carries of a node: its name, where it listens, its certificate (empty: no TLS)."""

    node: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    certificate: Annotated[str, msgspec.Meta(max_length=MOST_CERTIFICATE_CHARACTERS)] = ""

    def check(self) -> Announcement:
        """Itself, if host and certificate can be what they should; raises FormatError."""
        try:
            ipaddress.ip_address(self.host.partition("%")[0])
        except ValueError:
            raise FormatError(f"node {self.node!r}: host {self.host!r}: expected a numeric address") from None
        if self.certificate:
            _ = self.server_name
        return self

    @property
    def server_name(self) -> str:
        """The DNS name in its certificate. Raises FormatError."""
        try:
            return _dns_name(x509.load_pem_x509_certificates(self.certificate.encode())[0])
        except (ValueError, FormatError) as error:
            raise FormatError(f"node {self.node!r}: its certificate: {error}") from None


@dataclasses.dataclass(frozen=True)
class Credentials:
    """What a daemon shows to its peers in an epoch. `identity` None: no TLS; then the token crosses the network in
    clear, and who can read there can read and ask everything."""

    job: Job
    epoch: Epoch
    node: str
    token: bytes = dataclasses.field(repr=False)
    identity: Identity | None

    def __post_init__(self) -> None:
        if len(self.token) != TOKEN_BYTES:
            raise ValueError(f"a token of {len(self.token)} bytes: expected {TOKEN_BYTES}")

    def announce(self, host: str, port: int) -> Announcement:
        """What others must know of this node."""
        certificate = "" if self.identity is None else self.identity.certificate.decode()
        return Announcement(self.node, host, port, certificate).check()

    def trusted_clients(self, members: Sequence[Announcement]) -> bytes:
        """PEM of what a server accepts: the site's authority, or the certificates of the members and no other."""
        assert self.identity is not None
        if self.identity.authority is not None:
            return self.identity.authority
        return "\n".join(member.certificate for member in members).encode()

    def trusted_server(self, peer: Announcement) -> bytes:
        """PEM of what a client accepts at a peer: the site's authority, or that peer's certificate and no other."""
        assert self.identity is not None
        return self.identity.authority or peer.certificate.encode()
