"""`sbtk serve --at milvus://...`: the API over a collection in milvus-lite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sbtk_runtime.gallery.push import push_gallery
from sbtk_runtime.gallery.remote import open_store
from tests.milvus_server import LiteServer
from tests.serve_client import ask, query, sketch_png
from tests.serve_process import ServeProcess, serving
from tests.tiny_remote import LITE, server_fixture
from tests.web.conftest import ENGINE, Workplace

pytestmark = pytest.mark.slow

server = server_fixture(LITE)


@pytest.fixture(scope="module")
def there(
    server: LiteServer, shared: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProcess]:
    """A server of the collection, with the photos mounted."""
    url = server.make_database("photos")
    push_gallery(shared.gallery, open_store(url), "nas")
    words = ("--model", str(shared.bundle), *ENGINE, "--at", url)
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(None, *words, "--photos", f"nas={shared.photos}", log=log) as process:
        process.wait_until_ready()
        yield process


def test_hits_filters_and_photos_are_those_of_the_gallery(
    there: ServeProcess, shared: Workplace
) -> None:
    sketch = sketch_png()
    found = query(there.port, sketch, "?as=sketch&k=10").json()["hits"]
    expected = [hit.to_json() for hit in shared.hits(sketch, k=10)]
    for name in ("path", "path_bytes"):
        assert [hit.get(name) for hit in found] == [hit.get(name) for hit in expected]
    scores = [hit["score"] for hit in expected]
    assert [hit["score"] for hit in found] == pytest.approx(scores, abs=1e-5)
    gallery = ask(there.port, "/v1/gallery").json()
    assert gallery["count"] == 34
    album = next(folder for folder in gallery["folders"] if folder["name"] == "album")
    below = query(there.port, sketch, f"?as=sketch&k=50&under={album['path']}").json()["hits"]
    assert len(below) == album["count"]
    photos = ask(there.port, "/v1/photos?limit=20").json()["photos"]
    number = photos[0]["id"]
    assert ask(there.port, f"/v1/photos/{number}/thumbnail").status == 200
    assert len(ask(there.port, f"/v1/photos/{number}/similar?k=3").json()["hits"]) == 3
    assert query(there.port, sketch, "?as=sketch&taken_to=1950-01-01").json()["hits"] == []
    dated = query(there.port, sketch, "?as=sketch&k=50&taken_from=1950-01-01").json()["hits"]
    assert len(dated) == len(query(there.port, sketch, "?as=sketch&k=50").json()["hits"])
