"""Numbers and texts as people read them, and the bar that only a terminal sees."""

from __future__ import annotations

import io
import json
import math

import pytest

from ckptd.cli import output, progress


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (5 * 1024**4, "5.0 TiB"),
        (9000 * 1024**4, "9000.0 TiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert output.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0.9, "0s"), (59, "59s"), (60, "1m 0s"), (3723, "1h 2m"), (90000, "1d 1h")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert output.format_seconds(seconds) == text


def test_times_are_utc() -> None:
    assert output.format_time(0.5) == "1970-01-01T00:00:00Z"
    assert output.format_time(None) is None


def test_ratio() -> None:
    assert output.format_ratio(300, 200) == "1.50x"
    assert output.format_ratio(0, 0) == "-"


def test_what_json_cannot_say_is_spelled() -> None:
    assert [output.json_number(v) for v in (None, 1.5, math.nan, math.inf, -math.inf)] == [
        None,
        1.5,
        "nan",
        "inf",
        "-inf",
    ]


def test_a_key_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Keys come from files that somebody else may have written: escape sequences, line breaks, markup."""
    hostile = "model/\x1b[2Jw\nfake line\u202e[red]x\udc80"
    output.table(("KEY",), [[hostile]])
    output.say(output.printable(hostile))
    for line in capsys.readouterr().out.splitlines():
        assert line.isprintable()
        assert not line.startswith("fake line")
    assert "[red]" in output.printable(hostile)


def test_a_message_of_many_lines_becomes_one() -> None:
    assert output.one_line("two differences:\n  a: x\n\n  b: \x07y\n") == "two differences:; a: x; b: \\x07y"


def test_nothing_is_cut_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    long = "k" * 500
    output.table(("KEY", "N"), [[long, 1]], right=("N",))
    output.say(long)
    out = capsys.readouterr().out
    assert out.count(long) == 2


def test_json_is_one_ascii_document(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"key": "größe\udc80"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"key": "größe\udc80"}


SHOW_CURSOR = "\x1b[?25h"


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_no_bar_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress.progress_bar("verifying") as report:
        assert report is None


def test_a_bar_appears_only_after_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress_bar("verifying", clock=lambda: now[0]) as report:
        assert report is not None
        report(1, 10)
        assert terminal.getvalue() == ""
        now[0] += progress.PATIENCE_S
        report(5, 10)
        assert "verifying" in terminal.getvalue()


def test_the_bar_ends_with_an_error_of_its_body(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)

    def work() -> None:
        with progress.progress_bar("verifying") as report:
            assert report is not None
            report(0, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert terminal.getvalue().rindex(SHOW_CURSOR) > terminal.getvalue().rindex("verifying")
