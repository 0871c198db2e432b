"""docs/protocol.md says what the code does, where that can be compared."""

from __future__ import annotations

import re
import typing

import msgspec

from ckptd.daemon import wire
from ckptd.protocol import messages as m
from ckptd.protocol.cluster.root import PIPELINE
from ckptd.protocol.cluster.state import ClusterState
from ckptd.protocol.members import MAX_RANKS
from ckptd.protocol.quiet import IDLE_S
from ckptd.protocol.state import NodeState
from tests.protocol.tables import DOCUMENT, renewed
from tests.protocol.test_transcripts import TRANSCRIPTS

TEXT = DOCUMENT.read_text()


def test_the_tables_are_those_of_the_code() -> None:
    """Else: `python -m tests.protocol.tables --write`."""
    assert renewed(TEXT) == TEXT


def test_all_that_is_persisted_is_explained() -> None:
    """Each field of the state, and no other, has a row in the section on what is persisted."""
    section = TEXT.split("## 4. ")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([\w, `]+) \|", section, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    persisted = (*msgspec.structs.fields(NodeState), *msgspec.structs.fields(ClusterState))
    assert named == {field.name for field in persisted}


def test_every_reason_to_miss_is_explained() -> None:
    """All of them, no other."""
    section = TEXT.split("<!-- reasons -->")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(typing.get_args(m.Reason))


def test_numbers() -> None:
    """Limits are stated as they are."""
    for number in (PIPELINE, MAX_RANKS, f"{IDLE_S:.0f}", wire.MAX_PACKET // 1024, m.PROTOCOL):
        assert re.search(rf"\b{number}\b", TEXT), number


def test_transcripts_that_are_named_exist() -> None:
    """And each one is named where its run is explained."""
    assert set(re.findall(r"`(\w+)\.txt`", TEXT)) == set(TRANSCRIPTS)
