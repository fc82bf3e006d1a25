"""Whole runs train a narrow ResNet18 on a tiny data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_data import write_dataset


@pytest.fixture(autouse=True, scope="module")
def narrow(narrow_resnet18: None) -> None:
    """Use it in all tests of this folder."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of six classes; tests must not change it."""
    return write_dataset(tmp_path_factory.mktemp("data"))
