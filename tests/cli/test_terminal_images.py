"""Images in terminals, by their protocols; otherwise a list and the reason."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

_SIXEL = re.compile(rb'\x1bP[\d;]*q"1;1;(\d+);(\d+)([^\x1b]*)\x1b\\')

_SIXEL_WORD = re.compile(rb"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|(?:!(\d+))?([?-~])|(\$)|(-)")

_DEADLINE_S = 120.0


@dataclass(frozen=True)
class Shown:
    """A program's output to the terminal and to standard error, and its exit code."""

    screen: bytes
    errors: str
    code: int

    def sixels(self) -> list[Image.Image]:
        """The images written as sixels; transparent pixels are magenta."""
        return [image_from_sixels(match) for match in _SIXEL.finditer(self.screen)]


@dataclass(frozen=True)
class Terminal:
    """A terminal and its replies.

    Attributes:
        attributes: reply to a query of its attributes; may be empty. A 4 means sixels.
        kitty: reply to a query in kitty's protocol; may be empty.
        columns: width in characters, each 10 x 20 pixels; 0 if unknown.
    """

    attributes: bytes = b"\x1b[?62;22c"
    kitty: bytes = b""
    columns: int = 80

    def run(self, arguments: Sequence[str], piped: bytes | None = None) -> Shown:
        """Run Python with `arguments`, with the terminal or `piped` as standard input."""
        ours, theirs = pty.openpty()
        _stop_echo(theirs)
        # Replies are sent in advance, since programs wait only a tenth of a second for them, and
        # a busy machine may take longer.
        os.write(ours, self.attributes + self.kitty)
        size = (40 if self.columns else 0, self.columns, self.columns * 10, 800)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", *size))
        with (
            contextlib.closing(os.fdopen(ours, "rb")),
            _started(arguments, theirs, piped) as program,
        ):
            try:
                screen = _all_written(ours)
                assert program.stderr is not None
                errors = program.stderr.read().decode()
                return Shown(screen, errors, program.wait(_DEADLINE_S))
            finally:
                program.kill()


def image_from_sixels(match: re.Match[bytes]) -> Image.Image:
    """Return the image of a sixel sequence, drawn by DEC's manual."""
    width, height = int(match[1]), int(match[2])
    image = Image.new("RGB", (width, height), (255, 0, 255))
    colours: dict[int, tuple[int, int, int]] = {}
    colour, x, y = (0, 0, 0), 0, 0
    for word in _SIXEL_WORD.finditer(match[3]):
        number, red, green, blue, count, bits, is_return, is_next = word.groups()
        if number is not None:
            if red is not None:
                shares = (int(red), int(green), int(blue))
                colours[int(number)] = (
                    round(shares[0] * 2.55),
                    round(shares[1] * 2.55),
                    round(shares[2] * 2.55),
                )
            colour = colours[int(number)]
        elif is_return or is_next:
            x, y = 0, y + (6 if is_next else 0)
        else:
            wide = int(count or 1)
            for bit in range(6):
                if (bits[0] - 63) >> bit & 1 and y + bit < height:
                    image.paste(colour, (x, y + bit, min(x + wide, width), y + bit + 1))
            x += wide
    return image


