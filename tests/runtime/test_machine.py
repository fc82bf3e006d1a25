"""What a benchmark's header says about the machine, and what a process keeps of freed memory."""

from __future__ import annotations

import json
import sys

import pytest

from sbtk_runtime import machine
from tests.freed_memory import NEEDS_GLIBC
from tests.processes import run_python


def test_the_header_names_processor_memory_and_versions() -> None:
    this = machine.this_machine()
    assert 1 <= this.cores <= this.cores_total
    assert this.memory_bytes > 1 << 28
    assert this.versions["numpy"]
    text = "\n".join(this.lines())
    assert this.cpu in text
    assert f"numpy {this.versions['numpy']}" in text
    assert json.loads(json.dumps(this.to_json()))["cpu"] == this.cpu


def test_versions_leave_out_what_is_not_installed() -> None:
    assert list(machine.installed_versions(("numpy", "no-such-distribution"))) == ["numpy"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_grows_with_allocations() -> None:
    before = machine.resident_bytes()
    held = bytearray(b"x" * (64 << 20))
    assert machine.resident_bytes() - before > 32 << 20
    assert machine.peak_resident_bytes() >= machine.resident_bytes()
    assert len(held) == 64 << 20


# Prints the bytes that are cleared for the second of two equal blocks, and given back after it.
_SCRIPT = """
import sys
from sbtk_runtime.machine import keep_freed_memory, resident_bytes, trim_malloc
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


@NEEDS_GLIBC
def test_kept_memory_is_used_again() -> None:
    cleared, returned = _cleared_and_returned_bytes("with keep_freed_memory(): measure()", _LARGE)
    assert max(cleared, returned) < _LARGE / 8


@NEEDS_GLIBC
@pytest.mark.parametrize(
    "before", ["", "trim_malloc()", "with keep_freed_memory(): bytearray(100 << 20)"]
)
def test_large_blocks_are_returned_otherwise(before: str) -> None:
    code = f"{before}\nmeasure()"
    assert min(_cleared_and_returned_bytes(code, _LARGE)) > _LARGE * 7 / 8


@NEEDS_GLIBC
def test_kept_memory_is_returned_at_the_end() -> None:
    code = """
with keep_freed_memory():
    cleared_bytes(int(sys.argv[1]))
    before = resident_bytes()
print(0, before - resident_bytes())
"""
    assert _cleared_and_returned_bytes(code, _LARGE)[1] > _LARGE * 7 / 8


@NEEDS_GLIBC
def test_blocks_of_a_few_megabytes_are_returned_when_trimmed() -> None:
    larger = "bytearray(16 << 20)"  # glibc then keeps what is smaller
    code = f"{larger}; measure()"
    assert _cleared_and_returned_bytes(code, _SMALL)[1] < _SMALL / 2
    assert _cleared_and_returned_bytes(f"trim_malloc(); {code}", _SMALL)[1] > _SMALL / 2
