"""Tests that need real weights and photos; skipped without them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sbtk_runtime.preprocess import prepare
from sbtk_train.batches.augment import normalise
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.splits import divide, open_split
from sbtk_train.models.backbone import choose_layout
from sbtk_train.models.weights_file import find_weights, read_weights

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (os.environ.get("SBTK_DATA") and os.environ.get("SBTK_WEIGHTS")),
        reason="SBTK_DATA and SBTK_WEIGHTS name no research images and ImageNet weights",
    ),
]


def test_statistics_distinguish_the_two_layouts() -> None:
    path = find_weights("imagenet", "resnet50-v1")
    photos = sorted(Path(os.environ["SBTK_DATA"], "photo").rglob("*.jpg"))[::150][:16]
    pixels = np.stack([prepare(photo.read_bytes(), "photo").pixels for photo in photos])
    images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    tensors, _ = read_weights(path)
    better, drifts = choose_layout("resnet50-v1.5", tensors, images, path)
    assert better == "resnet50-v1"
    assert drifts["resnet50-v1.5"] > 1.5 * drifts["resnet50-v1"]


def test_published_split_divides_the_published_data() -> None:
    data = read_dataset(Path(os.environ["SBTK_DATA"]))
    split = open_split("SK-YE")
    division = divide(data, split, seed=0)
    used = {*division.training.classes, *division.validation.classes}
    assert len(data.classes) - len(used) == 21
    assert used.isdisjoint(split.unseen)
    assert len(division.validation.classes) == 10