def _started(arguments: Sequence[str], theirs: int, piped: bytes | None) -> subprocess.Popen[bytes]:
    program = subprocess.Popen(
        [sys.executable, "-c", _AS_LEADER, *arguments],
        stdin=theirs if piped is None else subprocess.PIPE,
        stdout=theirs,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(theirs)
    if piped is not None:
        assert program.stdin is not None
        program.stdin.write(piped)
        program.stdin.close()
    return program


def _stop_echo(theirs: int) -> None:
    modes = termios.tcgetattr(theirs)
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(theirs, termios.TCSANOW, modes)


def _all_written(ours: int) -> bytes:
    """Return all output until the terminal is closed."""
    screen = b""
    while select.select([ours], [], [], _DEADLINE_S)[0]:
        try:
            screen += os.read(ours, 65536)
        except OSError:  # Linux reports a closed end this way
            return screen
    raise TimeoutError(f"nothing new for {_DEADLINE_S:.0f} s after {screen[-200:]!r}")


# The program gets a controlling terminal, as from a shell.
_AS_LEADER = """
import fcntl, os, sys, termios
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


SIXELS = Terminal(attributes=b"\x1b[?62;4;22c")
KITTY = Terminal(kitty=b"\x1b_Gi=1;OK\x1b\\")
COLOURS = (
    (220, 40, 40),
    (40, 180, 60),
    (60, 80, 230),
    (240, 220, 60),
    (150, 60, 160),
    (20, 20, 20),
)

SHOW = """
import sys
from sbtk_cli.terminal_images import show_photos
from sbtk_runtime.gallery.gallery import Hit
way, *paths = sys.argv[1:]
hits = [Hit(rank, 0.5, rank, path) for rank, path in enumerate(paths, 1)]
print("why:", show_photos(hits, way or None), file=sys.stderr)
"""


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Return six square photos of one colour each."""
    paths = [tmp_path / f"photo-{place}.png" for place in range(len(COLOURS))]
    for path, colour in zip(paths, COLOURS, strict=True):
        Image.new("RGB", (64, 64), colour).save(path)
    return paths


def show(terminal: Terminal, photos: list[Path], way: str = "") -> Shown:
    shown = terminal.run(["-c", SHOW, way, *map(str, photos)])
    assert shown.code == 0, shown.errors
    return shown


def colours_in(row: Image.Image, count: int) -> list[tuple[int, ...]]:
    """Return the colour in the middle of each of `count` squares side by side."""
    side = row.width // count
    found = [
        row.convert("RGB").getpixel((side * n + side // 2 - 4, side // 2)) for n in range(count)
    ]
    return [colour for colour in found if isinstance(colour, tuple)]


def are_alike(found: list[tuple[int, ...]], wanted: tuple[tuple[int, ...], ...]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(abs(a - b) < 16 for one, other in pairs for a, b in zip(one, other, strict=True))


def names_in(shown: Shown) -> list[str]:
    """Return the captions without bold markup."""
    lines = re.sub(rb"\x1bP[^\x1b]*\x1b\\|\x1b\[[\d;]*[mC]", b"", shown.screen).decode()
    return re.findall(r"\d \S+", lines)


def test_long_names_stay_in_their_column(photos: list[Path], tmp_path: Path) -> None:
    long = tmp_path / "a-name-that-is-too-long.png"
    photos[0].rename(long)
    assert names_in(show(SIXELS, [long, photos[1]])) == ["1 a-name-that-\u2026", "2 photo-1.png"]


def test_a_terminal_with_sixels_gets_sixels(photos: list[Path]) -> None:
    shown = show(SIXELS, photos)
    first, second = shown.sixels()
    assert (first.size, second.size) == ((800, 160), (160, 160))
    assert are_alike(colours_in(first, 5), COLOURS[:5])
    assert are_alike(colours_in(second, 1), COLOURS[5:])
    assert names_in(shown) == [f"{n + 1} photo-{n}.png" for n in range(6)]
    assert shown.errors == "why: \n"


def test_kitty_gets_images_in_its_protocol(photos: list[Path]) -> None:
    shown = show(KITTY, photos[:3])
    chunks = re.findall(rb"\x1b_Gi=(\d+),m=[01],f=100,q=2;([^\x1b]+)\x1b\\", shown.screen)
    assert len({number for number, _ in chunks}) == 1
    row = Image.open(io.BytesIO(base64.b64decode(b"".join(data for _, data in chunks))))
    assert (row.mode, row.size) == ("RGBA", (480, 160))
    assert are_alike(colours_in(row, 3), COLOURS[:3])
    assert row.getchannel("A").getpixel((156, 80)) == 0
    placed = re.findall(r"\x1b\[38;2;[\d;]+m(\U0010eeee[^\x1b]*)", shown.screen.decode())
    assert [line.count("\U0010eeee") for line in placed] == [48] * 8


def test_blocks_of_colour_are_shown_on_request(
    photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = show(Terminal(), photos[:2], "blocks")
    assert shown.screen.decode().count("\u2580") == 32 * 8
    assert b"48;2;220;40;40" in shown.screen


@pytest.mark.parametrize(
    ("terminal", "why"),
    [
        (Terminal(), "supports neither sixels nor kitty images"),
        (Terminal(attributes=b"", kitty=b""), "supports neither"),
        (Terminal(kitty=b"\x1b_Gi=1;ENOTSUPPORTED\x1b\\"), "supports neither"),
        (Terminal(kitty=b"\x1b_Gnonsense\x1b\\"), "invalid reply"),
        (Terminal(attributes=b"\x1b[?\xff\xff4c"), "invalid reply"),
        (Terminal(attributes=b"\x1b[?4c", columns=0), "invalid reply"),
    ],
)
def test_a_terminal_without_images_gets_none(
    photos: list[Path], terminal: Terminal, why: str
) -> None:
    shown = show(terminal, photos[:1])
    assert why in shown.errors
    asked = rb"\x1b\[c|\x1b_G[^\x1b]*\x1b\\|[\r\n]"
    assert re.sub(asked, b"", shown.screen) == b""


def test_a_file_gets_images_only_if_a_format_is_named(photos: list[Path]) -> None:
    def written(way: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", SHOW, way, str(photos[0])]
        return subprocess.run(command, capture_output=True, check=True)

    assert written("").stdout == b""
    assert b"standard output is not a terminal" in written("").stderr
    (row,) = Shown(written("iterm2").stdout, "", 0).sixels()
    assert are_alike(colours_in(row, 1), COLOURS[:1])


def test_file_names_cannot_send_escapes_to_the_terminal(photos: list[Path], tmp_path: Path) -> None:
    hostile = tmp_path / os.fsdecode(b"\x1b[2J\xff")
    photos[0].rename(hostile)
    shown = show(SIXELS, [hostile, tmp_path / "gone.png"])
    assert b"\x1b[2J" not in shown.screen
    assert names_in(shown) == [r"1 \x1b[2J\xff", "2 gone.png"]
    (row,) = shown.sixels()
    assert are_alike(colours_in(row, 2), (COLOURS[0], (118, 118, 118)))


def test_a_query_shows_the_images_of_the_hits_it_lists(shared_gallery: Path) -> None:
    sketch = (shared_gallery.parent / "sketch.png").read_bytes()
    query = ["-m", "sbtk_cli", "query", "-", "-k", "3", "--show", "--threads", "1"]
    shown = SIXELS.run(query, piped=sketch)
    assert shown.code == 0, shown.errors
    (row,) = shown.sixels()
    assert row.size == (480, 160)
    listed = shown.screen.partition(b"\x1b\\")[2].splitlines()[-3:]
    assert [line.split()[0] for line in listed] == [b"1", b"2", b"3"]
    best = Path(os.fsdecode(listed[0].split()[2]))
    side = 160 * 304 // 320
    expected = Image.open(best).convert("RGB")
    expected.thumbnail((side, side))
    middle = expected.getpixel((expected.width // 2, expected.height // 2))
    assert isinstance(middle, tuple)
    found = row.getpixel((side // 2, side // 2))
    assert isinstance(found, tuple)
    assert are_alike([found], (middle,))
