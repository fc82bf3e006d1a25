"""A served gallery follows its OpenAPI description, whatever is sent."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.serve_client import ask, query, sketch_png
from tests.serve_process import ServeProcess
from tests.tiny import tiny_photo

pytestmark = pytest.mark.slow

# A body may be what its description says, some bytes, and yet not an image; and a period may end
# before it begins.
_SETTINGS = """
[[operations]]
include-path = "/v1/query"
checks.positive_data_acceptance.expected-statuses = [200, 400, 404, 422]

[[operations]]
include-path = "/v1/photos"
checks.positive_data_acceptance.expected-statuses = [200, 422]

[[operations]]
include-path = "/v1/similar"
checks.positive_data_acceptance.expected-statuses = [200, 404, 422]

# Each image of a batch has its own error.
[[operations]]
include-path = "/v1/queries"
checks.positive_data_acceptance.expected-statuses = [200, 400, 422]
checks.negative_data_rejection.expected-statuses = [200, 400, 415, 422]

# A box may be four numbers in range and yet go beyond the photo, or the gallery has no regions.
[[operations]]
include-path = "/v1/photos/{photo_id}/similar"
checks.positive_data_acceptance.expected-statuses = [200, 401, 403, 404, 422, 503]

# Its responses do not end.
[[operations]]
include-path = "/v1/indexing/events"
enabled = false
"""


def test_every_operation_conforms_to_its_description(server: ServeProcess, tmp_path: Path) -> None:
    description = ask(server.port, "/openapi.json").json()
    operations = sum(len(methods) for methods in description["paths"].values())
    assert operations >= 8
    (tmp_path / "schemathesis.toml").write_text(_SETTINGS)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.origin}/openapi.json"]
    command += ["--max-examples", "8", "--generation-deterministic", "--request-timeout", "20"]
    # Deadlines are no business of a machine that does other work too.
    command += ["--suppress-health-check", "all", "--no-color"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"Tested: {operations - 1}" in done.stdout
    cases = re.search(r"(\d+) generated", done.stdout)
    assert cases is not None
    assert int(cases[1]) > 100


def test_damaged_images_give_hits_or_an_error(server: ServeProcess) -> None:
    photo = io.BytesIO()
    tiny_photo(1).save(photo, "JPEG")
    webp = io.BytesIO()
    tiny_photo(2).save(webp, "WEBP")
    random = np.random.default_rng(5)
    found: Counter[str] = Counter()
    for image in (sketch_png(), photo.getvalue(), webp.getvalue()):
        for _ in range(60):
            answer = query(server.port, _damaged(image, random), "?as=photo&k=2")
            assert answer.status in (200, 400), answer
            found["hits" if answer.status == 200 else answer.code] += 1
    assert found["hits"] >= 5
    assert found["bad_image"] >= 5
    assert set(found) <= {"hits", "bad_image", "empty_sketch"}


def _damaged(image: bytes, random: np.random.Generator) -> bytes:
    """Return the bytes with some of them changed, doubled, or left out."""
    data = bytearray(image)
    kind, place = random.integers(3), int(random.integers(len(data)))
    length = int(random.integers(1, 64))
    if kind == 0:
        for _ in range(int(random.integers(1, 4))):
            data[int(random.integers(len(data)))] ^= int(random.integers(1, 256))
    elif kind == 1:
        data[place:place] = data[place : place + length]
    else:
        del data[place : place + length]
    return bytes(data)
