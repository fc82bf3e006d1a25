from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sbtk_runtime.errors import BadData
from sbtk_runtime.preprocess import CROPPED, PREPROCESSINGS, WHOLE, Preprocessing, prepare
from sbtk_train.batches.pixels import PixelStore, drop_unreadable
from sbtk_train.data.dataset import read_dataset
from tests.tiny_data import write_dataset


@pytest.mark.parametrize("keep", [True, False])
def test_batches_have_the_pixels_of_the_runtime(tmp_path: Path, keep: bool) -> None:
    data = read_dataset(write_dataset(tmp_path))
    store = PixelStore(data.photos, "photo", 48, CROPPED, workers=2, keep=keep)
    for _ in range(2):
        batch = store.batch([3, 0])
        assert batch.shape == (2, 3, 48, 48)
        assert batch.dtype == torch.uint8
        expected = prepare(data.photos[3].read_bytes(), "photo", 48).pixels
        np.testing.assert_array_equal(batch[0].permute(1, 2, 0).numpy(), expected)
    store.close()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
def test_sketches_are_prepared_as_the_student_needs_them(
    tmp_path: Path, preprocessing: Preprocessing, keep: bool
) -> None:
    data = read_dataset(write_dataset(tmp_path))
    store = PixelStore(data.sketches, "sketch", 48, preprocessing, workers=1, keep=keep)
    for _ in range(2):
        batch = store.batch([5])
        assert batch.shape == (1, 1, 48, 48)
        expected = preprocessing.prepare(data.sketch_files[5].read_bytes(), "sketch", 48).pixels
        np.testing.assert_array_equal(batch[0, 0].numpy(), expected[:, :, 0])
    store.close()


def test_redrawn_whole_sketches_stay_in_their_place(tmp_path: Path) -> None:
    file = tmp_path / "corner.png"
    page = Image.new("L", (256, 256), 255)
    ImageDraw.Draw(page).ellipse((150, 20, 230, 80), outline=0, width=4)
    page.save(file)
    boxes = []
    for preprocessing in (WHOLE, CROPPED):
        store = PixelStore([file], "sketch", 128, preprocessing, workers=1, keep=False, redrawn=1.0)
        drawn = torch.cat([store.batch([0], (seed,)) for seed in range(8)])[:, 0].numpy()
        assert len({each.tobytes() for each in drawn}) == 8
        rows, columns = (np.flatnonzero((drawn < 128).any(axis=axes)) for axes in ((0, 2), (0, 1)))
        boxes.append((columns[0], rows[0], columns[-1], rows[-1]))
        store.close()
    # The ellipse, and half of the widest stroke and of a stretch.
    assert np.abs(np.subtract(boxes[0], (75, 10, 115, 40))).max() <= 12
    assert boxes[1][0] < 20 and boxes[1][2] > 108


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
    store = PixelStore(data.photos, "photo", 32, CROPPED, workers=1, keep=True)
    data.photos[0].unlink()
    with pytest.raises(BadData, match=r"0\.jpg"):
        store.batch([0])
    store.close()
