"""Uploads that are not images or too large, and parameters out of range."""

from __future__ import annotations

import io
import socket
import struct
import zlib
from urllib.parse import quote

import pytest
from PIL import Image, ImageDraw

from tests.faults.conftest import Served
from tests.serve_client import png, resident_bytes, sketch_png
from tests.tiny import tiny_photo


def _white(size: tuple[int, int] = (256, 256)) -> Image.Image:
    return Image.new("L", size, 255)


def _as(format_name: str) -> bytes:
    buffer = io.BytesIO()
    tiny_photo(3).save(buffer, format_name)
    return buffer.getvalue()


def _lying_png(side: int) -> bytes:
    """Return a PNG of some kilobytes that claims, and holds, `side` x `side` pixels."""
    rows = zlib.compressobj(9)
    line = b"\0" + bytes((side + 7) // 8)
    data = b"".join(rows.compress(line) for _ in range(side)) + rows.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
BAD_UPLOADS = {
    "empty": b"",
    "svg": SVG,
    "svg after xml": b'<?xml version="1.0"?>' + SVG,
    "gif": _as("GIF"),
    "tiff": _as("TIFF"),
    "bmp": _as("BMP"),
    "ppm": _as("PPM"),
    "pdf": b"%PDF-1.7\n" + bytes(1000),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n" + bytes(100),
    "truncated png": sketch_png()[:-200],
    "half a header": sketch_png()[:20],
    "no end": sketch_png()[:60] + bytes(5000),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(100),
    "address": b"http://127.0.0.1/photo.png",
    "noise": bytes(range(256)) * 64,
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
@pytest.mark.parametrize("kind", ["sketch", "photo"])
def test_only_png_jpeg_and_webp_are_parsed_and_only_complete_ones_accepted(
    served: Served, name: str, kind: str
) -> None:
    answer = served.query(BAD_UPLOADS[name], f"?as={kind}")
    assert answer.status == 400
    assert answer.code == "bad_image"


def test_an_image_of_20000_pixels_a_side_is_refused_by_its_header(served: Served) -> None:
    bomb = _lying_png(20_000)
    assert len(bomb) < 100_000
    before = resident_bytes(served.process.process.pid)
    for kind in ("sketch", "photo"):
        answer = served.query(bomb, f"?as={kind}")
        assert (answer.status, answer.code) == (400, "bad_image")
    assert resident_bytes(served.process.process.pid) < before + (50 << 20)


@pytest.mark.parametrize(
    "media", ["image/svg+xml", "image/gif", "text/html", "application/json", "multipart/mixed"]
)
def test_other_content_types_are_refused_without_reading_the_body(
    served: Served, media: str
) -> None:
    answer = served.query(sketch_png(), media=media)
    assert (answer.status, answer.code) == (415, "unsupported_type")


def test_an_empty_canvas_is_refused_and_a_dot_is_accepted(served: Served) -> None:
    empty = served.query(png(_white()))
    assert (empty.status, empty.code) == (400, "empty_sketch")
    transparent = served.query(png(Image.new("RGBA", (256, 256))))
    assert (transparent.status, transparent.code) == (400, "empty_sketch")
    dotted = _white()
    ImageDraw.Draw(dotted).ellipse((120, 120, 132, 132), fill=0)
    assert len(served.query(png(dotted)).json()["hits"]) == 10


def test_a_url_instead_of_an_image_is_never_opened(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bait:
        bait.settimeout(0.3)
        address = f"http://127.0.0.1:{bait.getsockname()[1]}/photo.png"
        assert served.query(address.encode()).code == "bad_image"
        for name in ("url", "image", "path", "file"):
            answer = served.query(sketch_png(), f"?{name}={quote(address, safe='')}&k=1")
            assert (answer.status, answer.code) == (422, "bad_parameter")
        assert served.get(f"/v1/photos/{quote(address, safe='')}").status == 404
        with pytest.raises(TimeoutError):
            bait.accept()


def test_a_folder_filter_accepts_any_bytes_and_stays_inside_the_gallery(served: Served) -> None:
    inside = served.query(sketch_png(), f"?under={quote(str(served.photos / 'album'))}").json()
    assert len(inside["hits"]) == 2
    for folder in ("/etc", str(served.photos / "albu"), "/%ff%fe", "/" + "x" * 5000):
        answer = served.query(sketch_png(), f"?under={quote(folder, safe='%/')}")
        assert answer.status == 200, folder
        assert answer.json()["hits"] == []


@pytest.mark.parametrize("size", ["0", "-1", "1", "361", "100000", "x", ""])
def test_thumbnails_have_only_four_sizes(served: Served, size: str) -> None:
    answer = served.get(f"/v1/photos/{served.ids['photo-0001.png']}/thumbnail?size={size}")
    assert (answer.status, answer.code) == (422, "bad_parameter")
