"""What a process keeps of the memory that it frees."""

from __future__ import annotations

import pytest

from tests.freed_memory import NEEDS_GLIBC
from tests.processes import run_python

pytestmark = NEEDS_GLIBC

# Prints the bytes that are cleared for the second of two equal blocks, and given back after it.
_SCRIPT = """
import sys
from sbtk_runtime.machine import resident_bytes
from sbtk_runtime.malloc import keep_freed_memory, trim_malloc
from tests.freed_memory import cleared_bytes

def measure():
    size_bytes = int(sys.argv[1])
    held = bytearray(b"x") * size_bytes
    highest = resident_bytes()
    del held
    print(cleared_bytes(size_bytes), highest - resident_bytes())

"""
_LARGE, _SMALL = 64 << 20, 8 << 20


def _cleared_and_returned_bytes(code: str, size_bytes: int) -> tuple[int, int]:
    cleared, returned = run_python(_SCRIPT + code, str(size_bytes)).split()
    return int(cleared), int(returned)


def test_kept_memory_is_used_again() -> None:
    cleared, returned = _cleared_and_returned_bytes("with keep_freed_memory(): measure()", _LARGE)
    assert max(cleared, returned) < _LARGE / 8


@pytest.mark.parametrize(
    "before", ["", "trim_malloc()", "with keep_freed_memory(): bytearray(100 << 20)"]
)
def test_large_blocks_are_returned_otherwise(before: str) -> None:
    code = f"{before}\nmeasure()"
    assert min(_cleared_and_returned_bytes(code, _LARGE)) > _LARGE * 7 / 8


def test_kept_memory_is_returned_at_the_end() -> None:
    code = """
with keep_freed_memory():
    cleared_bytes(int(sys.argv[1]))
    before = resident_bytes()
print(0, before - resident_bytes())
"""
    assert _cleared_and_returned_bytes(code, _LARGE)[1] > _LARGE * 7 / 8


def test_blocks_of_a_few_megabytes_are_returned_when_trimmed() -> None:
    larger = "bytearray(16 << 20)"  # glibc then keeps what is smaller
    code = f"{larger}; measure()"
    assert _cleared_and_returned_bytes(code, _SMALL)[1] < _SMALL / 2
    assert _cleared_and_returned_bytes(f"trim_malloc(); {code}", _SMALL)[1] > _SMALL / 2
