"""What each rank does for the tests of this directory: capture a state into slots, restore it from those of its node.

A process that has captured keeps its slots, as the daemon of its node would; others open them by /proc. A node is
nothing but a number here: ranks get the slots that they are told lie on theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ckptd.core.types import Epoch, SnapshotId
from ckptd.format.objects import pack_table
from ckptd.plan.save import Piece, place, plan_save
from ckptd.plan.share import with_aliases
from ckptd.tiers.arena import Slot, SnapshotReader, layout
from ckptd.trainer import collective, exchange, node_memory
from ckptd.trainer.copying import CopyJobs
from ckptd.trainer.frozen import Frozen
from ckptd.trainer.node_memory import NodeMemory, open_memory
from ckptd.trainer.restoring import restore_state
from ckptd.trainer.saving import pieces_of
from ckptd.trainer.state import AppState
from tests.layouts.applications import local_of, whole
from tests.layouts.model import logical

SNAPSHOT = SnapshotId(Epoch(1, "ab" * 8), 9)
ROOM = 40_000
"""So small that a restore takes several rounds."""

Former = tuple[int, list[int]]
"""A process that has captured, and the descriptors of its slot there."""

BUFFERS = ("model/norm.running_mean", "model/norm.running_var", "model/norm.num_batches_tracked")

_kept: list[Slot] = []


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The node of each rank, of which former ranks each node holds the slots, and which of these are copies."""

    of_rank: list[int]
    slots: dict[int, list[int]]
    copies: dict[tuple[int, int], Former] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is wrong after a restore; bytes sent in messages while it was opened and while it was filled, and longest
    collective of the latter; what generators give; where the loader is; what the rank could not read for itself."""

    problems: list[str]
    told: int
    sent: int
    longest: int
    drawn: list[float]
    at: int
    foreign: set[str]


class Loader:
    """Each rank is somewhere else."""

    def __init__(self, at: int) -> None:
        self.at = at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Model(nn.Module):
    """Small and large weights that divide by nothing, a frozen one, tied ones, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(211, 37)
        self.frozen = nn.Linear(37, 101).requires_grad_(False)
        self.norm = nn.BatchNorm1d(101)
        self.down = nn.Linear(101, 37)
        self.head = nn.Linear(37, 211, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.norm(self.frozen(self.embed(tokens))))))


def build(kind: str) -> dict[str, Any]:
    """A state after a step: "replicated", or "sharded" by FSDP2, or "momentum": sharded with an optimizer that counts
    no steps, so that nothing in it is replicated."""
    torch.manual_seed(1)
    model = Model()
    large = torch.zeros(500, 61)
    if kind != "replicated":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh)
        large = distribute_tensor(large, mesh, [Shard(0)])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, 0.9) if kind == "momentum" else torch.optim.AdamW(trained, 0.01)
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    rank = dist.get_rank()
    return {
        "model": model,
        "optimizer": optimizer,
        "data": {"large": large, "own": torch.Generator().manual_seed(rank)},
        "counter": {"steps": 9},
        "loader": Loader(10 + rank),
    }


def tensors(state: dict[str, Any]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, name, tensor) of all that is the same on every rank."""
    for name, parameter in state["model"].named_parameters():
        yield "model", name, parameter
        for kind, value in state["optimizer"].state.get(parameter, {}).items():
            yield kind, name, value
    yield "data", "large", state["data"]["large"]


def become_logical(state: dict[str, Any]) -> None:
    """Every tensor becomes what it is by name; buffers and generators become each rank's own."""
    rank = dist.get_rank()
    with torch.no_grad():
        for kind, name, tensor in tensors(state):
            value = logical(kind, name, tensor.shape)
            if isinstance(tensor, DTensor):
                value = local_of(distribute_tensor(value, tensor.device_mesh, tensor.placements))
            local_of(tensor).copy_(value)
        state["model"].norm.running_mean.fill_(100.0 + rank)
    torch.manual_seed(20 + rank)
    random.seed(30 + rank)
    np.random.seed(40 + rank)


