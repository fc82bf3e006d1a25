"""The collection over HTTP: its folders and failures, indexing, and who may change it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from sbtk_runtime.gallery.gallery import Gallery
from tests.serve_client import ask, query, sketch_png
from tests.serve_process import ServeProcess
from tests.tiny import write_photos
from tests.web.conftest import Workplace


@pytest.fixture
def place(workplace: Workplace) -> Iterator[tuple[Workplace, ServeProcess]]:
    """A workplace of 8 photos, served, that the page may change."""
    with workplace.serving() as process:
        process.wait_until_ready()
        yield workplace, process
        assert process.health()[0] == 200
    assert "Traceback" not in (log := process.log.read_text()), log


def after_jobs(port: int, count: int) -> dict[str, Any]:
    """Return the state of indexing after so many jobs."""
    end = time.monotonic() + 60
    while True:
        state: dict[str, Any] = ask(port, "/v1/indexing").json()
        if state["jobs"] >= count and state["phase"] == "idle":
            return state
        assert time.monotonic() < end, state
        time.sleep(0.05)


def until_generation(port: int, generation: int) -> None:
    end = time.monotonic() + 20
    while ask(port, "/v1/gallery").json()["generation"] < generation:
        assert time.monotonic() < end
        time.sleep(0.05)


def folders(port: int) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in ask(port, "/v1/folders").json()["folders"]}


def test_folders_are_added_updated_and_forgotten(
    place: tuple[Workplace, ServeProcess], tmp_path: Path
) -> None:
    workplace, process = place
    port = process.port
    odd = tmp_path / "naïve & co"
    write_photos(odd, 5, seed=70)
    answer = ask(port, f"/v1/indexing?under={quote(str(odd))}", "POST")
    assert (answer.status, answer.json()["phase"]) == (202, "finding")
    state = after_jobs(port, 1)
    assert state["report"]["new"] == 5
    assert "problem" not in state
    until_generation(port, 2)
    assert {name: one["photos"] for name, one in folders(port).items()} == {
        str(odd): 5,
        str(workplace.photos): 8,
    }
    assert len(query(port, sketch_png(), "?k=50").json()["hits"]) == 13

    # A drive is unplugged, and comes back.
    away = tmp_path / "away"
    odd.rename(away)
    assert not folders(port)[str(odd)]["exists"]
    ask(port, "/v1/indexing", "POST")
    report = after_jobs(port, 2)["report"]
    assert (report["missing"], len(report["warnings"])) == (5, 1)
    assert folders(port)[str(odd)]["missing"] == 5
    away.rename(odd)
    ask(port, f"/v1/indexing?under={quote(str(odd))}", "POST")
    assert after_jobs(port, 3)["report"]["found_again"] == 5

    # The last folder can be forgotten, too.
    for count, folder in enumerate([odd, workplace.photos], start=4):
        assert ask(port, f"/v1/folders?under={quote(str(folder))}", "DELETE").status == 202
        state = after_jobs(port, count)
        # What the last update said of the folder is no longer so.
        assert not state.keys() & {"problem", "report"}, state
    until_generation(port, 6)
    assert folders(port) == {}
    assert query(port, sketch_png()).json()["hits"] == []
    assert len(list(odd.iterdir())) == 5
    ask(port, f"/v1/indexing?under={quote(str(odd))}", "POST")
    assert after_jobs(port, 6)["photos"] == 5


def test_a_renamed_folder_is_added_again_and_its_old_name_removed(
    place: tuple[Workplace, ServeProcess], tmp_path: Path
) -> None:
    workplace, process = place
    port = process.port
    renamed = workplace.photos.rename(tmp_path / "renamed")
    ask(port, f"/v1/indexing?under={quote(str(renamed))}", "POST")
    report = after_jobs(port, 1)["report"]
    assert (report["moved"], report["new"]) == (8, 0)
    assert folders(port)[str(workplace.photos)]["photos"] == 0
    ask(port, f"/v1/folders?under={quote(str(workplace.photos))}", "DELETE")
    assert "problem" not in after_jobs(port, 2)
    until_generation(port, 3)
    assert {name: one["photos"] for name, one in folders(port).items()} == {str(renamed): 8}


def test_a_photos_folder_is_shown_in_the_file_manager(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "opened"
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "xdg-open").write_text(
        f'#!/bin/sh\nprintf "%s" "$1" >"{log}.part"\nmv "{log}.part" "{log}"\n'
    )
    (programs / "xdg-open").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    odd = workplace.photos / "a 'b\" $(touch x) -c"
    odd.mkdir()
    (workplace.photos / "photo-0001.png").rename(odd / "photo-0001.png")
    workplace.index()
    with Gallery.open(workplace.gallery) as gallery:
        ids = {Path(one.photo.path).name: one.photo.id for one in gallery.recent(9)}
    address = f"/v1/photos/{ids['photo-0001.png']}/folder"

    monkeypatch.setenv("DISPLAY", ":0")
    with workplace.serving() as process:
        process.wait_until_ready()
        assert ask(process.port, "/v1/folders").json()["can_show"]
        answer = ask(process.port, address, "POST")
        assert (answer.status, answer.json()) == (202, {"folder": str(odd)})
        process.wait_for(log.exists)
        assert log.read_text() == str(odd)
        assert ask(process.port, "/v1/photos/999/folder", "POST").code == "no_photo"
        for headers in ({"origin": "http://evil.example"}, {"x-forwarded-for": "10.0.0.9"}):
            assert ask(process.port, address, "POST", headers=headers).status == 403
        assert ask(process.port, address).status == 405
        (odd / "photo-0001.png").unlink()
        assert ask(process.port, address, "POST").code == "no_photo"
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with workplace.serving() as process:
        process.wait_until_ready()
        assert not ask(process.port, "/v1/folders").json()["can_show"]
        assert ask(process.port, address, "POST").code == "no_file_manager"


def test_unreadable_files_are_listed(place: tuple[Workplace, ServeProcess]) -> None:
    workplace, process = place
    port = process.port
    (workplace.photos / "<img src=x onerror=alert(1)>.jpg").write_bytes(b"not a photo")
    cut = workplace.photos / "cut.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 95 // 100])
    ask(port, "/v1/indexing", "POST")
    assert after_jobs(port, 1)["report"]["unreadable"] == 1
    until_generation(port, 2)
    content = ask(port, "/v1/failures").json()
    assert content["count"] == 2
    assert [Path(one["path"]).name for one in content["failures"]] == [
        "<img src=x onerror=alert(1)>.jpg",
        "cut.jpg",
    ]
    assert [one["is_searchable"] for one in content["failures"]] == [False, True]
    assert all(one["reason"] for one in content["failures"])
    second = ask(port, "/v1/failures?limit=1&offset=1").json()
    assert second == {"failures": content["failures"][1:], "count": 2}


def test_events_follow_the_progress(place: tuple[Workplace, ServeProcess], tmp_path: Path) -> None:
    _, process = place
    write_photos(tmp_path / "more", 60, seed=300)
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=20)
    connection.request("GET", "/v1/indexing/events")
    response = connection.getresponse()
    assert response.getheader("content-type", "").startswith("text/event-stream")
    states = events(response)
    assert next(states)["phase"] == "idle"
    ask(process.port, f"/v1/indexing?under={quote(str(tmp_path / 'more'))}", "POST")
    seen = [next(states)]
    while seen[-1]["phase"] != "idle" or seen[-1].get("photos") != 68:
        seen.append(next(states))
    assert seen[-1]["report"]["new"] == 60
    assert {state["phase"] for state in seen} >= {"idle"}
    connection.close()
    assert query(process.port, sketch_png()).status == 200


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def test_a_folder_that_cannot_be_indexed_is_refused(
    place: tuple[Workplace, ServeProcess], tmp_path: Path
) -> None:
    _, process = place
    port = process.port
    missing = ask(port, f"/v1/indexing?under={quote(str(tmp_path / 'missing'))}", "POST")
    assert (missing.status, missing.code) == (422, "bad_folder")
    too_long = ask(port, f"/v1/indexing?under=/{'x' * 300}", "POST")
    assert (too_long.status, too_long.code) == (422, "bad_folder")
    assert ask(port, "/v1/indexing?under=relative", "POST").code == "bad_parameter"
    assert ask(port, "/v1/folders", "DELETE").code == "bad_parameter"
    for count in ("7", "0", "-9", "sixteen", "16.0", ""):
        answer = ask(port, f"/v1/indexing?regions={count}", "POST")
        assert (answer.status, answer.code) == (422, "bad_parameter")
    # Known only once it is tried; the reason is in the state, and the gallery stays.
    empty = tmp_path / "empty"
    empty.mkdir()
    ask(port, f"/v1/indexing?under={quote(str(empty))}", "POST")
    state = after_jobs(port, 1)
    assert "photo" in state["problem"]["message"]
    ask(port, f"/v1/folders?under={quote(str(tmp_path / 'unknown'))}", "DELETE")
    assert "no photo below" in after_jobs(port, 2)["problem"]["message"]
    assert len(query(port, sketch_png()).json()["hits"]) == 8


FOREIGN = [
    {"origin": "http://evil.test"},
    {"sec-fetch-site": "cross-site"},
    {"host": "evil.test"},
    {"x-forwarded-for": "203.0.113.9"},
    {"forwarded": "for=203.0.113.9"},
]


def test_only_the_user_of_this_machine_can_change_the_gallery(
    place: tuple[Workplace, ServeProcess],
) -> None:
    workplace, process = place
    port = process.port
    for headers in FOREIGN:
        named = {"host": f"127.0.0.1:{port}"} | headers
        for path, method in (
            ("/v1/indexing", "POST"),
            (f"/v1/folders?under={quote(str(workplace.photos))}", "DELETE"),
        ):
            answer = ask(port, path, method, headers=named)
            assert answer.status == 403
            assert answer.code in ("read_only", "foreign_origin", "foreign_host")
    assert ask(port, "/v1/indexing").json()["jobs"] == 0


@pytest.mark.parametrize("options", [("--read-only",), ("--host", "0.0.0.0")])
def test_read_only_and_remote_servers_refuse_changes(
    workplace: Workplace, options: tuple[str, ...]
) -> None:
    with workplace.serving(*options, "--token", "a-secret-token") as process:
        process.wait_until_ready()
        bearer = {"authorization": "Bearer a-secret-token"}
        assert ask(process.port, "/v1/indexing", "POST").code == "no_token"
        answer = ask(process.port, "/v1/indexing", "POST", headers=bearer)
        assert (answer.status, answer.code) == (403, "read_only")
        assert ask(process.port, "/v1/photos/1/folder", "POST", headers=bearer).code == "read_only"
        listed = ask(process.port, "/v1/folders", headers=bearer).json()
        assert not listed["can_change"]
        assert listed["folders"][0]["photos"] == 8


def test_removing_a_folder_during_indexing_ends_with_a_reason(
    place: tuple[Workplace, ServeProcess], tmp_path: Path
) -> None:
    _, process = place
    write_photos(tmp_path / "fleeting", 30, seed=400)
    ask(process.port, f"/v1/indexing?under={quote(str(tmp_path / 'fleeting'))}", "POST")
    shutil.rmtree(tmp_path / "fleeting")
    state = after_jobs(process.port, 1)
    assert state.get("problem") or state["report"]["new"] + state["report"]["unreadable"] <= 30
    ask(process.port, "/v1/indexing", "POST")
    after_jobs(process.port, 2)
    assert query(process.port, sketch_png()).status == 200
