"""Documents claim nothing that is not there: tests they name exist, links lead somewhere, their code is Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_tests_that_are_named_exist(document: Path) -> None:
    missing = []
    for path, name in _TEST.findall(document.read_text()):
        if not (ROOT / path).is_file() or (name and name not in functions(ROOT / path)):
            missing.append(f"{path}::{name}")
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(document: Path) -> None:
    missing = [link for link in _LINK.findall(document.read_text()) if not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_code_is_python(document: Path) -> None:
    for code in _PYTHON.findall(document.read_text()):
        ast.parse(code)


def test_every_promise_is_listed_once() -> None:
    promises = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "invariants.md").read_text(), re.MULTILINE)
    assert promises == [str(number) for number in range(1, 19)]


def test_every_dependency_is_explained() -> None:
    import tomllib

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = {re.split(r"[<>=!~ ;]", requirement)[0] for requirement in wanted}
    assert [name for name in sorted(names) if f"\n| {name} |" not in text] == []
