"""Plans of torch.distributed.checkpoint's default planner beside ours, for the same chunks and the same wants.

The state is a model of 7 billion parameters with two moments of its optimizer, sharded in rows (FSDP2). Its tensors are
stand-ins that tell DCP their chunks, as DTensors do through the same methods, but without computing them from a mesh
first: that makes DCP faster than it is in a job, and no process group is needed. Not counted for either: making the
questions, and sending plans between ranks.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_load_plan,
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ckptd.core.box import Box, padded
from ckptd.core.catalog import ALL_RANKS, Catalog
from ckptd.plan.exchange import plan_exchange
from ckptd.plan.load import Want, plan_boxes, plan_load
from ckptd.plan.save import Piece, plan_save

SAVED_RANKS = 192
RANKS = 256
SAMPLED_RANKS = 16
ROUNDS = 3

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Seconds for one question, and what it had for an answer."""

    question: str
    ours_s: float
    peer_s: float
    items: int


def shapes() -> dict[str, Shape]:
    """The tensors of the state."""
    layer = {
        **{f"attention.{name}.weight": (4096, 4096) for name in ("wq", "wk", "wv", "wo")},
        **{f"feed_forward.{name}.weight": (11008, 4096) for name in ("w1", "w3")},
        "feed_forward.w2.weight": (4096, 11008),
        "attention_norm.weight": (4096,),
        "ffn_norm.weight": (4096,),
    }
    model: dict[str, Shape] = {
        "tok_embeddings.weight": (32000, 4096),
        "norm.weight": (4096,),
        "output.weight": (32000, 4096),
    }
    for number in range(32):
        model |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    kinds = ("model.{}", "optimizer.state.{}.exp_avg", "optimizer.state.{}.exp_avg_sq")
    return {kind.format(key): shape for kind in kinds for key, shape in model.items()}


def shard(shape: Shape, rank: int, world: int) -> tuple[Shape, Shape]:
    """(offsets, sizes) of a rank's rows, split as torch.chunk does."""
    run = -(-shape[0] // world)
    start = min(rank * run, shape[0])
    rest = (0,) * (len(shape) - 1)
    return (start, *rest), (min(run, shape[0] - start), *shape[1:])


class StandIn:
    """A sharded tensor that knows its chunk and no more."""

    def __init__(self, shape: Shape, rank: int, world: int) -> None:
        offsets, sizes = shard(shape, rank, world)
        self._shape = torch.Size(shape)
        self._chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    def size(self) -> torch.Size:
        return self._shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk]

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        properties = TensorProperties(torch.float32)
        data = TensorWriteData(chunk=self._chunk, properties=properties, size=self._shape)
        return [WriteItem(index=MetadataIndex(fqn, self._chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)]


def saved(tensors: dict[str, Shape]) -> tuple[Catalog, Metadata]:
    """What SAVED_RANKS saved: one chunk for each shard that is not empty, for both sides the same ones."""
    entries: list[tuple[int, Shape, Shape]] = []
    metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for number, (key, shape) in enumerate(tensors.items()):
        boxes = [shard(shape, rank, SAVED_RANKS) for rank in range(SAVED_RANKS)]
        boxes = [box for box in boxes if box[1][0]]
        entries += [(number, *box) for box in boxes]
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        metadata[key] = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), chunks)
    names = [(key, "float32", shape) for key, shape in tensors.items()]
    offsets, sizes = padded([low for _, low, _ in entries], 2, 0), padded([size for _, _, size in entries], 2, 1)
    return Catalog.build(names, [number for number, _, _ in entries], offsets, sizes), Metadata(metadata)


def seconds(*sides: Callable[[], object]) -> list[float]:
    """What each takes: the medians of ROUNDS in turn."""
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for side, taken in zip(sides, found, strict=True):
            gc.collect()
            start = time.perf_counter()
            side()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in found]


def compare() -> list[Comparison]:
    """Every question, ours and the peer's in turn."""
    tensors = shapes()
    return [*_loads(tensors), _save(tensors)]