def scramble(state: dict[str, Any]) -> None:
    with torch.no_grad():
        for _, _, tensor in tensors(state):
            local_of(tensor).fill_(777.0)
        state["model"].norm.running_mean.fill_(777.0)
    state["loader"].at = -1
    state["counter"]["steps"] = -1


def wrong(state: dict[str, Any], buffer: float) -> list[str]:
    found = [
        f"{kind}/{name}" for kind, name, t in tensors(state) if not torch.equal(whole(t), logical(kind, name, t.shape))
    ]
    if not torch.equal(state["model"].norm.running_mean, torch.full((101,), buffer)):
        found.append(f"buffer {state['model'].norm.running_mean[0]}, not {buffer}")
    return found + ([] if state["counter"] == {"steps": 9} else ["counter"])


def draw(state: dict[str, Any]) -> list[float]:
    own = torch.rand((), generator=state["data"]["own"]).item()
    return [torch.rand(()).item(), random.random(), float(np.random.rand()), own]


# --- capturing


def capture(kind: str, freeze: bool = False) -> tuple[Former, list[float]]:
    """This rank's slot of the state, with the frozen weights in a region of its own if `freeze`; what it draws next."""
    state = build(kind)
    become_logical(state)
    app = AppState(state)
    sources, aliases, group = app.sources(), app.aliases(), collective.world()
    told = group.all_gather(msgspec.msgpack.encode(pieces_of(sources)))
    catalog = plan_save([msgspec.msgpack.decode(data, type=list[Piece]) for data in told])[group.rank]
    still = np.array([freeze and info.key in app.frozen() for info in catalog.tensors], bool)[catalog.tensor]
    region = None
    if still.any():
        resting = catalog.select(np.flatnonzero(still))
        resting = resting.replaced(file_offset=place(resting.raw)[0])
        frozen = Frozen(resting, sources, {}, group.rank, 1)
        catalog = catalog.select(np.flatnonzero(~still))
        catalog = catalog.replaced(file_offset=place(catalog.raw)[0])
        region = frozen.region(None), frozen.identity
    catalog = with_aliases(catalog, aliases)
    objects = pack_table(app.objects())
    geometry, table = layout(group.rank, catalog, len(objects), region[1] if region else "")
    slot = Slot.create(geometry, table, region[0] if region else None)
    slot.begin()
    jobs, crcs = CopyJobs(catalog, sources, aliases), np.zeros(len(catalog), np.uint32)
    jobs.copy(jobs.rows, slot.map(), crcs, 1)
    jobs.spread(crcs)
    slot.commit(SNAPSHOT, crcs, objects)
    _kept.append(slot)
    return (os.getpid(), slot.descriptors), draw(state)


def offset_of(part: str) -> int:
    """Where a byte is of the "data", "table" or "objects" of the slot captured last."""
    geometry = _kept[-1].geometry
    starts = {"data": geometry.data_offset, "table": geometry.table_offset, "objects": geometry.objects_offset}
    return starts[part] + 30


