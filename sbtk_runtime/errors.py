"""Errors for users: what was found, what was expected, what to type next."""

from __future__ import annotations


class SbtkError(Exception):
    """An error that is shown to the user without a traceback.

    Args:
        found: what is wrong, with the value or path.
        expected: what would be right; empty if `found` says it.
        next_step: the command or action that helps; empty if there is none.
    """

    exit_code = 1

    def __init__(self, found: str, expected: str = "", next_step: str = "") -> None:
        # All three go to `args`, so that the error survives pickling between processes.
        super().__init__(found, expected, next_step)
        self.found = found
        self.expected = expected
        self.next_step = next_step

    def __str__(self) -> str:
        parts = [self.found]
        if self.expected:
            parts.append(f"expected: {self.expected}")
        if self.next_step:
            parts.append(f"next: {self.next_step}")
        return "\n  ".join(parts)


class BadImage(SbtkError):
    """An image that cannot be read, or that sbtk does not accept."""


class SlowImage(BadImage):
    """An image that takes too long to decode."""


class LargeImage(BadImage):
    """An image that takes too much memory to decode.

    Args:
        found: as in `SbtkError`.
        expected: as in `SbtkError`.
        needed_bytes: roughly what decoding takes, including the file.
    """

    def __init__(self, found: str, expected: str = "", needed_bytes: int = 0) -> None:
        super().__init__(found, expected)
        self.args = (found, expected, needed_bytes)
        self.needed_bytes = needed_bytes


class EmptySketch(BadImage):
    """A sketch on which nothing is drawn."""


class BadModel(SbtkError):
    """A model bundle, ONNX file or weights file that cannot be used."""


class BadGallery(SbtkError):
    """A gallery folder that is missing, damaged or of another format."""


class GalleryBusy(SbtkError):
    """Another process is writing to the gallery."""


class ModelMismatch(SbtkError):
    """A gallery was made by another model than the one that queries it."""


class EngineUnavailable(SbtkError):
    """An inference engine does not work on this machine."""


class MissingExtra(SbtkError):
    """An optional dependency is not installed; `next_step` has the pip command."""


class BadData(SbtkError):
    """Images, embeddings or lists that cannot be used."""


class BadRegion(BadData):
    """A part of a photo that is not within it, or of which the gallery keeps nothing."""


class BadConfig(SbtkError):
    """Options that are unknown, out of range or contradict each other; exit code 2."""

    exit_code = 2


class DiskFull(SbtkError):
    """No space is left: on the device, in the user's quota, or within the file size limit."""


class InternalError(SbtkError):
    """A bug in sbtk rather than in its input."""
