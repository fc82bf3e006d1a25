"""Portable pixmaps (PPM, PGM, PBM) to the one form of them that decoders read in blocks.

Comments, numbers in digits and samples of odd scales are read by Pillow one by one, in Python: a
minute for a file that is rewritten here in a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadImage

#: Of a file whose numbers stand in digits, or do not use the full scale.
MOST_REWRITTEN_BYTES = 64 << 20

_PNM_SPACE = rb"(?:\s++|#[^\r\n]*+[\r\n])++"
_PNM_HEADER = re.compile(rb"P([1-6])" + (_PNM_SPACE + rb"(\d{1,10})") * 2)
_PNM_HIGHEST = re.compile(_PNM_SPACE + rb"(\d{1,5})")
_PNM_COMMENT = re.compile(rb"#[^\r\n]*+")
_PIECE_BYTES = 1 << 20

Numbers = NDArray[np.float64]


def plain_pnm(data: bytes, check: Callable[[], None]) -> tuple[bytes, int, bool]:
    """Returns a PPM, PGM or PBM in bytes of the full scale, and what is known of it.

    Args:
        data: the bytes of the file.
        check: asked now and then; raises when it takes too long.

    Returns:
        The file, rewritten if need be; the bits of a sample; and whether samples are known to use
        the full scale, since they were brought to it.

    Raises:
        BadImage: its header or its digits are damaged, or it is too large to be rewritten.
    """
    if data[1:2] in b"Ff":
        return data, 32, False
    header = _PNM_HEADER.match(data)
    if header is None:
        raise BadImage("damaged image: the PPM header is cut off or damaged")
    kind, width, height = (int(number) for number in header.groups())
    position, highest = header.end(), 1
    if kind not in (1, 4):
        depth = _PNM_HIGHEST.match(data, position)
        if depth is None or not 0 < int(depth.group(1)) < 65536:
            raise BadImage("damaged image: the PPM header is cut off or damaged")
        position, highest = depth.end(), int(depth.group(1))
    # One blank, and only one, stands before binary samples.
    body = memoryview(data)[position + 1 :]
    channels = 3 if kind in (3, 6) else 1
    full = 65535 if highest > 255 and channels == 1 else 255
    head = b"P%d %d %d" % (4 if kind == 4 else 6 if channels == 3 else 5, width, height)
    head += b"\n" if kind == 4 else b" %d\n" % full
    bits = 16 if full == 65535 else 8
    if kind == 4 or (kind > 4 and highest == full):
        if position > 100:
            data = b"".join([head, body])
        return data, bits, False
    samples = width * height * channels
    if samples * bits // 8 > MOST_REWRITTEN_BYTES:
        raise BadImage(
            f"the picture has {width} x {height} pixels in an unusual kind of PPM",
            f"at most {MOST_REWRITTEN_BYTES >> 20} MiB of them",
        )
    numbers = _binary_numbers(body, 2 if highest > 255 else 1) if kind > 4 else _digits(body, kind)
    rewritten = bytearray(head)
    room = len(head) + samples * bits // 8
    for piece in numbers:
        check()
        if kind < 4 and piece.size and piece.max() > highest:
            raise BadImage(f"damaged image: a PPM with values above its highest, {highest}")
        scaled = np.minimum(np.rint(piece / highest * full), full)
        rewritten += scaled.astype(">u2" if full == 65535 else "u1").tobytes()
        if len(rewritten) >= room:
            break
    return bytes(rewritten[:room]), bits, True


def _binary_numbers(body: memoryview, size: int) -> Iterator[Numbers]:
    for start in range(0, len(body), _PIECE_BYTES):
        piece = body[start : start + _PIECE_BYTES]
        piece = piece[: len(piece) // size * size]
        yield np.frombuffer(piece, ">u2" if size == 2 else "u1").astype(np.float64)


def _digits(body: memoryview, kind: int) -> Iterator[Numbers]:
    """Yields the numbers of a PPM of digits; a PBM's, where 1 is black, as a PGM has them."""
    rest = b""
    for piece in _uncommented(body):
        if kind == 1:
            digits = b"".join(piece.split())
            _check_only(digits, b"01")
            yield np.asarray(49.0 - np.frombuffer(digits, np.uint8))
            continue
        text = rest + piece
        cut = 1 + max(text.rfind(blank) for blank in (b" ", b"\n", b"\t", b"\r"))
        text, rest = text[:cut], text[cut:]
        if len(rest) > 10:
            raise BadImage("damaged image: a PPM with a number of too many digits")
        yield _from_text(text)
    yield _from_text(rest)


def _from_text(text: bytes) -> Numbers:
    """Returns the numbers that stand in digits; five times as fast as numpy's own reader."""
    _check_only(text, b"0123456789 \t\r\n\v\f")
    digits = np.frombuffer(text, np.uint8) - 48
    edges = np.flatnonzero(np.diff(digits < 10, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    lengths = ends - starts
    numbers = np.zeros(len(ends))
    longest = int(lengths.max()) if lengths.size else 0
    if longest > 10:
        raise BadImage("damaged image: a PPM with a number of too many digits")
    for place in range(longest):
        has = lengths > place
        numbers[has] += digits[ends[has] - 1 - place] * 10.0**place
    return numbers


def _check_only(text: bytes, allowed: bytes) -> None:
    if text.translate(None, allowed):
        raise BadImage("damaged image: a PPM with something else than numbers")


def _uncommented(body: memoryview) -> Iterator[bytes]:
    """Yields a text in pieces, without its comments."""
    is_comment = False
    for start in range(0, len(body), _PIECE_BYTES):
        piece = bytes(body[start : start + _PIECE_BYTES])
        if is_comment:
            end = _LINE_END.search(piece)
            if end is None:
                continue
            piece = piece[end.start() :]
        last_line = piece[max(piece.rfind(b"\r"), piece.rfind(b"\n")) + 1 :]
        is_comment = b"#" in last_line
        yield _PNM_COMMENT.sub(b"", piece)


_LINE_END = re.compile(rb"[\r\n]")
