"""Measures whether memory is used again, or was returned to the system."""

from __future__ import annotations

import ctypes
import resource
import sys

import pytest

NEEDS_GLIBC = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="only glibc can be told what to keep",
)


def cleared_bytes(size_bytes: int) -> int:
    """Return how many bytes the system clears when a block is allocated and written."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = bytearray(b"x") * size_bytes
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert len(held) == size_bytes
    return faults * resource.getpagesize()
