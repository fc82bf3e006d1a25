"""What a benchmark's header says about the machine."""

from __future__ import annotations

import json
import sys

import pytest

from sbtk_runtime import machine


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
