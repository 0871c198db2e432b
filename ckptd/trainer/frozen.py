"""Frozen tensors: captured once, into a region that a rank's slots share, and watched from then on.

Owns what was read of them. That they do not change is what makes them cheap, and it is checked, not believed: versions,
addresses and first bytes at every capture, all bytes in one of a hundred; only the latter is proof.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ckptd.core.catalog import Catalog
from ckptd.core.errors import CorruptionError
from ckptd.tiers.arena import Slot, identity, layout
from ckptd.trainer.copying import CopyJobs
from ckptd.trainer.state_tensors import Source


class Frozen:
    """The frozen chunks of one layout and what they held when the layout was made; `identity` names that."""

    def __init__(
        self, catalog: Catalog, sources: Sequence[Source], aliases: dict[str, str], rank: int, threads: int
    ) -> None:
        """Reads every tensor once. `catalog`: places in the region."""
        self._jobs = CopyJobs(catalog, sources, aliases)
        self._threads = threads
        self._witness = self._jobs.witness(self._jobs.rows)
        self._crcs = self._checksums()
        self._geometry, self._table = layout(rank, catalog, 0)
        self.identity = identity(self._geometry, self._crcs)
        self.size = self._geometry.size

    def _checksums(self) -> npt.NDArray[np.uint32]:
        found = np.zeros(len(self._jobs.catalog), np.uint32)
        self._jobs.checksum(self._jobs.rows, found, self._threads)
        self._jobs.spread(found)
        return found

    def changed(self, sources: Sequence[Source], audit: bool) -> list[str]:
        """Keys of tensors that are not what they were, in `sources` as they are now; all bytes are looked at only if
        `audit`. Where the same values lie elsewhere that counts as a change."""
        if not self._jobs.refresh(sources):
            return sorted({info.key for info in self._jobs.catalog.tensors})
        found = self._checksums() if audit else self._crcs
        return self._jobs.written(self._jobs.rows, self._witness, self._crcs, found)

    def region(self, old: Slot | None) -> Slot:
        """The region: `old`, which was made for this identity, with what is damaged in it written anew, or a new one.
        Raises ConfigError where memory is short."""
        region = Slot.create(self._geometry, self._table) if old is None else old
        region.mend(self._table)
        damaged = self._jobs.rows if old is None else self._damaged(region)
        if len(damaged):
            self._jobs.copy(damaged, region.map(), np.zeros_like(self._crcs), self._threads)
            region.unmap()
        region.commit(None, self._crcs, b"")
        return region

    def _damaged(self, region: Slot) -> npt.NDArray[np.int64]:
        catalog = self._jobs.catalog
        buffer = memoryview(bytearray(int(catalog.raw.max(initial=0))))
        damaged = []
        for row in self._jobs.rows.tolist():
            try:
                region.read(int(catalog.file_offset[row]), int(self._crcs[row]), buffer[: int(catalog.raw[row])])
            except CorruptionError:
                damaged.append(row)
        return np.array(damaged, np.int64)