def _loads(tensors: dict[str, Shape]) -> Iterator[Comparison]:
    """One rank's plan, and those of all ranks."""
    catalog, metadata = saved(tensors)
    ours, peers, items = [], [], []
    for rank in range(0, RANKS, RANKS // SAMPLED_RANKS):
        shards = {key: shard(shape, rank, RANKS) for key, shape in tensors.items()}
        wants = [Want(key, "float32", tensors[key], Box(*box)) for key, box in shards.items()]
        state = {key: StandIn(shape, rank, RANKS) for key, shape in tensors.items() if shards[key][1][0]}
        one, other = seconds(
            lambda wants=wants: plan_load(catalog, wants, rank=ALL_RANKS),  # type: ignore[misc]
            lambda state=state: create_default_local_load_plan(state, metadata),  # type: ignore[misc]
        )
        ours.append(one)
        peers.append(other)
        local = create_default_local_load_plan(state, metadata)
        items.append(len(local.items))
        if items[-1] != len(plan_load(catalog, wants, rank=ALL_RANKS)):
            raise RuntimeError(f"rank {rank}: the plans differ in length")
        create_default_global_load_plan([local])  # returns what it is given
    yield Comparison(
        f"load, the plan of one rank of {RANKS} (median of {SAMPLED_RANKS})",
        statistics.median(ours),
        statistics.median(peers),
        int(statistics.median(items)),
    )
    entries = [(catalog.index[key], *shard(shape, r, RANKS)) for r in range(RANKS) for key, shape in tensors.items()]
    tensor = np.array([number for number, _, _ in entries])
    offsets, sizes = padded([low for _, low, _ in entries], 2, 0), padded([size for _, _, size in entries], 2, 1)

    def all_ranks() -> int:
        plan = plan_boxes(catalog, tensor, offsets, sizes)
        first = np.searchsorted(plan.want, np.arange(RANKS + 1) * len(tensors))
        wanted = [np.unique(plan.row[first[rank] : first[rank + 1]]) for rank in range(RANKS)]
        plan_exchange(catalog.raw, wanted, np.arange(RANKS) // 8)
        return len(plan)

    yield Comparison(
        f"load, all ranks in one process (ours with who reads for whom; DCP: {SAMPLED_RANKS} ranks, scaled up)",
        seconds(all_ranks)[0],
        statistics.mean(peers) * RANKS,
        all_ranks(),
    )


def _save(tensors: dict[str, Shape]) -> Comparison:
    """The plans of all ranks, and the global one."""
    pieces = [
        [Piece(key, "float32", shape, *shard(shape, rank, RANKS), "sharded") for key, shape in tensors.items()]
        for rank in range(RANKS)
    ]
    states = [
        {key: StandIn(shape, rank, RANKS) for key, shape in tensors.items() if shard(shape, rank, RANKS)[1][0]}
        for rank in range(RANKS)
    ]

    def peer() -> int:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        plans = [create_default_local_save_plan(state, rank == 0) for rank, state in enumerate(states)]
        planner.create_global_plan(plans)
        return sum(len(plan.items) for plan in plans)

    one, other = seconds(lambda: plan_save(pieces), peer)
    count = peer()
    if count != sum(map(len, plan_save(pieces))):
        raise RuntimeError("the save plans differ in length")
    return Comparison(f"save, all {RANKS} ranks in one process", one, other, count)


def peer_table(results: Sequence[Comparison]) -> str:
    """A line for each question."""
    lines = [
        f"State of 7e9 parameters and two moments, {len(shapes())} tensors, saved by {SAVED_RANKS} ranks in rows and "
        f"loaded by {RANKS}; torch {torch.__version__}; medians of {ROUNDS} rounds in turn.",
        "",
        "| question | items | ckptd s | DCP s | times faster |",
        "|---|--:|--:|--:|--:|",
    ]
    for r in results:
        lines.append(f"| {r.question} | {r.items:,} | {r.ours_s:.4f} | {r.peer_s:.4f} | {r.peer_s / r.ours_s:.0f} |")
    return "\n".join(lines) + "\n"
