"""torch.distributed.checkpoint: save, and async_save in three settings. FileSystemWriter fsyncs its files by default.

`cached` is async_save with a stager that keeps its buffers between saves; `process` writes from a process of its own,
out of shared memory. Both follow the documentation of torch 2.13.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save

from benchmarks.contender import Blocking, Contender
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


class DcpSave(Blocking):
    """dcp.save: blocks until all is written."""

    def write(self, step: int) -> None:
        self._directory = self.directory / f"step-{step}"
        save(_state(self.workload), checkpoint_id=self._directory)

    def load(self) -> None:
        _load(self.workload, self._directory)

    def saved(self) -> Path:
        return self._directory


class DcpAsyncSave(Contender):
    """dcp.async_save with its defaults: staged into fresh host memory, written by a thread."""

    kind = AsyncCheckpointerType.THREAD

    def __init__(self, workload: Workload, directory: Path) -> None:
        super().__init__(workload, directory)
        self._stager = self.make_stager()
        self._group = dist.new_group(backend="gloo")  # its thread must not share a group with the training loop

    def make_stager(self) -> DefaultStager | None:
        """A stager that outlives a save; None leaves the choice to async_save."""
        return None

    def boundary(self, step: int, *, save: bool) -> None:
        if not save:
            return
        self.sealed_at = self.durable_at = None
        self._directory = self.directory / f"step-{step}"
        response = async_save(
            _state(self.workload),
            checkpoint_id=self._directory,
            process_group=self._group,
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
        )
        if isinstance(response, AsyncSaveResponse):
            response.staging_completion.result()  # before the next update of the weights, says its documentation
            self._upload: Future[Any] = response.upload_completion
        else:
            self._upload = response
        self.sealed_at = time.perf_counter()
        self._upload.add_done_callback(self._uploaded)

    def _uploaded(self, upload: Future[Any]) -> None:
        if upload.exception() is None:
            self.durable_at = time.perf_counter()

    def poll(self) -> None:
        if self._upload.done():
            self._upload.result()

    def load(self) -> None:
        _load(self.workload, self._directory)

    def saved(self) -> Path:
        return self._directory

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class DcpAsyncSaveCached(DcpAsyncSave):
    """dcp.async_save that keeps its staging buffers between saves."""

    def make_stager(self) -> DefaultStager:
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
        )


class DcpAsyncSaveProcess(DcpAsyncSave):
    """dcp.async_save that writes from another process, out of shared staging buffers that it keeps."""

    kind = AsyncCheckpointerType.PROCESS

    def make_stager(self) -> DefaultStager:
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
            )
        )
