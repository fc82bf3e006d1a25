"""Texts and numbers for people, and file names that contain terminal escapes."""

from __future__ import annotations

import io
import os

import pytest

from sbtk_cli.output import (
    duration_text,
    is_progress_wanted,
    plain_table,
    progress,
    size_text,
)
from sbtk_runtime.files import count_text, printable_name


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (0.84, "0.8 s"),
        (9.96, "10 s"),
        (41.2, "41 s"),
        (59.6, "1 min 0 s"),
        (72, "1 min 12 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_counts_and_sizes_are_readable() -> None:
    assert count_text(1, "photo") == "1 photo"
    assert count_text(12410, "photo") == "12,410 photos"
    assert [size_text(n) for n in (12, 4_200, 76_000_000, 1.54e9)] == [
        "12 bytes",
        "4.2 kB",
        "76 MB",
        "1.5 GB",
    ]


def test_tables_are_aligned_except_in_their_last_column() -> None:
    rows = [("A", "LONG", "C"), ("aaa", "b", "c c c")]
    assert plain_table(rows) == "A    LONG  C\naaa  b     c c c"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"plain name.jpg", "plain name.jpg"),
        ("caf\u00e9 \U0001f431.jpg".encode(), "caf\u00e9 \U0001f431.jpg"),
        (b"line\nend\t.jpg", "line\\nend\\t.jpg"),
        (b"\x1b[31mred.jpg", "\\x1b[31mred.jpg"),
        (b"not \xff utf-8.jpg", "not \\xff utf-8.jpg"),
        ("turned \u202e gpj.exe".encode(), "turned \\u202e gpj.exe"),
    ],
)
def test_names_are_printed_on_one_line(raw: bytes, shown: str) -> None:
    assert printable_name(raw) == shown
    assert printable_name(os.fsdecode(raw)) == shown


class Terminal(io.StringIO):
    """A terminal as far as `isatty` goes."""

    def isatty(self) -> bool:
        return True


def test_there_is_no_progress_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_progress_wanted(quiet=False)
    with progress("embedding") as advance:
        advance(1, 10)
    assert capsys.readouterr() == ("", "")


def test_there_is_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert not is_progress_wanted(quiet=True)
    with progress("embedding") as advance:
        advance(1, 10)
        advance(10, 10)
    assert "embedding" in terminal.getvalue()
    assert "10/10" in terminal.getvalue()


def test_progress_respects_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress("embedding") as advance:
        advance(10, 10)
    assert "\x1b[3" not in terminal.getvalue()
