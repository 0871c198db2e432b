"""What daemons have instead of what they should have, for faults that alter it."""

from __future__ import annotations

import dataclasses

from ckptd.core.errors import ConfigError
from ckptd.tiers.peers import Credentials, Identity
from ckptd.tiers.peers.identity import TOKEN_BYTES
from ckptd.tiers.protection import ParityArea


def token(credentials: Credentials) -> Credentials:
    """That of no epoch."""
    return dataclasses.replace(credentials, token=bytes(TOKEN_BYTES))


def certificate(credentials: Credentials) -> Credentials:
    """One that nobody has heard of."""
    return dataclasses.replace(credentials, identity=Identity.ephemeral(credentials.node, credentials.epoch))


def memory(area: ParityArea) -> ParityArea:
    """None is left."""
    area.close()
    raise ConfigError(f"snapshot memory: {area.memory_bytes} more bytes needed, 0 available (a test)")
