"""Several real processes with a gloo group, kept for all tests of a session; each runs what it is sent."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0


class World:
    """`size` ranks. `run` calls a function of a test module on each and returns results, or exceptions, by rank.

    `preload`: a module that all ranks are forked from, once it is imported; without, each imports what it is sent.
    """

    def __init__(self, size: int, directory: Path, preload: str | None = None) -> None:
        context = multiprocessing.get_context("spawn" if preload is None else "forkserver")
        if preload is not None:
            multiprocessing.set_forkserver_preload([preload])
        self._ranks = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, str(directory / "rendezvous"), there), daemon=True
            )
            process.start()
            there.close()
            self._ranks.append((process, here))

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for _, pipe in self._ranks:
            pipe.send((function, arguments))
        answers = []
        for rank, (_, pipe) in enumerate(self._ranks):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} hangs in {function.__name__}")
            try:
                answers.append(pipe.recv())
            except (EOFError, ConnectionResetError) as error:  # it has died
                answers.append(error)
        return answers

    def close(self) -> None:
        for process, pipe in self._ranks:
            pipe.close()
            process.join(10)
            process.kill()
            process.join()


def succeeded(answers: list[Any]) -> list[Any]:
    """The results, if no rank failed."""
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


def _serve(rank: int, size: int, rendezvous: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            answer = function(*arguments)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        pipe.send(answer)
    dist.destroy_process_group()