def copy_of(former: Former, offset: int | None = None) -> Former:
    """The slot of another process copied into this one, as a rebuild would; one byte of it changed at `offset`."""
    process, descriptors = former
    made = []
    for number, descriptor in enumerate(descriptors):
        with open(f"/proc/{process}/fd/{descriptor}", "rb") as file:
            content = bytearray(file.read())
        if offset is not None and number == 0:
            content[offset] ^= 1
        copied = os.memfd_create("copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(copied, content)
        fcntl.fcntl(copied, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        made.append(copied)
    _kept.append(Slot.open(*made))
    return os.getpid(), made


def let_go() -> None:
    while _kept:
        _kept.pop().close()


# --- restoring


class Count:
    """Bytes that this rank gives to others in messages, and the longest value that it gives to all."""

    def __init__(self) -> None:
        self.sent = self.longest = 0

    def swap(self, group: Any, sent: Any, received: Any) -> None:
        self.sent += sum(len(message.data) for message in sent)
        _swap(group, sent, received)

    def all_gather(self, group: Any, data: bytes) -> list[bytes]:
        self.longest = max(self.longest, len(data))
        return _all_gather(group, data)


_swap, _all_gather = collective.Group.swap, collective.Group.all_gather


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    count = Count()
    collective.Group.swap = lambda group, sent, received: count.swap(group, sent, received)  # type: ignore[method-assign]
    collective.Group.all_gather = lambda group, data: count.all_gather(group, data)  # type: ignore[method-assign]
    try:
        yield count
    finally:
        collective.Group.swap, collective.Group.all_gather = _swap, _all_gather  # type: ignore[method-assign]


@contextlib.contextmanager
def on_node(nodes: Nodes, apart: bool) -> Iterator[None]:
    """`apart`: ranks of other nodes cannot see each other's memory either."""
    if apart:
        os.environ["CKPTD_NODE"] = f"node-{nodes.of_rank[dist.get_rank()]}"
    room, exchange.ROOM_BYTES = exchange.ROOM_BYTES, ROOM
    try:
        yield
    finally:
        exchange.ROOM_BYTES = room
        os.environ.pop("CKPTD_NODE", None)


def slots_here(former: list[Former], nodes: Nodes) -> list[Slot]:
    """What the daemon of this rank's node would hand it: copies of its own where it has some."""
    node = nodes.of_rank[dist.get_rank()]
    found = [nodes.copies.get((node, rank), former[rank]) for rank in nodes.slots.get(node, [])]
    return [
        Slot.open(*(os.open(f"/proc/{process}/fd/{d}", os.O_RDONLY | os.O_CLOEXEC) for d in descriptors))
        for process, descriptors in found
    ]


def restore(kind: str, former: list[Former], nodes: Nodes, apart: bool = True) -> Outcome:
    """Restores what `former` captured into a state of its own, and looks at it."""
    state = build(kind)
    scramble(state)
    rank, world = dist.get_rank(), dist.get_world_size()
    with on_node(nodes, apart), counted() as count:
        origin = open_memory(SNAPSHOT, collective.world(), nodes.of_rank, slots_here(former, nodes), len(former))
        told, count.sent, count.longest = count.sent, 0, 0
        try:
            restore_state(AppState(state), collective.world(), origin, rng=True)
            foreign = set() if isinstance(origin, SnapshotReader) else _foreign(origin, rank)
        finally:
            origin.close()
    problems = wrong(state, 100.0 + (rank if world == len(former) else 0))
    return Outcome(problems, told, count.sent, count.longest, draw(state), state["loader"].at, foreign)


def _foreign(origin: Any, rank: int) -> set[str]:
    """Keys of which some rows are on other nodes only."""
    catalog, readers = origin.catalog(), origin.readers()
    able = np.array([rank in ranks for ranks in readers.ranks])[readers.place]
    return {catalog.tensors[tensor].key for tensor in catalog.tensor[~able]}


def same_as_on_one_node(former: list[Former], nodes: Nodes) -> list[str]:
    """What the catalog of several nodes' memory has that one reader of all slots has not, or the other way round."""
    origin = open_memory(SNAPSHOT, collective.world(), nodes.of_rank, slots_here(former, nodes), len(former))
    everywhere = Nodes([0] * dist.get_world_size(), {0: list(range(len(former)))})
    one = SnapshotReader(SNAPSHOT, slots_here(former, everywhere))
    ours, theirs = origin.catalog(), one.catalog()
    columns = [field.name for field in dataclasses.fields(ours) if field.name != "tensors"]
    orders = [np.lexsort((c.file_offset, c.file, c.writer, c.tensor)) for c in (ours, theirs)]
    differing = [
        name for name in columns if not np.array_equal(getattr(ours, name)[orders[0]], getattr(theirs, name)[orders[1]])
    ]
    differing += ["tensors"] * (ours.tensors != theirs.tensors) + ["objects"] * (origin.objects() != one.objects())
    differing += ["captured_at"] * (origin.captured_at != one.captured_at)
    for row, same in zip(orders[0].tolist(), orders[1].tolist(), strict=True):
        if ours.file[row] == 1:
            parts = [bytearray(int(ours.raw[row])) for _ in range(2)]
            origin.read(row, memoryview(parts[0]))
            one.read(same, memoryview(parts[1]))
            differing += ["rows of objects"] * (parts[0] != parts[1])
    origin.close()
    one.close()
    return differing


Failure = tuple[str, str, bool]
"""Type and text of an error, and whether any tensor had been written."""


def touched(kind: str, former: list[Former], nodes: Nodes) -> Failure:
    """A restore that fails."""
    state = build(kind)
    scramble(state)
    try:
        with on_node(nodes, True):
            slots = slots_here(former, nodes)
            origin = open_memory(SNAPSHOT, collective.world(), nodes.of_rank, slots, len(former))
            restore_state(AppState(state), collective.world(), origin, rng=True)
    except Exception as error:
        written = any(bool((local_of(tensor) != 777.0).any()) for _, _, tensor in tensors(state))
        return type(error).__name__, str(error), written
    return "", "", True


def die_in_the_middle(kind: str, former: list[Former], nodes: Nodes) -> Failure:
    """The last rank is killed in its second step of the exchange."""
    original = exchange._Run._begin

    def begin(self: Any, step: int, work: list[Any]) -> None:
        if dist.get_rank() == dist.get_world_size() - 1 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, step, work)

    exchange._Run._begin = begin  # type: ignore[method-assign]
    return touched(kind, former, nodes)


def die_before_telling(kind: str, former: list[Former], nodes: Nodes) -> Failure:
    """The rank that speaks for the second node is killed when it should tell what its slots hold."""
    original = node_memory._told

    def told(*arguments: Any) -> memoryview:
        if dist.get_rank() == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    node_memory._told = told
    return touched(kind, former, nodes)


def changed_on_the_way(what: str, former: list[Former], nodes: Nodes) -> Failure:
    """A restore in which a byte changes on its way: of what is "told" to rank 1, or of a "chunk" that rank 2 sends."""
    told, fetch = node_memory._told, NodeMemory.fetch

    def changed_told(*arguments: Any) -> memoryview:
        content = bytearray(told(*arguments))
        content[len(content) * 3 // 4] ^= what == "told" and dist.get_rank() == 1
        return memoryview(content)

    def changed_fetch(self: NodeMemory, rows: list[int], stored: memoryview) -> None:
        fetch(self, rows, stored)
        stored[len(stored) // 2] ^= what == "chunk" and dist.get_rank() == 2

    node_memory._told, NodeMemory.fetch = changed_told, changed_fetch  # type: ignore[method-assign]
    try:
        return touched("replicated", former, nodes)
    finally:
        node_memory._told, NodeMemory.fetch = told, fetch  # type: ignore[method-assign]


def too_much_to_tell(former: list[Former], nodes: Nodes) -> Failure:
    limit, node_memory.MAX_TOLD_BYTES = node_memory.MAX_TOLD_BYTES, 1000
    try:
        return touched("replicated", former, nodes)
    finally:
        node_memory.MAX_TOLD_BYTES = limit


def replicated_bytes(former: list[Former]) -> int:
    """Bytes of all tensors but buffers, which are each rank's own; those with two keys count once."""
    everywhere = Nodes([0] * dist.get_world_size(), {0: list(range(len(former)))})
    with contextlib.closing(SnapshotReader(SNAPSHOT, slots_here(former, everywhere))) as reader:
        catalog = reader.catalog()
        own = np.array([info.key.startswith(("objects/", *BUFFERS)) for info in catalog.tensors])
        rows = np.flatnonzero(~own[catalog.tensor]).tolist()
        places = {
            (int(catalog.writer[row]), int(catalog.file[row]), int(catalog.file_offset[row])): row for row in rows
        }
        return int(catalog.raw[list(places.values())].sum())
