"""The tables of docs/protocol.md, made from the code. `python -m tests.protocol.tables --write` puts them in."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import typing
from pathlib import Path

import msgspec

from ckptd.protocol import actions
from ckptd.protocol import messages as m
from ckptd.protocol.cluster import messages as cluster

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def first_sentences(kind: type) -> str:
    """The first paragraph of a docstring, on one line."""
    text = inspect.getdoc(kind) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "or")


def messages(union: typing.Any) -> str:
    """A row per message of one direction."""
    rows = ["| message | fields | meaning |", "|---|---|---|"]
    for kind in typing.get_args(union):
        names = ", ".join(f.name for f in msgspec.structs.fields(kind))
        rows.append(f"| {kind.__name__} | {names or '-'} | {first_sentences(kind)} |")
    return "\n".join(rows) + "\n"


def carried_out(union: typing.Any) -> str:
    """A row per action."""
    rows = ["| action | meaning |", "|---|---|"]
    rows += [f"| {kind.__name__} | {first_sentences(kind)} |" for kind in typing.get_args(union)]
    return "\n".join(rows) + "\n"


def tables() -> dict[str, str]:
    """name -> table."""
    return {
        "to_daemon": messages(m.ToDaemon),
        "from_daemon": messages(m.FromDaemon),
        "actions": carried_out(actions.Action),
        "between_daemons": messages(cluster.BetweenDaemons),
        "member_actions": carried_out(cluster.MemberAction),
    }


def renewed(text: str) -> str:
    """The document with the tables of today."""
    made = tables()
    found = [block[2] for block in _BLOCK.finditer(text)]
    if sorted(found) != sorted(made):
        raise ValueError(f"{DOCUMENT}: has tables {found}, the code makes {sorted(made)}")
    return _BLOCK.sub(lambda block: block[1] + made[block[2]] + block[4], text)


def main(arguments: list[str]) -> int:
    """Prints the document, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    text = renewed(DOCUMENT.read_text())
    if parser.parse_args(arguments).write:
        DOCUMENT.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
