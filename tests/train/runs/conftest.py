"""Whole runs train a narrow ResNet18 on a tiny data set."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def narrow(narrow_resnet18: None) -> None:
    """Use it in all tests of this folder."""
