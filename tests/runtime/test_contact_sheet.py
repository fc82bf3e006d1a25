"""Contact sheets: frames of regions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sbtk_runtime.contact_sheet import contact_sheet
from sbtk_runtime.gallery.queries import Hit


@pytest.mark.parametrize(
    ("size", "style"),
    [
        ((400, 200), "left:50.00%;top:25.00%;width:25.00%;height:50.00%"),
        ((300, 300), "left:50.00%;top:25.00%;width:25.00%;height:50.00%"),
        # Wider and narrower than any card, with margins above or beside it.
        ((600, 100), "left:50.00%;top:37.50%;width:25.00%;height:25.00%"),
        ((60, 200), "left:50.00%;top:25.00%;width:12.50%;height:50.00%"),
    ],
)
def test_the_frame_on_a_card_is_at_its_region(
    tmp_path: Path, size: tuple[int, int], style: str
) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", size, (20, 90, 200)).save(path)
    hit = Hit(1, 0.5, 1, str(path), region=(0.5, 0.25, 0.25, 0.5))
    page = contact_sheet(path.read_bytes(), [hit], name="q", kind="photo")
    assert f'<i class="region-frame" style="{style}"></i>' in page
    whole = replace(hit, region=None)
    for hits, inline_bytes in (([whole], 10_000), ([hit], 0)):
        page = contact_sheet(
            path.read_bytes(), hits, name="q", kind="photo", inline_bytes=inline_bytes
        )
        assert '<i class="region-frame" style="left:5' not in page
