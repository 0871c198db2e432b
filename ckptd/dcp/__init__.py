"""torch.distributed.checkpoint on checkpoints of ckptd: `StorageWriter` and `StorageReader`.

    dcp.save(state, storage_writer=StorageWriter(path, step=100))
    dcp.load(state, storage_reader=StorageReader(path))

Planning, collectives and staging stay DCP's; what is written is the format of docs/format.md, durable, checksummed and
without pickle. The modules: `names` (what an entry is called on both sides), `values` (tensors and objects as bytes),
`writer`, `reader`. See docs/guides/dcp.md.
"""

from ckptd.dcp.reader import StorageReader
from ckptd.dcp.writer import StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
