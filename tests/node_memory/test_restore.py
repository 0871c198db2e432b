"""A state restored from the memory of several nodes: whoever wants what, each row is read on a node that holds it, and
only what a node lacks goes to it, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.trainer.restoring import PARTLY_WRITTEN
from tests.api.world import World, succeeded
from tests.node_memory import ranks
from tests.node_memory.ranks import Failure, Former, Nodes, Outcome

TWO = Nodes([0, 0, 1, 1], {0: [0, 1], 1: [2, 3]})

Captured = tuple[list[Former], list[list[float]]]


@pytest.fixture(scope="module")
def captured(worlds: dict[int, World]) -> Iterator[dict[str, Captured]]:
    """What four ranks have captured, sharded and replicated."""
    made = {}
    for kind in ("sharded", "replicated", "momentum"):
        former, drawn = zip(*succeeded(worlds[4].run(ranks.capture, kind, True)), strict=True)
        made[kind] = list(former), list(drawn)
    yield made
    worlds[4].run(ranks.let_go)


def restored(world: World, kind: str, former: list[Former], nodes: Nodes, apart: bool = True) -> list[Outcome]:
    outcomes: list[Outcome] = succeeded(world.run(ranks.restore, kind, former, nodes, apart))
    assert [outcome.problems for outcome in outcomes] == [[]] * len(outcomes)
    return outcomes


def test_the_same_world_reads_what_is_its_own(worlds: dict[int, World], captured: dict[str, Captured]) -> None:
    """To the bit, and no byte of the state goes from rank to rank."""
    former, drawn = captured["momentum"]
    outcomes = restored(worlds[4], "momentum", former, TWO)
    assert [outcome.sent for outcome in outcomes] == [0] * 4
    assert max(outcome.longest for outcome in outcomes) < 500, "nothing is asked for"
    assert [outcome.drawn for outcome in outcomes] == drawn
    assert [outcome.at for outcome in outcomes] == [10, 11, 12, 13]
    assert all(outcome.foreign for outcome in outcomes), "there is much that is elsewhere"


SLOTS = {"two": {0: [0, 1], 1: [2, 3]}, "all on one": {0: [0, 1, 2, 3]}, "four": {0: [3], 1: [1], 2: [0], 3: [2]}}
CASES = {
    "2 on 2": Nodes([0, 1], SLOTS["two"]),
    "2 on 1": Nodes([0, 0], SLOTS["all on one"]),
    "2 that see all": Nodes([0, 1], {0: [0, 1, 2, 3], 1: [3, 2, 1, 0]}),
    "3 on 2": Nodes([0, 0, 1], SLOTS["two"]),
    "6 on 3": Nodes([0, 0, 1, 1, 2, 2], SLOTS["two"]),
    "6 on 4": Nodes([0, 1, 1, 2, 3, 3], SLOTS["four"]),
    "4 in other places": Nodes([1, 0, 1, 0], SLOTS["two"]),
    "4 on 2, a slot on both": Nodes([0, 0, 1, 1], {0: [0, 1, 2], 1: [2, 1, 3]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["sharded", "replicated"])
def test_another_world_is_whole(worlds: dict[int, World], captured: dict[str, Captured], kind: str, case: str) -> None:
    nodes = CASES[case]
    former, drawn = captured[kind]
    outcomes = restored(worlds[len(nodes.of_rank)], kind, former, nodes)
    if len(outcomes) == 4:
        assert [outcome.drawn for outcome in outcomes] == drawn
        assert [outcome.at for outcome in outcomes] == [10, 11, 12, 13]
    else:
        assert len({tuple(outcome.drawn) for outcome in outcomes}) == len(outcomes)
        assert {outcome.at for outcome in outcomes} == {10}
    needed = any(outcome.foreign for outcome in outcomes)
    assert bool(sum(outcome.sent for outcome in outcomes)) == needed
    for rank, outcome in enumerate(outcomes):
        assert nodes.slots.get(nodes.of_rank[rank]) or not outcome.sent, "a node without slots has nothing to send"


def test_layouts_may_change_too(worlds: dict[int, World], captured: dict[str, Captured]) -> None:
    restored(worlds[3], "replicated", captured["sharded"][0], CASES["3 on 2"])
    restored(worlds[3], "sharded", captured["replicated"][0], CASES["3 on 2"])


def test_ranks_that_share_memory_need_not_have_the_same_slots(
    worlds: dict[int, World], captured: dict[str, Captured]
) -> None:
    """Two daemons on one machine: what one rank reads gets to the others through memory, not in messages."""
    outcomes = restored(worlds[4], "replicated", captured["replicated"][0], TWO, apart=False)
    assert [outcome.sent for outcome in outcomes] == [0] * 4
    assert all(outcome.foreign for outcome in outcomes)


def test_each_node_gets_what_it_lacks_once(worlds: dict[int, World], captured: dict[str, Captured]) -> None:
    """Replicas on 2 x 2 ranks: each half of the bytes goes to the other node once, and the ranks of a node send about
    the same. What ranks have for themselves does not move, be it alike or not."""
    former, _ = captured["replicated"]
    outcomes = restored(worlds[4], "replicated", former, TWO)
    whole = succeeded(worlds[4].run(ranks.replicated_bytes, former))[0]
    assert sum(outcome.sent for outcome in outcomes) == whole
    for one, other in ((0, 1), (2, 3)):
        pair = outcomes[one].sent, outcomes[other].sent
        assert max(pair) < 2 * min(pair) + ranks.ROOM


def test_all_ranks_know_what_one_node_would(worlds: dict[int, World], captured: dict[str, Captured]) -> None:
    for kind in captured:
        for size, nodes in ((4, TWO), (3, CASES["3 on 2"]), (6, CASES["6 on 4"])):
            answers = succeeded(worlds[size].run(ranks.same_as_on_one_node, captured[kind][0], nodes))
            assert answers == [[]] * size


# --- failures


def failed(answers: list[Failure], kind: str, *parts: str) -> None:
    """Every rank has raised the same, and it says these things."""
    assert (
        len({(error, text.partition(": ")[2] if text.startswith("rank ") else text) for error, text, _ in answers}) == 1
    )
    for error, text, _ in answers:
        assert error == kind, text
        for part in parts:
            assert part in text


def test_a_slot_that_is_nowhere_is_named_before_anything_is_written(
    worlds: dict[int, World], captured: dict[str, Captured]
) -> None:
    former, _ = captured["sharded"]
    for size, nodes in ((4, Nodes([0, 0, 1, 1], {0: [0, 1], 1: [2]})), (2, Nodes([0, 0], {0: [0, 1, 2]}))):
        answers = succeeded(worlds[size].run(ranks.touched, "sharded", former, nodes))
        failed(answers, "UnrecoverableError", "slots of 1 of 4 ranks are on no node", "ranks 3")
        assert not any(written for _, _, written in answers)


def copied(world: World, former: list[Former], rank: int, part: str | None) -> Former:
    """A copy of the slot of `rank`, with a damaged `part`."""
    offset = None if part is None else succeeded(world.run(ranks.offset_of, part))[rank]
    made: Former = succeeded(world.run(ranks.copy_of, former[rank], offset))[0]
    return made


@pytest.mark.parametrize("part", ["table", "objects"])
def test_a_description_that_is_damaged_is_an_error_on_every_rank(
    worlds: dict[int, World], captured: dict[str, Captured], part: str
) -> None:
    former, _ = captured["momentum"]
    nodes = dataclasses.replace(TWO, copies={(1, 2): copied(worlds[4], former, 2, part)})
    answers = succeeded(worlds[4].run(ranks.touched, "momentum", former, nodes))
    failed(answers, "CorruptionError", "node 1: slot of rank 2", part)
    assert not any(written for _, _, written in answers)


def test_a_whole_copy_serves_where_another_is_damaged(worlds: dict[int, World], captured: dict[str, Captured]) -> None:
    former, _ = captured["momentum"]
    damaged = copied(worlds[4], former, 1, "table")
    nodes = Nodes([0, 0, 1, 1], {0: [0, 1], 1: [1, 2, 3]}, {(0, 1): damaged})
    outcomes = restored(worlds[4], "momentum", former, nodes)
    assert [bool(outcome.sent) for outcome in outcomes] == [False, False, True, True], (
        "rank 1 gets all its own from there"
    )
    whole = Nodes([0, 0, 1, 1], {0: [0, 1], 1: [1, 2, 3]}, {(0, 1): copied(worlds[4], former, 1, None)})
    assert not any(outcome.sent for outcome in restored(worlds[4], "momentum", former, whole))


def test_two_slots_of_one_rank_are_not_taken_for_one(worlds: dict[int, World], captured: dict[str, Captured]) -> None:
    former, _ = captured["momentum"]
    other, _ = captured["replicated"]
    nodes = Nodes([0, 0, 1, 1], {0: [0, 1], 1: [1, 2, 3]}, {(1, 1): other[1]})
    answers = succeeded(worlds[4].run(ranks.touched, "momentum", former, nodes))
    failed(answers, "CorruptionError", "slot of rank 1: nodes 0 and 1 hold different ones")


def test_bytes_that_are_damaged_are_an_error_on_every_rank(
    worlds: dict[int, World], captured: dict[str, Captured]
) -> None:
    """Those that read them and those that would have got them: all know that they have half a state."""
    former, _ = captured["momentum"]
    for nodes in (TWO, Nodes([1, 0, 1, 0], SLOTS["two"])):
        damaged = dataclasses.replace(nodes, copies={(1, 2): copied(worlds[4], former, 2, "data")})
        answers = succeeded(worlds[4].run(ranks.touched, "momentum", former, damaged))
        failed(answers, "CorruptionError", "on node 1: slot of rank 2", PARTLY_WRITTEN)
        assert all(text.count(PARTLY_WRITTEN) == 1 for _, text, _ in answers)
        restored(worlds[4], "momentum", former, nodes)


def test_bytes_that_change_between_nodes_are_found(worlds: dict[int, World], captured: dict[str, Captured]) -> None:
    former, _ = captured["replicated"]
    answers = succeeded(worlds[4].run(ranks.changed_on_the_way, "told", former, TWO))
    failed(answers, "CorruptionError", "slots of ranks", "told by node", "arrived damaged")
    assert not any(written for _, _, written in answers)
    answers = succeeded(worlds[4].run(ranks.changed_on_the_way, "chunk", former, TWO))
    failed(answers, "CorruptionError", "it changed on its way", PARTLY_WRITTEN)


def test_what_is_told_is_bounded(worlds: dict[int, World], captured: dict[str, Captured]) -> None:
    answers = succeeded(worlds[4].run(ranks.too_much_to_tell, captured["replicated"][0], TWO))
    failed(answers, "FormatError", "tables and objects of all slots", "at most 1000")


@pytest.mark.parametrize("how", [ranks.die_in_the_middle, ranks.die_before_telling])
def test_a_rank_that_is_killed_ends_the_restore_of_all_others(
    captured: dict[str, Captured], tmp_path: Path, how: Callable[..., Failure]
) -> None:
    world = World(4, tmp_path, "tests.node_memory.ranks")
    try:
        answers = world.run(how, "replicated", captured["replicated"][0], TWO)
    finally:
        world.close()
    dead = 3 if how is ranks.die_in_the_middle else 2
    assert isinstance(answers.pop(dead), Exception)
    for error, text, written in answers:
        assert error == "DeadlineError", text
        assert (PARTLY_WRITTEN in text) == (dead == 3) >= written
