"""torch.distributed.checkpoint: save, and async_save in two settings. FileSystemWriter fsyncs its files by default."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save

from benchmarks.contender import Blocking, OnDisk
from benchmarks.workload import Workload


def _state(workload: Workload) -> dict[str, Any]:
    model, optimizer = get_state_dict(workload.model, workload.optimizer)
    return {"model": model, "optimizer": optimizer}


def _load(workload: Workload, directory: Path) -> None:
    state = _state(workload)
    load(state, checkpoint_id=directory)
    set_state_dict(
        workload.model,
        workload.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def _is_complete(directory: Path) -> bool:
    return (directory / ".metadata").exists()  # written last, renamed into place


class DcpSave(Blocking):
    """dcp.save: blocks until all is written."""

    def write(self, step: int, directory: Path) -> None:
        save(_state(self.workload), checkpoint_id=directory)

    def read(self, directory: Path) -> None:
        _load(self.workload, directory)

    def is_complete(self, directory: Path) -> bool:
        return _is_complete(directory)


class DcpAsyncSave(OnDisk):
    """dcp.async_save with its defaults: staged into fresh host memory, written by a thread."""

    kind = AsyncCheckpointerType.THREAD

    def __init__(self, workload: Workload, directory: Path, flush_every: int) -> None:
        super().__init__(workload, directory, flush_every)
        self._stager = self.make_stager()
        self._group = dist.new_group(backend="gloo")  # its thread must not share a group with the training loop
        self._staging: Future[Any] | None = None
        self._upload: Future[Any] | None = None
        self._durable = 0

    def make_stager(self) -> DefaultStager | None:
        """A stager that outlives a save; None leaves the choice to async_save."""
        return None

    def write(self, step: int, directory: Path) -> None:
        if self._upload is not None:
            self._upload.result()  # one at a time, says its documentation
        response = async_save(
            _state(self.workload),
            checkpoint_id=directory,
            process_group=self._group,
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
        )
        staged = isinstance(response, AsyncSaveResponse)
        self._staging, self._upload = (
            (response.staging_completion, response.upload_completion) if staged else (None, response)
        )
        self._upload.add_done_callback(lambda upload: self._uploaded(step, upload))

    def before_update(self) -> None:
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def _uploaded(self, step: int, upload: Future[Any]) -> None:
        if upload.exception() is None:
            self._durable = step

    def durable(self) -> int:
        upload = self._upload
        if upload is not None and upload.done():
            upload.result()
        return self._durable

    def read(self, directory: Path) -> None:
        _load(self.workload, directory)

    def is_complete(self, directory: Path) -> bool:
        return _is_complete(directory)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class DcpAsyncSaveFastest(DcpAsyncSave):
    """dcp.async_save as fast as it gets on a CPU: a process of its own writes out of shared buffers that are kept and
    filled by a thread; only the next update of the weights waits for that."""

    kind = AsyncCheckpointerType.PROCESS

    def make_stager(self) -> DefaultStager:
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
            )
        )
