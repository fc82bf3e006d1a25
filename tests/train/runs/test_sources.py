"""Stored feature maps of frozen stages equal running the stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.preprocess import CROPPED, WHOLE
from sbtk_train.batches.augment import normalise
from sbtk_train.batches.pixels import load_pixels
from sbtk_train.batches.sampler import Batch, BatchRng, BatchRngs
from sbtk_train.compute import choose_compute
from sbtk_train.data.dataset import read_dataset
from sbtk_train.models.student import SbtknetStudent, domains_of
from sbtk_train.runs.checkpoint import RECORD, STUDENT
from sbtk_train.runs.sources import (
    FeatureMaps,
    FeatureSource,
    make_pixel_embedder,
)
from tests.train.runs.test_run import run, tiny_config

SIZE_PX = 224


@pytest.fixture(scope="module")
def student() -> SbtknetStudent:
    torch.manual_seed(0)
    student = SbtknetStudent("resnet18", 8, 4)
    student.freeze_until("layer4")
    student.train()
    return student


def maps_in(
    folder: Path, student: SbtknetStudent, messages: list[str], size: int = 64
) -> FeatureMaps:
    compute = choose_compute("cpu", "fp32")
    return FeatureMaps(folder, student, "layer4", size, CROPPED, compute, 2, messages.append)


def test_stages_run_in_two_parts_equal_the_whole_trunk(student: SbtknetStudent) -> None:
    student.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        early = student.feature_map(images, end="layer4")
        late = student.embed(early, domains_of("photo", 2), "layer4")
        torch.testing.assert_close(late, student.embed(images))
    assert early.shape == (2, 64, 4, 4)


def test_feature_maps_equal_the_frozen_stages_and_are_computed_once(
    data: Path, student: SbtknetStudent, tmp_path: Path
) -> None:
    images = read_dataset(data)
    messages: list[str] = []
    maps = maps_in(tmp_path, student, messages)
    kept = maps.of(images.photos[:3], "photo")
    assert kept.shape == (3, 1, 64, 4, 4)
    photo = load_pixels(images.photos[1], "photo", 64, CROPPED).copy()
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = student.eval().feature_map(normalise(pixels), end="layer4")[0]
    np.testing.assert_allclose(kept[1, 0], expected.numpy(), rtol=2e-2, atol=2e-3)
    assert len(messages) == 1
    maps_in(tmp_path, student, messages).of(images.photos[:3], "photo")
    assert len(messages) == 1
    other = SbtknetStudent("resnet18", 8, 4)
    maps_in(tmp_path, other, messages).of(images.photos[:3], "photo")
    assert len(messages) == 2, "maps of another trunk must not be taken for these"


def test_feature_maps_of_another_layout_are_not_reused(data: Path, tmp_path: Path) -> None:
    photos, messages = read_dataset(data).photos[:1], list[str]()
    layouts = [SbtknetStudent(name, 8, 4) for name in ("resnet50-v1", "resnet50-v1.5")]
    layouts[1].load_state_dict(layouts[0].state_dict())
    first, second = (maps_in(tmp_path, one, messages).of(photos, "photo") for one in layouts)
    assert len(messages) == 2
    assert first.shape == second.shape
    assert not np.array_equal(first, second)


def test_feature_maps_of_another_precision_are_not_reused(
    data: Path, student: SbtknetStudent, tmp_path: Path
) -> None:
    photos, messages = read_dataset(data).photos[:1], list[str]()
    formats = [choose_compute("cpu", name) for name in ("bf16", "fp32")]
    coarse, fine = (
        FeatureMaps(tmp_path, student, "layer4", 64, CROPPED, compute, 2, messages.append).of(
            photos, "photo"
        )
        for compute in formats
    )
    assert len(messages) == 2
    pixels = torch.from_numpy(load_pixels(photos[0], "photo", 64, CROPPED).copy()).permute(2, 0, 1)[
        None
    ]
    with torch.inference_mode():
        expected = student.eval().feature_map(normalise(pixels), end="layer4")[0].half()
    np.testing.assert_allclose(fine[0, 0], expected.numpy(), rtol=2e-3, atol=1e-3)
    assert not np.allclose(coarse[0, 0], expected.numpy(), rtol=2e-3, atol=1e-3)


def test_feature_maps_of_other_preprocessing_are_not_reused_for_sketches(
    data: Path, student: SbtknetStudent, tmp_path: Path
) -> None:
    images, messages = read_dataset(data), list[str]()
    compute = choose_compute("cpu", "fp32")
    cropped, whole = (
        FeatureMaps(tmp_path, student, "layer4", 64, each, compute, 2, messages.append)
        for each in (CROPPED, WHOLE)
    )
    first = cropped.of(images.sketches[:2], "sketch")
    second = whole.of(images.sketches[:2], "sketch")
    assert len(messages) == 2
    assert not np.array_equal(first, second)
    for maps in (cropped, whole):
        maps.of(images.photos[:2], "photo")
    assert len(messages) == 3, "photos are prepared alike"


def test_copies_differ_and_views_of_an_image_are_different_copies(
    data: Path, student: SbtknetStudent, tmp_path: Path
) -> None:
    images = read_dataset(data)
    maps = maps_in(tmp_path, student, [])
    kept = maps.of(images.sketches, "sketch", 3)
    assert not np.array_equal(kept[0, 0], kept[0, 1])
    source = FeatureSource(images, maps, 3, 2)
    rows = Batch(np.array([0, 5]), np.array([2]))
    generator = torch.Generator().manual_seed(3)
    draws = BatchRngs(BatchRng(generator, 2), BatchRng(generator, 1))
    first, second = source.inputs(source.load(rows, 0), draws).chunk(2)
    assert first.shape == (3, 64, 4, 4)
    found = [
        [copy for copy in range(3) if np.array_equal(kept[row, copy], view[place].numpy())]
        for place, row in enumerate((0, 5))
        for view in (first, second)
    ]
    assert [len(copies) for copies in found] == [1, 1, 1, 1]
    assert found[0] != found[1]
    assert found[2] != found[3]
    source.close()


def test_embeddings_from_feature_maps_equal_those_from_pixels(
    data: Path, student: SbtknetStudent, tmp_path: Path
) -> None:
    compute, photos = choose_compute("cpu", "fp32"), read_dataset(data).photos[:2]
    maps = maps_in(tmp_path, student, [], SIZE_PX)
    kept = maps.embed(student, photos, "photo")
    whole = make_pixel_embedder(CROPPED, compute, 2)(student, photos, "photo")
    np.testing.assert_allclose(kept.rows, whole.rows, atol=2e-3)
    np.testing.assert_array_equal(kept.predicted, whole.predicted)


@pytest.mark.slow
def test_a_run_on_feature_maps_resumes_to_the_same_student(data: Path, tmp_path: Path) -> None:
    config = replace(
        tiny_config(data),
        freeze_until="layer4",
        feature_folder=str(tmp_path / "maps"),
        feature_variants=2,
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(config, whole)
    assert list((tmp_path / "maps").glob("*.npy"))
    with pytest.raises(KeyboardInterrupt):
        run(config, stopped, on_trainer=lambda trainer: trainer.stop_soon())
    run(config, stopped, resume=True)
    assert (whole / STUDENT).read_bytes() == (stopped / STUDENT).read_bytes()
    with pytest.raises(BadConfig, match="none is frozen"):
        replace(config, freeze_until="")


@pytest.mark.slow
def test_the_last_epochs_and_validation_use_maps_of_full_size(data: Path, tmp_path: Path) -> None:
    """An epoch at 224 px that was fed maps of smaller images would be another recipe."""
    small = replace(
        tiny_config(data, final_epochs=1),
        freeze_until="layer4",
        feature_folder=str(tmp_path / "maps"),
        feature_variants=2,
    )
    run(small, tmp_path / "run")
    shapes = sorted(np.load(path, mmap_mode="r").shape[1:] for path in tmp_path.glob("maps/*.npy"))
    # Of both kinds: validation, and held-out sketches with their photos; then each size's copies.
    assert shapes == [(1, 64, 14, 14)] * 4 + [(2, 64, 2, 2)] * 2 + [(2, 64, 14, 14)] * 2
    assert json.loads((tmp_path / "run" / RECORD).read_text())["validation_px"] == SIZE_PX
    assert replace(small, recipe=replace(small.recipe, final_epochs=0)).validation_px == 32
