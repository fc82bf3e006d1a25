"""What may be uploaded for a query: small pictures of three formats, judged by their bytes."""

from __future__ import annotations

from sbtk_runtime.errors import BadImage
from sbtk_runtime.preprocess import Kind, memory_to_decode

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
#: Less than for files on disk: one request must not cost seconds and a gigabyte.
MAX_DECODE_BYTES = 256 << 20


def is_accepted(content_type: str) -> bool:
    """Whether a Content-Type header names a format that may be uploaded."""
    return content_type.partition(";")[0].strip().lower() in MEDIA_TYPES


def check_upload(data: bytes, kind: Kind) -> None:
    """Makes sure that an upload may be decoded.

    Raises:
        BadImage: it is empty, of another format, or too large when it is decoded.
    """
    if not data:
        raise BadImage("the request has no picture in its body", "the bytes of an image file")
    if not _has_signature(data):
        raise BadImage("this is no picture that can be uploaded", "PNG, JPEG or WebP")
    if memory_to_decode(data, kind) > MAX_DECODE_BYTES:
        raise BadImage(
            "the picture has too many pixels for an upload",
            f"one that takes at most {MAX_DECODE_BYTES >> 20} MiB of memory",
            "send it smaller: 1,000 pixels a side are plenty",
        )


def _has_signature(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))
