"""What a process keeps of the memory that it frees."""

from __future__ import annotations

import pytest

from tests.freed_memory import NEEDS_GLIBC
from tests.processes import run_python

pytestmark = NEEDS_GLIBC

# Prints the bytes that are cleared for the second of two equal blocks, and given back after it.
_SCRIPT = """
import sys
from sbtk_runtime import malloc
from sbtk_runtime.machine import resident_bytes
from tests.freed_memory import cleared_bytes

{call}
size_bytes = int(sys.argv[1])
held = bytearray(b"x") * size_bytes
highest = resident_bytes()
del held
print(cleared_bytes(size_bytes), highest - resident_bytes())
"""
_LARGE, _SMALL = 64 << 20, 8 << 20


def _cleared_and_returned_bytes(call: str, size_bytes: int) -> tuple[int, int]:
    cleared, returned = run_python(_SCRIPT.format(call=call), str(size_bytes)).split()
    return int(cleared), int(returned)


def test_kept_memory_is_used_again() -> None:
    cleared, returned = _cleared_and_returned_bytes("malloc.keep_freed_memory()", _LARGE)
    assert max(cleared, returned) < _LARGE / 8


@pytest.mark.parametrize("call", ["", "malloc.trim_malloc()"])
def test_large_blocks_are_returned_otherwise(call: str) -> None:
    assert min(_cleared_and_returned_bytes(call, _LARGE)) > _LARGE * 7 / 8


def test_blocks_of_a_few_megabytes_are_returned_when_trimmed() -> None:
    larger = "bytearray(16 << 20)"  # glibc then keeps what is smaller
    assert _cleared_and_returned_bytes(larger, _SMALL)[1] < _SMALL / 2
    assert _cleared_and_returned_bytes(f"malloc.trim_malloc(); {larger}", _SMALL)[1] > _SMALL / 2
