"""Thousands of damaged and hostile image files: each is decoded, partly readable, or refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Failed
from sbtk_runtime.images import FORMATS
from tests.image_attacks import ATTACKS, saved
from tests.tiny import tiny_bundle, tiny_photo

#: Number per format in CI; SBTK_MUTATIONS sets more, with other seeds.
EACH = int(os.environ.get("SBTK_MUTATIONS", "150"))
MOST_CORE_S = 300 + EACH

SCRIPT = """
import collections, json, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
from sbtk_runtime import images
from sbtk_runtime.errors import BadImage
from sbtk_runtime.machine import peak_resident_bytes
from sbtk_runtime.preprocess import prepare
images.MAX_DECODE_S = float(sys.argv[2])
kinds = collections.Counter()
for path in sorted(Path(sys.argv[3]).iterdir()):
    try:
        prepared = prepare(images.read_image_bytes(path), "photo")
    except BadImage as problem:
        assert problem.found.strip() and len(problem.found) < 1000, path
        kinds["refused"] += 1
    else:
        assert prepared.pixels.shape == (224, 224, 3), path
        kinds["partly" if prepared.notices else "whole"] += 1
unit = 1 if sys.platform == "darwin" else 1024
apart = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
print(json.dumps({**kinds, "peak_mb": max(peak_resident_bytes(), apart) // 10**6}))
"""


def decoded(folder: Path, most_decode_s: float) -> dict[str, int]:
    """Decode the files in a folder in a separate process; return the outcomes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(MOST_CORE_S), str(most_decode_s), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def originals(format_: str) -> list[bytes]:
    """Return small files of a format, of several kinds each."""
    photo = tiny_photo(9).resize((96, 72))
    kinds: list[tuple[Image.Image, dict[str, object]]] = [(photo, {}), (photo.convert("L"), {})]
    if format_ == "JPEG":
        kinds += [(photo, {"progressive": True}), (photo.convert("CMYK"), {"quality": 95})]
    if format_ == "PNG":
        kinds += [(photo.convert("P"), {}), (photo.convert("RGBA"), {})]
    if format_ == "TIFF":
        compressions = ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        kinds += [(photo, {"compression": compression}) for compression in compressions]
    if format_ == "WEBP":
        kinds += [(photo, {"lossless": True}), (photo.convert("RGBA"), {"lossless": True})]
        kinds.append((photo, {"save_all": True, "append_images": [photo.rotate(90)]}))
    if format_ == "GIF":
        kinds.append((photo, {"save_all": True, "append_images": [photo.rotate(90)]}))
    return [saved(image, format_, **options) for image, options in kinds]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return a file with bytes flipped, cut, zeroed, repeated or moved, or with a wrong header."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        way = chance.randrange(7)
        # Parsers break on headers.
        end = min(len(made), 200) if chance.random() < 0.5 else len(made)
        at, other = sorted(chance.randrange(max(1, end)) for _ in range(2))
        if way == 0:
            for _ in range(chance.randint(1, 8)):
                made[chance.randrange(max(1, end))] ^= 1 << chance.randrange(8)
        elif way == 1:
            del made[chance.randrange(len(made) // 2, len(made)) :]
        elif way == 2:
            made[at:other] = bytes(other - at)
        elif way == 3:
            made[at:at] = made[at:other] * chance.randint(1, 20)
        elif way == 4:
            del made[at:other]
        elif way == 5:
            made[at : at + 4] = chance.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\1", b"\x7f\xff\xff\xff")
            )
        else:
            made[0:0] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 40)))
        if not made:
            made = bytearray(b"\0")
    return bytes(made)


def mutations(format_: str) -> Iterator[bytes]:
    chance = random.Random(f"{format_} {EACH}")
    kinds = originals(format_)
    for number in range(EACH):
        yield mutated(kinds[number % len(kinds)], chance)


@pytest.mark.parametrize("format_", FORMATS)
def test_every_mutated_file_is_accounted_for(tmp_path: Path, format_: str) -> None:
    for number, data in enumerate(mutations(format_)):
        (tmp_path / f"{number:06}").write_bytes(data)
    counts = decoded(tmp_path, 10.0)
    assert counts.pop("peak_mb") < 500
    assert sum(counts.values()) == EACH
    # Check that files were tried.
    assert counts["refused"] > EACH // 20
    assert counts["whole"] + counts.get("partly", 0) > EACH // 75


@pytest.mark.slow
def test_hostile_files_are_handled_in_limited_time_and_memory(tmp_path: Path) -> None:
    for number, make in enumerate(ATTACKS.values()):
        (tmp_path / f"{number:03}").write_bytes(make())
    # One second, so that the test is quick; slower files are reported as too slow.
    counts = decoded(tmp_path, 1.0)
    assert counts.pop("peak_mb") < 500
    assert sum(counts.values()) == len(ATTACKS)


def test_a_stream_of_mutated_files_names_each_bad_one(tmp_path: Path) -> None:
    paths = []
    for format_ in FORMATS:
        for number, data in zip(range(12), mutations(format_), strict=False):
            paths.append(tmp_path / f"{format_}-{number}")
            paths[-1].write_bytes(data)
    bundle = tiny_bundle(tmp_path / "bundle")
    with Embedder(bundle, engine="onnxruntime", threads=2, batch=4) as embedder:
        items = list(embedder.stream(iter(paths), "photo"))
    assert [item.path for item in items] == paths
    assert all(item.reason for item in items if isinstance(item, Failed))
