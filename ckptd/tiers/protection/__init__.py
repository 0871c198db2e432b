"""Protection of snapshots by other nodes' memory: seal records, parities, and what is made of them after a loss (see
docs/erasure.md).

Owns the movement and the arithmetic, nothing of the decisions: those are in protocol/cluster.
"""

from ckptd.tiers.protection.area import AreaState, ParityArea
from ckptd.tiers.protection.group import Holders, SealedGroup
from ckptd.tiers.protection.protector import Protector
from ckptd.tiers.protection.record import SealRecord, describe

__all__ = ["AreaState", "Holders", "ParityArea", "Protector", "SealRecord", "SealedGroup", "describe"]
