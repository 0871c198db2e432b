"""The store: checkpoints on disk, written durably and read with suspicion.

The only writer of checkpoints. `Store` says which exist; `CheckpointWriter` and `PartWriter` write one;
`StoredCheckpoint` reads one. File systems are behind `Disk`.
"""

from ckptd.format.commit import Commit, Part
from ckptd.tiers.store.reader import StoredCheckpoint
from ckptd.tiers.store.store import Store, open_checkpoint
from ckptd.tiers.store.writer import CheckpointWriter, PartWriter

__all__ = ["CheckpointWriter", "Commit", "Part", "PartWriter", "Store", "StoredCheckpoint", "open_checkpoint"]
