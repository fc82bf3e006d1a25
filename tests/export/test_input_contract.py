"""The written input contract leads to the golden pixels and embeddings."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sbtk_cli.main import main
from sbtk_export.export import hash_files
from sbtk_export.input_contract import CONTRACT_NAME, make_golden_images, render_contract
from sbtk_runtime.bundle import GOLDEN_NAME, Bundle, image_name, pixels_name, read_golden
from sbtk_runtime.preprocess import CROPPED, KINDS, PREPROCESSINGS, WHOLE, Kind, Preprocessing
from tests.tiny import tiny_photo, tiny_sketch

Array = NDArray[np.uint8]


def photo_by_the_words(image: Image.Image) -> Array:
    """Written from PREPROCESSING.md alone, without sbtk."""
    factors = [max(1, math.floor(side / 224 / 3)) for side in image.size]
    if max(factors) > 1:
        image = image.reduce((factors[0], factors[1]))
    return np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR))


def sketch_by_the_words(image: Image.Image, *, is_cropped: bool = True) -> Array:
    """Written from PREPROCESSING.md alone, without sbtk."""
    if max(image.size) > 2048:
        scale = 1024 / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.BOX)
    alpha = np.asarray(image)[..., 3].astype(int) if image.mode == "RGBA" else None
    if alpha is not None:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    red, green, blue = (np.asarray(image.convert("RGB"))[..., i].astype(int) for i in range(3))
    grey = (19595 * red + 38470 * green + 7471 * blue + 32768) // 65536
    if alpha is not None and np.ptp(grey) < 24 <= np.ptp(alpha):
        ink = alpha
    else:
        edges = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        paper = math.floor(np.median(edges))
        if paper < 128:
            paper = max(paper, math.floor(np.median(grey)))
        ink = np.maximum(paper - grey if paper >= 128 else grey - paper, 0)
    rows, columns = np.nonzero(ink >= max(12, ink.max() // 4))
    box = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    if not is_cropped:
        box = ink
    h, w = box.shape
    side = max(round(1.12 * max(h, w)), min(ink.shape) // 4, 1) if is_cropped else max(h, w)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - h) // 2, (side - w) // 2
    square[top : top + h, left : left + w] = box
    how = Image.Resampling.BOX if side > 448 else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(square).resize((224, 224), how)).astype(float)
    least = 1 if is_cropped else max(1, small.max() // 4)
    strong = np.percentile(small[small >= least], 95)
    values = 255 - np.rint(np.minimum(255 * small / strong, 255))
    return np.repeat(values[:, :, None], 3, axis=2).astype(np.uint8)


BY_THE_WORDS: dict[tuple[Preprocessing, Kind], Callable[[Image.Image], Array]] = {
    (CROPPED, "photo"): photo_by_the_words,
    (WHOLE, "photo"): photo_by_the_words,
    (CROPPED, "sketch"): sketch_by_the_words,
    (WHOLE, "sketch"): partial(sketch_by_the_words, is_cropped=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_following_the_contract_gives_the_golden_pixels(bundle: Bundle, kind: Kind) -> None:
    image = Image.open(bundle.folder / image_name(kind))
    wanted = np.asarray(Image.open(bundle.folder / pixels_name(kind)).convert("RGB"))
    found = BY_THE_WORDS[bundle.preprocessing, kind](image)
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
def test_following_the_contract_works_for_other_images(preprocessing: Preprocessing) -> None:
    """Large and small ones, dark grounds and strokes in the alpha channel among them."""
    strokes = tiny_sketch(3)
    inverted = Image.fromarray(255 - np.asarray(strokes))
    clear = Image.merge("RGBA", [Image.new("L", strokes.size, 255)] * 3 + [inverted])
    images: list[tuple[Kind, Image.Image]] = [
        *[("photo", tiny_photo(seed)) for seed in range(3)],
        ("photo", tiny_photo(4).resize((2000, 900))),
        *[("sketch", tiny_sketch(seed).convert("RGB")) for seed in range(3)],
        ("sketch", tiny_sketch(5).convert("RGB").resize((2600, 2100))),
        ("sketch", tiny_sketch(6).convert("RGB").resize((700, 900))),
        ("sketch", inverted.convert("RGB")),
        ("sketch", clear),
    ]
    for kind, image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        wanted = preprocessing.prepare(buffer.getvalue(), kind).pixels
        found = BY_THE_WORDS[preprocessing, kind](image)
        assert np.abs(found.astype(int) - wanted).max() <= 1, (kind, image.size, image.mode)


def test_the_contract_says_whether_sketches_are_cropped(bundle: Bundle) -> None:
    cropped = render_contract(bundle.manifest)
    whole = render_contract(replace(bundle.manifest, preprocessing=WHOLE.name))
    assert "It is not cropped" in whole and WHOLE.name in whole
    assert "smallest box" in cropped and "smallest box" not in whole
    assert "{" not in whole
    # Nothing else differs: the steps for photos, and how to check a port.
    assert (
        whole.partition("## A sketch")[0].replace(WHOLE.name, CROPPED.name)
        == (cropped.partition("## A sketch")[0])
    )
    assert whole.partition("## Checking")[2] == cropped.partition("## Checking")[2]


def test_the_manifest_has_the_hashes_of_contract_and_golden_images(bundle: Bundle) -> None:
    assert {CONTRACT_NAME, GOLDEN_NAME, *map(image_name, KINDS), *map(pixels_name, KINDS)} <= set(
        bundle.manifest.files
    )
    text = (bundle.folder / CONTRACT_NAME).read_text()
    assert text == render_contract(bundle.manifest)
    assert "{" not in text
    golden = read_golden(bundle)
    assert [each.kind for each in golden] == list(KINDS)
    for each in golden:
        assert each.image == make_golden_images()[each.kind]
        assert set(each.embeddings) == set(bundle.precisions)
        for row in each.embeddings.values():
            assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)


def test_models_check_runs_the_golden_images(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "check", str(bundle.folder)]) == 0
    assert capsys.readouterr().out.count("golden images at cosine ") == 3
    changed = Path(shutil.copytree(bundle.folder, tmp_path / "changed"))
    table = json.loads((changed / GOLDEN_NAME).read_text())
    row = table["photo"]["embeddings"]["fp16"]
    table["photo"]["embeddings"]["fp16"] = [*row[1:], row[0]]
    (changed / GOLDEN_NAME).write_text(json.dumps(table))
    replace(bundle.manifest, files=hash_files(changed)).write(changed)
    assert main(["models", "check", str(changed)]) == 1
    assert "the fp16 model embeds the golden photo differently" in capsys.readouterr().err


def test_changed_pixels_are_detected(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = Path(shutil.copytree(bundle.folder, tmp_path / "changed"))
    sketch, photo = (changed / image_name(kind) for kind in KINDS)
    shutil.copy(photo, sketch)
    replace(bundle.manifest, files=hash_files(changed)).write(changed)
    assert main(["models", "check", str(changed)]) == 1
    assert "the golden sketch is prepared differently" in capsys.readouterr().err


def test_a_bundle_from_before_golden_images_passes_its_check(
    bundle: Bundle, tmp_path: Path
) -> None:
    older = Path(shutil.copytree(bundle.folder, tmp_path / "older"))
    for path in older.glob("golden*"):
        path.unlink()
    replace(bundle.manifest, files=hash_files(older)).write(older)
    assert read_golden(Bundle.open(older)) == ()
    assert main(["models", "check", str(older)]) == 0
