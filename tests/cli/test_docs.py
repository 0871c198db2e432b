"""docs/cli.md speaks of every command and every option, and of no other."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from ckptd.cli.main import app

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"


def help_of(*command: str) -> str:
    return CliRunner().invoke(app, [*command, "--help"]).stdout


def test_every_command_and_option_is_documented() -> None:
    sections = {
        section.split()[1]: section for section in re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]
    }
    commands = re.findall(r"^  ([a-z]+) ", help_of().partition("Commands:")[2], re.MULTILINE)
    assert sorted(sections) == sorted(commands)
    for command in commands:
        heading = sections[command].splitlines()[0]
        options = set(re.findall(r"--[a-z-]+", help_of(command))) - {"--help"}
        assert set(re.findall(r"--[a-z-]+", heading)) == options, command
        assert f"$ ckptd {command}" in sections[command], f"an example of {command}"
