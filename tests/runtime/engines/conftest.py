"""Machines with TensorRT, of `tests.fakes`, for tests that fail if anything is left on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.machine import SURFACES, FakeMachine, fake_machine, surface_name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which sbtk makes its own folders for plans in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=SURFACES, ids=surface_name)
def machine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeMachine]:
    """A machine of two GPUs with each TensorRT by turns; nothing may be left on it at the end."""
    machine = fake_machine(monkeypatch, request.param, gpus=2)
    yield machine
    assert not machine.alive()


@pytest.fixture
def ten(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    """A machine with TensorRT 10, for what does not depend on the version."""
    machine = fake_machine(monkeypatch, SURFACES[0])
    yield machine
    assert not machine.alive()
