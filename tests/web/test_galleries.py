"""Several galleries on one server, each with its page and its API."""

from __future__ import annotations

import shlex
from pathlib import Path

from sbtk_runtime.web.app import gallery_names
from tests.serve_client import ask, query, sketch_png
from tests.tiny import write_photos
from tests.tiny_gallery import index
from tests.web.conftest import Workplace


def test_each_gallery_is_served_under_its_name(workplace: Workplace) -> None:
    other = workplace.folder / "other photos"
    write_photos(other, 3, seed=60)
    index(workplace.folder / "holidays.sbtk", other, workplace.bundle)
    with workplace.serving("--gallery", str(workplace.folder / "holidays.sbtk")) as process:
        process.wait_until_ready()
        port = process.port
        counts = {
            base: ask(port, f"{base}/v1/gallery").json()["count"]
            for base in ("", "/g/gallery", "/g/holidays")
        }
        assert counts == {"": 8, "/g/gallery": 8, "/g/holidays": 3}
        listed = ask(port, "/g/holidays/v1/gallery").json()
        assert listed["galleries"] == [
            {"name": "gallery", "is_current": False},
            {"name": "holidays", "is_current": True},
        ]
        assert listed["command"].count("--gallery") == 2
        assert shlex.split(listed["index_command"])[-1] == str(workplace.folder / "holidays.sbtk")
        sketch = sketch_png()
        found = ask(
            port, "/g/holidays/v1/query?k=50", "POST", sketch, {"content-type": "image/png"}
        ).json()
        assert len(found["hits"]) == 3
        assert len(query(port, sketch, "?k=50").json()["hits"]) == 8
        photo = found["hits"][0]["id"]
        assert ask(port, f"/g/holidays/v1/photos/{photo}/thumbnail").status == 200

        page = ask(port, "/g/holidays/")
        assert (page.status, page.body) == (200, ask(port, "/").body)
        assert page.headers["content-security-policy"].startswith("default-src 'self'")
        assert "sandbox" in ask(port, "/g/holidays/v1/gallery").headers["content-security-policy"]
        moved = ask(port, "/g/holidays")
        assert (moved.status, moved.headers["location"]) == (308, "/g/holidays/")
        moved = ask(port, "/g/holidays?theme=dark")
        assert moved.headers["location"] == "/g/holidays/?theme=dark"
        assert ask(port, "/g/holidays/static/main.js").status == 200
        for path in ("/g/", "/g/unknown/", "/g/unknown/v1/gallery", "/g/holidays/../gallery/none"):
            assert ask(port, path).code == "not_found", path
        # People get a page with a way on: to their gallery if there is one of that name.
        for path, start in (
            ("/g/unknown/", "../../"),
            ("/g/unknown", "../"),
            ("/none", "./"),
            ("/g/holidays/none", "./"),
        ):
            page = ask(port, path, headers={"accept": "text/html,*/*;q=0.8"})
            assert page.status == 404, path
            assert page.headers["content-security-policy"].startswith("default-src 'none'")
            assert f'<a href="{start}">Open the start page</a>' in page.body.decode()
            assert ("no gallery of this name" in page.body.decode()) == ("unknown" in path)
        assert ask(port, "/g/holidays/", headers={"host": "evil.test"}).code == "foreign_host"
        assert ask(port, "/g/unknown/", headers={"host": "evil.test"}).code == "foreign_host"


def test_every_gallery_requires_the_token_and_its_page_takes_it(workplace: Workplace) -> None:
    folder = str(workplace.folder / "second.sbtk")
    index(Path(folder), workplace.photos, workplace.bundle)
    with workplace.serving("--gallery", folder, "--token", "a-secret-token") as process:
        for path in ("/g/gallery/v1/gallery", "/g/gallery/", "/g/unknown/"):
            assert ask(process.port, path).code == "no_token"
        # Relative to the page that was opened.
        signed_in = ask(process.port, "/g/second/?token=a-secret-token")
        assert (signed_in.status, signed_in.headers["location"]) == (303, "./")
        # Wherever a person came from, the form leads to a page that takes the token.
        for path, start in (("/g/second/", "./"), ("/g/unknown/", "../../"), ("/a/b", "../")):
            form = ask(process.port, path, headers={"accept": "text/html"})
            assert (form.status, f'action="{start}"' in form.body.decode()) == (401, True), path


def test_a_server_of_one_gallery_lists_no_others(workplace: Workplace) -> None:
    with workplace.serving() as process:
        process.wait_until_ready()
        assert ask(process.port, "/v1/gallery").json()["galleries"] == []
        assert ask(process.port, "/g/gallery/").status == 404


def test_names_are_unique_and_fit_into_a_url() -> None:
    folders = [
        Path(name) for name in ("/a/x.sbtk", "/b/x.sbtk", "/c/Sommer \u00fc 24", "/d/..sbtk")
    ]
    assert gallery_names(folders) == ["x", "x-2", "Sommer-24", "gallery"]
