"""What ranks conclude from what each has found of its slots: pure, and the same on all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.errors import CorruptionError, FormatError, UnrecoverableError
from ckptd.trainer.node_memory import _agreed, _Description, _Survey
from tests.node_memory.ranks import SNAPSHOT

WORLD = 3

Held = dict[int, dict[int, str]]
"""Node -> former rank -> what is wrong with its slot there, if anything."""


def surveys(nodes: list[int], held: Held) -> list[_Survey]:
    described = {
        node: [_Description(rank, "" if wrong else f"digest {rank}", 0.0, wrong) for rank, wrong in sorted(its.items())]
        for node, its in held.items()
    }
    return [
        _Survey(sorted(held.get(node, {})), described.get(node, []) if nodes.index(node) == rank else [])
        for rank, node in enumerate(nodes)
    ]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.dictionaries(
        st.integers(0, 3), st.dictionaries(st.integers(0, WORLD - 1), st.sampled_from(["", "", "is damaged"]))
    ),
)
def test_whoever_has_a_whole_copy_reads_it(nodes: list[int], held: Held) -> None:
    present = {node: its for node, its in held.items() if node in nodes}
    anywhere = {rank for its in present.values() for rank in its}
    whole = {rank: {node for node, its in present.items() if its.get(rank) == ""} for rank in range(WORLD)}
    if anywhere != set(range(WORLD)):
        missing = ", ".join(str(rank) for rank in range(WORLD) if rank not in anywhere)
        with pytest.raises(UnrecoverableError, match=f"of ranks {missing}$"):
            _agreed(surveys(nodes, held), nodes, WORLD, SNAPSHOT)
        return
    if not all(whole.values()):
        with pytest.raises(CorruptionError, match=r"node [0-3]: is damaged"):
            _agreed(surveys(nodes, held), nodes, WORLD, SNAPSHOT)
        return
    found = _agreed(surveys(nodes, held), nodes, WORLD, SNAPSHOT)
    assert [slot.description.rank for slot in found] == list(range(WORLD))
    for rank, slot in enumerate(found):
        assert slot.readers == [reader for reader, node in enumerate(nodes) if node in whole[rank]]
        assert slot.speaker in slot.readers
        assert (slot.node, slot.description.problem) == (nodes[slot.speaker], "")


def test_many_missing_slots_are_not_all_named() -> None:
    with pytest.raises(UnrecoverableError, match=r"slots of 99 of 100 ranks .* ranks 1, 2, 3, 4, 5, 6, 7, 8 \.\.\.$"):
        _agreed(surveys([0, 1], {0: {0: ""}}), [0, 1], 100, SNAPSHOT)


def test_more_slots_than_ranks() -> None:
    with pytest.raises(FormatError, match="2 ranks captured it; found a slot of rank 2"):
        _agreed(surveys([0, 1], {0: {0: "", 1: "", 2: ""}}), [0, 1], 2, SNAPSHOT)
