"""The store: checkpoints in files or objects, written durably and read with suspicion. The only writer of checkpoints.

    joint, resumable           a checkpoint of nodes that do not wait for each other; one written in several sittings
    store                      which checkpoints and epochs exist; pruning and cleaning. What others begin with
    writer, pipeline, journal  writing one: parts by many writers, then COMMIT by one; notes of what is finished
    reader, runs               reading one
    parts, names               the files that one consists of
    object_store, filesystems  places: S3 and the like, objects that are put whole
    files, disk, posix         places: directories, files that are synced and renamed
    location, backend          how a place is spelled, and what all of them can do

Each imports from those below it. The order of writing, and what a crash leaves: docs/format.md, section 9.
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
