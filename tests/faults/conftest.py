"""A server of a small gallery with odd names, for tests of attacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serve_client import Answer, ask, query, sketch_png
from tests.serve_process import ServeProcess, serving
from tests.tiny import tiny_bundle, tiny_photo, write_photos
from tests.tiny_gallery import index

SECRET = b"root:x:0:0: what nobody may read"
MARKUP = "\"><img src=x onerror=alert(1)><script>alert('name')<script>.png"
BREAKING = "line\r\nSet-Cookie: stolen=1\n\x1b[31m.png"


@dataclass(frozen=True)
class Served:
    """A server, and where its photos lie."""

    process: ServeProcess
    photos: Path
    ids: dict[str, int]

    def get(self, path: str, **headers: str) -> Answer:
        """Return the answer to a GET."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return ask(self.process.port, path, headers=named)

    def query(self, image: bytes, parameters: str = "", media: str = "image/png") -> Answer:
        """Return the answer to a query."""
        return query(self.process.port, image, parameters, media)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    photos = folder / "photos"
    write_photos(photos, 6)
    write_photos(photos / "album", 2, seed=1)
    for seed, name in enumerate((MARKUP, BREAKING), 500):
        tiny_photo(seed).save(photos / name, "PNG")
    bundle = tiny_bundle(folder / "bundles" / "tiny")
    index(folder / "gallery.sbtk", photos, bundle)
    (folder / "secret.jpg").write_bytes(SECRET)
    options = ("--model", str(bundle), "--engine", "onnxruntime", "--threads", "1")
    with serving(folder / "gallery.sbtk", *options, log=folder / "log") as process:
        process.wait_until_ready()
        hits = query(process.port, sketch_png(), "?k=200").json()["hits"]
        assert len(hits) == 10
        ids = {str(Path(hit["path"]).relative_to(photos)): hit["id"] for hit in hits}
        yield Served(process, photos, ids)
        assert process.process.poll() is None, "the server has died"
        assert process.health()[0] == 200
        log = process.log.read_text()
    assert "Traceback" not in log
    assert len(log) < 5_000, log
