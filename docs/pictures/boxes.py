"""Draws the pictures of docs/resharding.md from the code that does the work: `python docs/pictures/boxes.py`.

A picture is a tensor of two dimensions, cut into boxes by `ckptd.plan.layout` and `ckptd.plan.recut`. The files beside
this one are its output; tests/reshard/test_pictures.py compares them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ckptd.core.box import Box, cut, flat_boxes
from ckptd.core.catalog import Catalog, TensorInfo
from ckptd.plan.layout import Layout, Mesh, Placed, extents, shards

CELL = 22
MARGIN = 30
COLORS = ("#cfe3f7", "#fbe3c6", "#d6efd3", "#f6d3dc", "#e2d8f3", "#fdf3c0", "#d0eeee", "#e8e2da")

Boxes = Sequence[tuple[Box, str, int]]
"""A box, the words in it, and the number of its color."""


def drawing(panels: Sequence[tuple[str, tuple[int, int], Boxes]]) -> str:
    """Panels side by side, each a heading, a shape and boxes, as SVG."""
    parts, x = [], MARGIN
    height = max(shape[0] for _, shape, _ in panels) * CELL + 2 * MARGIN + 12
    for heading, (rows, columns), boxes in panels:
        parts.append(f'<text x="{x}" y="{MARGIN - 8}" font-weight="bold">{heading}</text>')
        for box, words, color in boxes:
            left, top = x + box.offsets[1] * CELL, MARGIN + box.offsets[0] * CELL
            wide, high = box.sizes[1] * CELL, box.sizes[0] * CELL
            parts.append(
                f'<rect x="{left}" y="{top}" width="{wide}" height="{high}" fill="{COLORS[color % len(COLORS)]}" '
                'stroke="#444"/>'
            )
            middle = f'x="{left + wide / 2:g}" y="{top + high / 2 + 4:g}"'
            parts.append(f'<text {middle} text-anchor="middle">{words}</text>')
        parts.append(f'<text x="{x}" y="{MARGIN + rows * CELL + 16}" fill="#666">{rows} x {columns}</text>')
        x += columns * CELL + 2 * MARGIN
    style = 'font-family="sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{x - MARGIN}" height="{height}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


def place(rules: str, mesh: str, shape: tuple[int, int]) -> tuple[Placed, Layout]:
    layout = Layout.parse(rules, Mesh.parse(mesh))
    return layout.place([TensorInfo("w", "float32", shape)])[0][0], layout


def ranks(rules: str, mesh: str, shape: tuple[int, int]) -> Boxes:
    """Every shard, with the ranks that hold it."""
    placed, layout = place(rules, mesh, shape)
    spans = [np.broadcast_arrays(*pair, np.empty(layout.mesh.sizes))[:2] for pair in extents(placed, layout.mesh)]
    held: dict[Box, list[int]] = {}
    for rank, where in enumerate(itertools.product(*(range(size) for size in layout.mesh.sizes))):
        box = Box(tuple(int(low[where]) for low, _ in spans), tuple(int(size[where]) for _, size in spans))
        if box.elements:
            held.setdefault(box, []).append(rank)
    return [(box, ",".join(map(str, who)), number) for number, (box, who) in enumerate(sorted(held.items()))]


def chunked(rules: str, mesh: str, shape: tuple[int, int], chunk_bytes: int) -> Boxes:
    """Every chunk, colored by shard."""
    placed, layout = place(rules, mesh, shape)
    boxes: list[tuple[Box, str, int]] = []
    for number, (low, size) in enumerate(zip(*(c.tolist() for c in shards(placed, layout.mesh)), strict=True)):
        boxes += [(box, "", number) for box in cut(Box(tuple(low), tuple(size)), 4, chunk_bytes)]
    return boxes


def numbered(boxes: Boxes) -> Boxes:
    return [(box, str(number), color) for number, (box, _, color) in enumerate(boxes)]


def pieces(source: Boxes, target: Boxes) -> Boxes:
    """What each source chunk gives to each target chunk, as the load plan says: source>target."""
    from ckptd.core.catalog import ALL_RANKS
    from ckptd.plan.load import Want, plan_load

    shape = tuple(max(box.offsets[d] + box.sizes[d] for box, _, _ in source) for d in range(2))
    tensor = TensorInfo("w", "float32", shape)
    boxes = [box for box, _, _ in source]
    catalog = Catalog.build([tensor], [0] * len(boxes), [b.offsets for b in boxes], [b.sizes for b in boxes])
    plan = plan_load(catalog, [Want("w", "float32", shape, box) for box, _, _ in target], rank=ALL_RANKS)
    return [
        (Box(tuple(low), tuple(size)), f"{source[row][1]}&gt;{target[want][1]}", source[row][2])
        for want, row, low, size in zip(
            plan.want.tolist(), plan.row.tolist(), plan.offsets.tolist(), plan.sizes.tolist(), strict=True
        )
    ]


def flat(shape: tuple[int, int], world: int) -> Boxes:
    """The runs that ranks have of the flattened tensor, in boxes."""
    total = shape[0] * shape[1]
    size = -(-total // world)
    runs = [(min(rank * size, total), min((rank + 1) * size, total)) for rank in range(world)]
    return [(box, str(rank), rank) for rank, run in enumerate(runs) for box in flat_boxes(shape, *run)]


COLUMNS = '[[placement]]\nkeys = "w"\nshard = { mesh = "tp", dim = 1 }'
ROWS = '[[placement]]\nkeys = "w"\nshard = { mesh = "dp", dim = 0 }'
BOTH = '[[placement]]\nkeys = "w"\nshard = [{ mesh = "tp", dim = 1 }, { mesh = "dp", dim = 0 }]'
STRIDED = '[[placement]]\nkeys = "w"\nshard = [{ mesh = "tp", dim = 0 }, { mesh = "dp", dim = 0 }]'


def pictures() -> dict[str, str]:
    """File name -> SVG."""
    shape = (10, 8)
    source = numbered(chunked(ROWS, "dp=2", shape, 3 * 8 * 4))
    target = numbered(chunked(COLUMNS, "tp=4", shape, 5 * 2 * 4))
    return {
        "layouts.svg": drawing(
            [
                ("no rule", shape, ranks("", "dp=2,tp=4", shape)),
                ("tp: dim 1", shape, ranks(COLUMNS, "dp=2,tp=4", shape)),
                ("dp: dim 0", shape, ranks(ROWS, "dp=2,tp=4", shape)),
                ("tp: dim 1, dp: dim 0", shape, ranks(BOTH, "dp=2,tp=4", shape)),
                ("tp: dim 0, dp: dim 0", shape, ranks(STRIDED, "dp=2,tp=4", shape)),
            ]
        ),
        "flat.svg": drawing([("3 ranks", shape, flat(shape, 3)), ("7 ranks", shape, flat(shape, 7))]),
        "recut.svg": drawing(
            [
                ("source: dp=2", shape, source),
                ("target: tp=4", shape, target),
                ("pieces: source&gt;target", shape, pieces(source, target)),
            ]
        ),
    }


if __name__ == "__main__":
    for name, text in pictures().items():
        (Path(__file__).parent / name).write_text(text)
