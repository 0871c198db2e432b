"""What ranks hold in common, so that it can be seen whether it is the same on all of them.

Tensors that several ranks hold are captured once, since they are taken for replicas. Owns which pieces are held by
which ranks, what a rank says of them (checksums, then one digest for each set of holders), and which keys turn out to
be no replicas. Pure and deterministic: every rank concludes the same from the same pieces and checksums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ckptd.core.native import crc32c
from ckptd.plan.save import PER_RANK, Piece

Holders = tuple[int, ...]


def label(piece: Piece) -> str:
    """Names a piece: its key if it is the whole tensor, else with its place."""
    return piece.key if piece.sizes == piece.shape else f"{piece.key}{list(piece.offsets)}{list(piece.sizes)}"


def held_in_common(pieces: Sequence[Sequence[Piece]], excluded: frozenset[str]) -> dict[Holders, list[Piece]]:
    """The pieces that several ranks hold and that are taken for replicas, by the ranks that hold them, in one order.
    Those whose label is `excluded` are left out."""
    holders: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    found: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Piece] = {}
    for rank, held in enumerate(pieces):
        for piece in held:
            if piece.share == PER_RANK or 0 in piece.sizes:
                continue
            place = (piece.key, piece.offsets, piece.sizes)
            ranks = holders.setdefault(place, [])
            if rank not in ranks[-1:]:
                ranks.append(rank)
            found[place] = piece
    common: dict[Holders, list[Piece]] = {}
    for place in sorted(holders):
        if len(holders[place]) > 1 and label(found[place]) not in excluded:
            common.setdefault(tuple(holders[place]), []).append(found[place])
    return common


def digests(common: Mapping[Holders, Sequence[Piece]], checksums: Mapping[str, int]) -> dict[int, int]:
    """Checksum of a list of ranks -> checksum of all that exactly they hold; from the checksums of pieces by label."""
    said = {}
    for ranks, pieces in common.items():
        found = [checksums[label(piece)].to_bytes(4, "little") for piece in pieces]
        said[crc32c(repr(ranks).encode())] = crc32c(b"".join(found))
    return said


def differing(checksums: Sequence[Mapping[str, int]]) -> frozenset[str]:
    """Labels that two ranks have with different checksums."""
    first: dict[str, int] = {}
    return frozenset(
        name for found in checksums for name, value in found.items() if first.setdefault(name, value) != value
    )


def as_own(pieces: Sequence[Piece], labels: frozenset[str]) -> list[Piece]:
    """The pieces, of which those of these labels are each rank's own; only whole tensors can be."""
    return [
        msgspec.structs.replace(piece, share=PER_RANK) if piece.key in labels and label(piece) == piece.key else piece
        for piece in pieces
    ]
