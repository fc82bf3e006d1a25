"""`sbtk open` as a user starts it: photos to page in one command, joined by a second one."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sbtk_cli.main import main
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.manifest import MANIFEST_NAME
from tests.runtime.gallery.test_regions import CORNERS, scene, thing
from tests.serve_client import ask, png, query, sketch_png
from tests.tiny import tiny_bundle, write_photos
from tests.tiny_regions import tiny_map_bundle

_ENGINE = ("--engine", "onnxruntime", "--threads", "1", "--no-browser", "--port", "0")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@contextlib.contextmanager
def opened(
    home: Path, bundle: Path, *arguments: str | Path
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start `sbtk open`; yield the process and the address that it prints."""
    command = [sys.executable, "-P", "-m", "sbtk_cli", "open", *map(str, arguments)]
    process = subprocess.Popen(
        [*command, "--model", str(bundle), *_ENGINE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_DATA_HOME": str(home)},
    )
    with process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def port_of(address: str) -> int:
    return int(address.split("/")[2].rpartition(":")[2])


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def count(port: int) -> int:
    """Return the number of photos that a query finds, -1 while none is answered."""
    answer = query(port, sketch_png(), "?k=100")
    return len(answer.json()["hits"]) if answer.status == 200 else -1


def has_photos(port: int, number: int) -> bool:
    return count(port) == number


def test_photos_are_indexed_served_and_updated_by_a_second_open(
    tmp_path: Path, bundle: Path
) -> None:
    photos, home = tmp_path / "photos", tmp_path / "home"
    write_photos(photos, 10)
    with opened(home, bundle, photos) as (process, address):
        port = port_of(address)
        wait_until(lambda: count(port) == 10)
        write_photos(photos / "more", 5, seed=40)
        with opened(home, bundle, photos) as (second, joined):
            assert joined == address
            assert second.wait(30) == 0
        wait_until(lambda: count(port) == 15)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "10 photos searchable (10 new)" in said
    assert "15 photos searchable (5 new)" in said
    assert said.splitlines()[-1] == "Stopped."
    [gallery] = (home / "sbtk" / "galleries").iterdir()
    assert gallery.name.startswith("photos-")
    with Gallery.open(gallery) as content:
        assert content.count == 15
    # Later, the same command updates the same gallery.
    write_photos(photos / "again", 2, seed=90)
    with opened(home, bundle, photos) as (_, address):
        port = port_of(address)
        wait_until(lambda: count(port) == 17)
    assert [gallery] == list((home / "sbtk" / "galleries").iterdir())


@pytest.mark.parametrize("is_joined", [False, True])
def test_regions_are_embedded_at_once_or_later_by_a_running_server(
    tmp_path: Path, is_joined: bool
) -> None:
    photos, home = tmp_path / "photos", tmp_path / "home"
    bundle = tiny_map_bundle(tmp_path / "map")
    for number, box in enumerate(CORNERS):
        scene(photos / f"{number}.png", "red", box, number)
    first = () if is_joined else ("--regions",)
    with opened(home, bundle, photos, *first) as (_, address):
        port = port_of(address)
        wait_until(lambda: count(port) == len(CORNERS))
        if is_joined:
            assert ask(port, "/v1/gallery").json()["regions"] is None
            with opened(home, bundle, photos, "--regions") as (second, joined):
                assert joined == address
                assert second.wait(30) == 0
        wait_until(lambda: ask(port, "/v1/gallery").json().get("regions") == 16)
        hits = query(port, png(thing("red")), "?as=photo").json()["hits"]
        assert all("region" in hit for hit in hits)


def test_another_model_indexes_the_photos_again(tmp_path: Path, bundle: Path) -> None:
    photos, home = tmp_path / "photos", tmp_path / "home"
    write_photos(photos, 3)
    other = tiny_bundle(tmp_path / "other", seed=1)
    models = set()
    for chosen, said in ((bundle, False), (other, True), (bundle, False), (other, False)):
        earlier = {*(home / "sbtk" / "galleries").glob("*.sbtk")}
        with opened(home, chosen, photos) as (process, address):
            wait_until(functools.partial(has_photos, port_of(address), 3))
            models.add(ask(port_of(address), "/v1/gallery").json()["model_id"])
            process.send_signal(signal.SIGINT)
            notices = process.communicate(timeout=30)[1].splitlines()
        names = " ".join(line for line in notices if "model has changed" in line)
        assert [str(folder) in names for folder in earlier] == [said] * len(earlier)
    assert len(models) == 2 == len([*(home / "sbtk" / "galleries").glob("*.sbtk")])


def test_folders_without_photos_end_the_command(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "empty").mkdir()
    with opened(tmp_path / "home", bundle, tmp_path / "empty") as (process, _):
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.lower().count("no photo") == 1
    assert "Traceback" not in said


def test_a_read_only_page_changes_nothing(tmp_path: Path, bundle: Path) -> None:
    write_photos(tmp_path / "photos", 3)
    arguments = (tmp_path / "photos", "--gallery", tmp_path / "named.sbtk")
    with opened(tmp_path / "home", bundle, *arguments, "--read-only") as (_, address):
        port = port_of(address)
        wait_until(lambda: count(port) == 3)
        assert ask(port, "/v1/indexing", "POST").code == "read_only"
        # It can be joined, but not updated.
        with opened(tmp_path / "home", bundle, *arguments) as (second, joined):
            assert joined == address
            assert "not updated" in second.communicate(timeout=30)[1]
            assert second.returncode == 3
    assert not (tmp_path / "home").exists()


def test_a_gallery_of_another_model_is_not_joined(tmp_path: Path, bundle: Path) -> None:
    write_photos(tmp_path / "photos", 3)
    arguments = (tmp_path / "photos", "--gallery", tmp_path / "named.sbtk")
    other = tiny_bundle(tmp_path / "other", seed=1)
    with opened(tmp_path, bundle, *arguments) as (_, address):
        wait_until(functools.partial(has_photos, port_of(address), 3))
        with opened(tmp_path, other, *arguments) as (second, _):
            assert "did not make" in second.communicate(timeout=30)[1]
            assert second.returncode == 1
    # Nor opened by a server of its own.
    with opened(tmp_path, other, *arguments) as (alone, _):
        assert "did not make" in alone.communicate(timeout=30)[1]
        assert alone.returncode == 1


def test_a_gallery_of_another_model_is_not_joined_before_anything_is_published(
    tmp_path: Path, bundle: Path
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 300)
    other = tiny_bundle(tmp_path / "other", seed=1)
    with opened(tmp_path, bundle, photos, "--gallery", tmp_path / "named.sbtk") as (first, _):
        first.send_signal(signal.SIGSTOP)
        assert not (tmp_path / "named.sbtk" / MANIFEST_NAME).exists()
        with opened(tmp_path, other, photos, "--gallery", tmp_path / "named.sbtk") as (second, _):
            assert "did not make" in second.communicate(timeout=30)[1]
            assert second.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "Name the folders of your photos"),
        (["missing/"], 1, "missing cannot be read"),
        (["--gallery", "missing.sbtk"], 1, "there is no gallery missing.sbtk"),
    ],
)
def test_the_error_names_what_cannot_be_opened(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    assert main(["open", *arguments, "--no-browser"]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_each_set_of_folders_has_its_own_gallery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sbtk_cli.open import default_gallery

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    one, two = tmp_path / "a", tmp_path / "b"
    assert default_gallery([one, two], "m@1") == default_gallery([two, one, one], "m@1")
    sets = ([one], "m@1"), ([two], "m@1"), ([one, two], "m@1"), ([one], "m@2")
    assert len({default_gallery(*each) for each in sets}) == 4
    assert default_gallery([Path("/")], "m@1").name.startswith("photos-")
    odd = default_gallery([tmp_path / "sömmer/../x y\n" / os.fsdecode(b"\xff")], "m@1")
    assert odd.name.isascii() or odd.name.isprintable()
