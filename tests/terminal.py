"""A terminal for tests: runs a program on a pseudo-terminal that replies to queries."""

from __future__ import annotations

import contextlib
import fcntl
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
