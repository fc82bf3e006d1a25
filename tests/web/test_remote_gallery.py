"""`sbtk serve --at`: the page and the API over a collection in a real PostgreSQL."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbtk_runtime.gallery.push import push_gallery
from sbtk_runtime.gallery.remote import open_store
from tests.postgres_server import PASSWORD, PLAIN_PASSWORD, PostgresServer
from tests.serve_client import ask, query, sketch_png
from tests.serve_process import ServeProcess, serving
from tests.tiny_remote import POSTGRES, server_fixture
from tests.web.conftest import ENGINE, Workplace

pytestmark = pytest.mark.slow

server = server_fixture(POSTGRES)


@pytest.fixture(scope="module")
def url(server: PostgresServer, shared: Workplace) -> str:
    push_gallery(shared.gallery, open_store(server.url()), "nas")
    return server.url()


@pytest.fixture(scope="module")
def there(
    url: str, shared: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProcess]:
    """A server of the collection, with the photos mounted."""
    words = ("--model", str(shared.bundle), *ENGINE, "--at", url)
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(None, *words, "--photos", f"nas={shared.photos}", log=log) as process:
        process.wait_until_ready()
        yield process


def test_hits_are_those_of_the_gallery(there: ServeProcess, shared: Workplace) -> None:
    sketch = sketch_png()
    answer = query(there.port, sketch, "?as=sketch&k=10").json()
    expected = [hit.to_json() for hit in shared.hits(sketch, k=10)]
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(
        [hit["score"] for hit in expected], abs=1e-5
    )
    names = ("path", "path_bytes")
    assert [[hit.get(name) for name in names] for hit in answer["hits"]] == [
        [hit.get(name) for name in names] for hit in expected
    ]
    assert all(hit["id"] > 1 << 40 for hit in answer["hits"])


def test_photos_have_thumbnails_files_and_neighbours(there: ServeProcess) -> None:
    for photo in ask(there.port, "/v1/photos?limit=20").json()["photos"]:
        number = photo["id"]
        details = ask(there.port, f"/v1/photos/{number}").json()
        assert details["id"] == number and details.get("path") == photo.get("path")
        thumbnail = ask(there.port, f"/v1/photos/{number}/thumbnail")
        assert (thumbnail.status, thumbnail.body[:2]) == (200, b"\xff\xd8")
        assert ask(there.port, f"/v1/photos/{number}/file").status == 200
        found = ask(there.port, f"/v1/photos/{number}/similar?k=3").json()["hits"]
        assert len(found) == 3 and number not in [hit["id"] for hit in found]
    assert ask(there.port, "/v1/photos/5").status == 404
    assert ask(there.port, f"/v1/photos/{1 << 63}").status == 404


def test_hits_can_be_limited_to_a_folder(there: ServeProcess, shared: Workplace) -> None:
    gallery = ask(there.port, "/v1/gallery").json()
    assert (gallery["name"], gallery["count"]) == ("sbtk", 34)
    album = next(folder for folder in gallery["folders"] if folder["name"] == "album")
    assert album["path"] == str(shared.photos / "album")
    path = f"?as=sketch&under={album['path']}"
    found = query(there.port, sketch_png(), path).json()["hits"]
    assert len(found) == album["count"]
    assert all(hit["path"].startswith(album["path"] + "/") for hit in found)


def test_no_response_contains_the_password(there: ServeProcess) -> None:
    command = ask(there.port, "/v1/gallery").json()["command"]
    words = shlex.split(command)
    assert words[:3] == ["sbtk", "serve", "--at"] and "@127.0.0.1" in words[3]
    listed = Path(f"/proc/{there.process.pid}/cmdline").read_bytes().decode()
    for text in (command, there.log.read_text(), listed):
        assert PASSWORD not in text and PLAIN_PASSWORD not in text


def test_feedback_gives_the_hits_of_the_gallery(there: ServeProcess, shared: Workplace) -> None:
    sketch = sketch_png()
    with shared.serving() as local:
        local.wait_until_ready()
        here = query(local.port, sketch, "?as=sketch&k=6").json()["hits"]
        elsewhere = query(there.port, sketch, "?as=sketch&k=6").json()["hits"]
        for liked, unliked in ((2, 0), (4, 1)):
            answers = []
            for port, hits in ((local.port, here), (there.port, elsewhere)):
                feedback = f"like={hits[liked]['id']}&unlike={hits[unliked]['id']}"
                refined = query(port, sketch, f"?as=sketch&k=6&{feedback}")
                assert refined.status == 200, refined.body
                found = refined.json()["hits"]
                assert found != hits
                only = ask(port, f"/v1/similar?{feedback}&k=6")
                assert only.status == 200, only.body
                answers.append([*found, *only.json()["hits"]])
            names = [[hit.get("path", hit.get("path_bytes")) for hit in hits] for hits in answers]
            assert names[0] == names[1]
    missing = query(there.port, sketch, "?as=sketch&like=5")
    assert missing.status == 404


def test_the_collection_is_shown_but_not_changed(there: ServeProcess, shared: Workplace) -> None:
    listed = ask(there.port, "/v1/folders").json()
    assert listed["can_change"] is False
    assert [(one["path"], one["photos"], one["exists"]) for one in listed["folders"]] == [
        (str(shared.photos), 34, True)
    ]
    assert ask(there.port, "/v1/failures").json() == {"failures": [], "count": 0}
    assert ask(there.port, "/v1/indexing").json()["phase"] == "idle"
    for method, path in (
        ("POST", "/v1/indexing"),
        ("DELETE", f"/v1/folders?under={shared.photos}"),
    ):
        answer = ask(there.port, path, method=method)
        assert (answer.status, answer.json()["error"]["code"]) == (403, "read_only")
        assert "a database" in answer.json()["error"]["message"]
    number = ask(there.port, "/v1/photos?limit=1").json()["photos"][0]["id"]
    part = ask(there.port, f"/v1/photos/{number}/similar?region=0,0,0.5,0.5")
    assert part.status == 422


def test_reranking_is_refused(there: ServeProcess) -> None:
    answer = query(there.port, sketch_png(), "?as=sketch&rerank=expand")
    assert (answer.status, answer.json()["error"]["code"]) == (422, "bad_parameter")


@pytest.mark.kill
def test_the_server_survives_unmounted_photos_and_a_crash_of_the_database(
    server: PostgresServer, url: str, shared: Workplace, tmp_path: Path
) -> None:
    words = ("--model", str(shared.bundle), *ENGINE, "--at", url)
    with serving(None, *words, log=tmp_path / "log") as process:
        process.wait_until_ready()
        assert "photos of nas are not mounted here" in (tmp_path / "log").read_text()
        hit = query(process.port, sketch_png(), "?as=sketch&k=1").json()["hits"][0]
        path = base64.b64decode(hit.get("path_bytes", "")).decode("latin-1") or hit["path"]
        assert path.startswith("source:nas/")
        folders = ask(process.port, "/v1/gallery").json()["folders"]
        album = next(folder for folder in folders if folder["name"] == "album")
        assert album["path"] == "source:nas/album"
        below = query(process.port, sketch_png(), f"?as=sketch&k=50&under={album['path']}").json()
        assert len(below["hits"]) == album["count"]
        listed = ask(process.port, "/v1/folders").json()["folders"]
        assert [(one["path"], one["exists"]) for one in listed] == [("source:nas", False)]
        thumbnail = ask(process.port, f"/v1/photos/{hit['id']}/thumbnail")
        assert (thumbnail.status, thumbnail.json()["error"]["code"]) == (404, "no_photo")
        server.kill()
        answer = query(process.port, sketch_png(), "?as=sketch&k=1")
        assert (answer.status, answer.json()["error"]["code"]) == (503, "gallery_unavailable")
        assert PLAIN_PASSWORD not in answer.body.decode()
        server.start()
        assert query(process.port, sketch_png(), "?as=sketch&k=1").status == 200
