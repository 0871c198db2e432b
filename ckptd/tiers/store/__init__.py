"""The store: checkpoints in files or objects, written durably and read with suspicion.

The only writer of checkpoints. `Store` says which exist; `CheckpointWriter` and `PartWriter` write one;
`StoredCheckpoint` reads one. Where they are is behind `BackEnd`: files on a `Disk`, or objects.
"""

from ckptd.format.commit import Commit, Part
from ckptd.tiers.store.reader import StoredCheckpoint
from ckptd.tiers.store.store import Store, is_checkpoint, not_shared, open_checkpoint, sees_token
from ckptd.tiers.store.writer import CheckpointWriter, PartWriter

__all__ = [
    "CheckpointWriter",
    "Commit",
    "Part",
    "PartWriter",
    "Store",
    "StoredCheckpoint",
    "is_checkpoint",
    "not_shared",
    "open_checkpoint",
    "sees_token",
]
