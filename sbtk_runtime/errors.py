"""The errors that users see: what was found, what was expected, what to type next."""

from __future__ import annotations


class SbtkError(Exception):
    """An error that is told to the user without a traceback.

    Args:
        found: what is wrong, with the value or path that was met.
        expected: what would have been right; empty when `found` says it all.
        next_step: the command or action that helps; empty when there is none.
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
    """A file that is not a readable image, or not one that sbtk accepts."""


class SlowImage(BadImage):
    """An image whose decoding was ended because it takes too long."""


class LargeImage(BadImage):
    """An image that takes more memory to decode than it may.

    Args:
        found: as of every error.
        expected: as of every error.
        needed_bytes: roughly what decoding takes, with the file.
    """

    def __init__(self, found: str, expected: str = "", needed_bytes: int = 0) -> None:
        super().__init__(found, expected)
        self.args = (found, expected, needed_bytes)
        self.needed_bytes = needed_bytes


class EmptySketch(BadImage):
    """A readable image on which nothing is drawn."""


class BadModel(SbtkError):
    """A model bundle, ONNX file or weights file that cannot be used."""


class BadGallery(SbtkError):
    """A gallery folder that is missing, damaged or of another format."""


class GalleryBusy(SbtkError):
    """Another process is writing to the gallery."""


class ModelMismatch(SbtkError):
    """A gallery was made by another model than the one that is asked to search it."""


class EngineUnavailable(SbtkError):
    """The inference engine that was asked for does not work on this machine."""


class MissingExtra(SbtkError):
    """An optional dependency is not installed; `next_step` has the pip command."""


class BadData(SbtkError):
    """Training or evaluation data that cannot be used as they are."""


class BadConfig(SbtkError):
    """Options that contradict each other or are out of range; exit code 2."""

    exit_code = 2


class DiskFull(SbtkError):
    """No space is left for what had to be written: on the device, in a quota, or below a limit."""


class InternalError(SbtkError):
    """sbtk contradicts itself: a fault in the program, not in what it was given."""
