from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sbtk_runtime.errors import BadData
from sbtk_runtime.preprocess import prepare
from sbtk_train.batches.pixels import PixelStore, drop_unreadable
from sbtk_train.data import read_dataset
from tests.tiny_data import write_dataset


@pytest.mark.parametrize("keep", [True, False])
def test_batches_have_the_pixels_of_the_runtime(tmp_path: Path, keep: bool) -> None:
    data = read_dataset(write_dataset(tmp_path))
    store = PixelStore(data.photos, "photo", 48, workers=2, keep=keep)
    for _ in range(2):
        batch = store.batch([3, 0])
        assert batch.shape == (2, 3, 48, 48)
        assert batch.dtype == torch.uint8
        expected = prepare(data.photos[3].read_bytes(), "photo", 48).pixels
        np.testing.assert_array_equal(batch[0].permute(1, 2, 0).numpy(), expected)
    store.close()
    sketches = PixelStore(data.sketches, "sketch", 48, workers=1, keep=keep)
    assert sketches.batch([0]).shape == (1, 1, 48, 48)
    sketches.close()


def test_unreadable_images_are_named_and_left_out(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, sketches=12, photos=12)
    bad = root / "photo" / "ball" / "3.jpg"
    bad.write_bytes(b"not an image")
    empty = root / "sketch" / "crate" / "0.png"
    empty.write_bytes(b"")
    readable, unreadable = drop_unreadable(read_dataset(root), workers=2)
    assert {fault.path for fault in unreadable} == {bad, empty}
    assert bad not in readable.photos
    assert len(readable.photos) == len(readable.photo_labels) == 6 * 12 - 1
    names = [readable.classes[label] for label in readable.sketch_labels]
    assert names == [path.parent.name for path in readable.sketch_files]


def test_too_many_unreadable_images_are_refused(tmp_path: Path) -> None:
    root = write_dataset(tmp_path)
    for number in range(4):
        (root / "photo" / "ball" / f"{number}.jpg").write_bytes(b"x")
    with pytest.raises(BadData, match="4 of 48"):
        drop_unreadable(read_dataset(root), workers=2)


def test_an_image_that_is_deleted_later_is_named(tmp_path: Path) -> None:
    data = read_dataset(write_dataset(tmp_path))
    store = PixelStore(data.photos, "photo", 32, workers=1, keep=True)
    data.photos[0].unlink()
    with pytest.raises(BadData, match=r"0\.jpg"):
        store.batch([0])
    store.close()
