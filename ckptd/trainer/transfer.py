"""Copies from CUDA devices into a slot, from the boundary until the slot has their bytes and checksums.

The training thread queues copies and makes streams wait for them, and waits for nothing itself; another thread finds
out when they are complete. What is copied from is held until then, so that the caching allocator cannot give the memory
to anybody else. (`record_stream` would defer the reuse as well, but only for memory that PyTorch allocated, and by more
events.) Errors are remembered, and told once everything that was queued is over: before that the slot is not free.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ckptd.core.native import CudaCopy
from ckptd.trainer import device
from ckptd.trainer.copying import CopyJobs, Rows

PIECE_BYTES, MOST_PIECES = 64 * 1024 * 1024, 64
"""Checksums are taken of one piece while the next is copied."""

SMALL_BYTES = 4096
"""Rows of up to so many bytes are queued together: the engine gathers neighbours."""

CHECKSUM_THREADS = 4
"""As fast together as a device copies; the other cores belong to the training."""

WAIT_SLICE_S = 0.1


class Transfer:
    """The copies of one capture. See the module docstring."""

    def __init__(self, jobs: CopyJobs, target: int) -> None:
        """`target`: the address of the slot's data."""
        self._jobs, self._target = jobs, target
        self._held: Sequence[torch.Tensor] = jobs.tensors
        self._pieces: list[tuple[CudaCopy, Rows]] = []
        self._last: dict[int, CudaCopy] = {}
        self._waiting: set[tuple[int, int]] = set()
        self.failed = ""
        """Why the slot does not get what it should, if so."""

    # --- the training thread

    def queue(self, rows: Rows, after: device.Streams) -> None:
        """Queues copies of these rows, after what is queued on the streams so far."""
        cuda = device.engine()
        assert cuda is not None
        self._waiting.clear()
        for number, there in self._jobs.on_cuda(rows).items():
            written_by = list(after.get(number, ()))
            for piece in self._cut(there):
                if self.failed:
                    return
                try:
                    copy = cuda.copy(number, written_by, *self._jobs.columns(piece, self._target))
                except RuntimeError as error:
                    self.failed = str(error)
                    return
                self._pieces.append((copy, piece))
                self._last[number] = copy
                self.failed = copy.error
                written_by = []  # the copies of a device follow each other

    def hold(self, streams: device.Streams) -> None:
        """What is queued on these streams from now on waits for all copies queued so far."""
        for number, handles in streams.items():
            copy = self._last.get(number)
            for stream in handles if copy is not None else ():
                if (number, stream) in self._waiting:
                    continue
                try:
                    assert copy is not None
                    if copy.hold(stream):
                        self._waiting.add((number, stream))
                except RuntimeError as error:  # the stream may write while the copy reads
                    self.failed = self.failed or str(error)

    def _cut(self, rows: Rows) -> list[Rows]:
        raw = self._jobs.catalog.raw[rows]
        small = rows[raw <= SMALL_BYTES]
        big = rows[raw > SMALL_BYTES]
        pieces = self._jobs.slices(big, max(PIECE_BYTES, int(raw.sum()) // MOST_PIECES)) if len(big) else ()
        return [*([small] if len(small) else []), *pieces]

    # --- another thread

    def finish(self, crcs: npt.NDArray[np.uint32]) -> None:
        """Waits until what is queued is over, and notes the checksums of what is in the slot then."""
        while self._pieces:
            copy, rows = self._pieces.pop(0)
            try:
                while not copy.finished(WAIT_SLICE_S):
                    pass
                self.failed = self.failed or copy.error
                if not self.failed:
                    copy.settle()
                    self._jobs.checksum_copies(rows, self._target, crcs, CHECKSUM_THREADS)
            except RuntimeError as error:
                self.failed = self.failed or str(error)

    def release(self) -> None:
        """Lets go of the sources; nothing is queued any more."""
        self._held, self._last = (), {}
