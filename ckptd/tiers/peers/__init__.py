"""The memory of other nodes as a place to read from: Arrow Flight between the daemons of a job (see
docs/guides/network.md).

Owns transfers and their security: who may ask, what is checked on the way, how much memory and time it may take. What
to pull and what to do with it is decided elsewhere. All transfers are pulls.
"""

from ckptd.tiers.peers.address import Listener, check_reachable, listening_address
from ckptd.tiers.peers.client import Peer
from ckptd.tiers.peers.identity import Announcement, Credentials, Identity, new_token
from ckptd.tiers.peers.pulling import Cancellation, Peers, Pull
from ckptd.tiers.peers.server import PeerServer
from ckptd.tiers.peers.sources import (
    DescriptorSource,
    Extent,
    Extents,
    Fragments,
    MemorySource,
    Source,
    Sources,
    memories_of,
    string_of,
)
from ckptd.tiers.throttle import Throttle

__all__ = [
    "Announcement",
    "Cancellation",
    "Credentials",
    "DescriptorSource",
    "Extent",
    "Extents",
    "Fragments",
    "Identity",
    "Listener",
    "MemorySource",
    "Peer",
    "PeerServer",
    "Peers",
    "Pull",
    "Source",
    "Sources",
    "Throttle",
    "check_reachable",
    "listening_address",
    "memories_of",
    "new_token",
    "string_of",
]
