"""Requests for what clients must not have, to a real server of a gallery."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sbtk_cli.main import main
from tests.faults.conftest import BREAKING, MARKUP, SECRET, Served
from tests.serve_client import all_received, ask, connected, sketch_png

ODD_IDS = [
    "..%2f..%2fetc%2fpasswd",
    "..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "../../../../etc/passwd",
    "%00",
    "1%00",
    "1%2f..%2f2",
    "0",
    "-1",
    "99999",
    str(2**31),
    str(2**63 - 1),
    str(2**63),
    str(10**30),
    "9" * 5_000,
    "1e3",
    "0x1",
    "1.5",
    "%C0%AF",
    "%ff",
    "NaN",
    "null",
    "1;1",
    "*",
    "",
]


@pytest.mark.parametrize("odd", ODD_IDS, ids=lambda odd: odd[:24])
def test_only_ids_of_indexed_photos_give_photos(served: Served, odd: str) -> None:
    for rest in ("", "/thumbnail", "/file", "/similar"):
        answer = served.get(f"/v1/photos/{odd}{rest}")
        assert answer.status == 404, (odd, rest)
        assert answer.code in ("no_photo", "not_found")
        assert b"root:" not in answer.body


@pytest.mark.parametrize(
    "path",
    [
        "/static/..%2fapp.py",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%5capp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/%00",
        "/static/",
        "/static",
        "/docs/../../etc/passwd",
        "//etc/passwd",
        "/.git/config",
    ],
)
def test_only_files_of_the_page_are_served_as_static(served: Served, path: str) -> None:
    answer = served.get(path)
    assert answer.status == 404, answer
    assert answer.code == "not_found"


def _linked_outside(photo: Path) -> None:
    photo.unlink()
    photo.symlink_to(photo.parent.parent / "secret.jpg")


def _linked_inside(photo: Path) -> None:
    photo.unlink()
    photo.symlink_to(photo.parent / "photo-0005.png")


def _made_a_pipe(photo: Path) -> None:
    photo.unlink()
    os.mkfifo(photo)


def _made_a_folder(photo: Path) -> None:
    photo.unlink()
    photo.mkdir()


def _made_a_socket(photo: Path) -> None:
    photo.unlink()
    # A socket's path may have 107 bytes only.
    with contextlib.chdir(photo.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(photo.name)


def _filled_with_text(photo: Path) -> None:
    photo.write_bytes(SECRET * 100)


def _filled_with_a_script(photo: Path) -> None:
    photo.write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')


@pytest.mark.parametrize(
    "replace",
    [
        Path.unlink,
        _linked_outside,
        _linked_inside,
        _made_a_pipe,
        _made_a_folder,
        _made_a_socket,
        _filled_with_text,
        _filled_with_a_script,
    ],
)
def test_a_file_that_replaced_a_photo_is_not_shown(
    served: Served, replace: Callable[[Path], None]
) -> None:
    name = "photo-0000.jpg"
    photo, path = served.photos / name, f"/v1/photos/{served.ids[name]}"
    content = photo.read_bytes()
    assert served.get(f"{path}/file").body == content
    try:
        replace(photo)
        for rest in ("/file", "/thumbnail", "/thumbnail?size=720"):
            answer = served.get(path + rest)
            assert answer.status == 404, rest
            assert answer.code == "no_photo"
            assert SECRET not in answer.body
        # What the catalogue knows is still told.
        assert served.get(path).status == 200
    finally:
        if photo.is_dir():
            photo.rmdir()
        else:
            photo.unlink(missing_ok=True)
        photo.write_bytes(content)
    assert served.get(f"{path}/file").body == content


def test_a_folder_that_became_a_link_hides_its_photos(served: Served, tmp_path: Path) -> None:
    name = "album/photo-0000.jpg"
    path = f"/v1/photos/{served.ids[name]}"
    away = tmp_path / "away"
    assert served.get(f"{path}/file").status == 200
    shutil.move(served.photos / "album", away)
    (served.photos / "album").symlink_to(away)
    try:
        for rest in ("/file", "/thumbnail"):
            assert served.get(path + rest).code == "no_photo"
    finally:
        (served.photos / "album").unlink()
        shutil.move(away, served.photos / "album")
    assert served.get(f"{path}/file").status == 200


@contextlib.contextmanager
def _made_large(photo: Path) -> Iterator[None]:
    """Make a photo larger than what the system holds for a client that does not read."""
    content = photo.read_bytes()
    os.truncate(photo, 64 << 20)
    try:
        yield
    finally:
        photo.write_bytes(content)


def test_a_photo_truncated_during_a_response_closes_the_connection(served: Served) -> None:
    name = "photo-0002.jpg"
    request = f"GET /v1/photos/{served.ids[name]}/file HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with _made_large(served.photos / name), connected(served.process.port) as client:
        client.sendall(request.encode())
        begun = client.recv(1 << 10)
        assert begun.startswith(b"HTTP/1.1 200 OK\r\n")
        os.truncate(served.photos / name, 1 << 10)
        assert len(all_received(client)) < 64 << 20


def test_a_client_that_disconnects_leaves_no_file_open(served: Served) -> None:
    name = "photo-0002.jpg"
    request = f"GET /v1/photos/{served.ids[name]}/file HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    opened = Path(f"/proc/{served.process.process.pid}/fd")

    def open_photos() -> int:
        count = 0
        for link in opened.iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                count += link.readlink().name == name
        return count

    with _made_large(served.photos / name), contextlib.ExitStack() as crowd:
        for _ in range(20):
            client = crowd.enter_context(connected(served.process.port))
            client.sendall(request.encode())
            assert client.recv(1 << 10)
        assert open_photos() == 20
        crowd.close()
        end = time.monotonic() + 20
        while open_photos():
            assert time.monotonic() < end
            time.sleep(0.05)


def test_file_names_with_markup_or_line_breaks_are_escaped(served: Served) -> None:
    for name in (MARKUP, BREAKING):
        path = f"/v1/photos/{served.ids[name]}"
        about = served.get(path)
        assert about.json()["path"] == str(served.photos / name)
        assert "\n" not in about.json()["name"]
        file = served.get(f"{path}/file")
        assert file.status == 200
        assert file.headers["content-type"] == "image/png"
        assert "set-cookie" not in file.headers
        assert "<" not in file.headers.get("content-disposition", "")
        for answer in (about, file, served.get(f"{path}/thumbnail")):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "sandbox" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example"])
def test_dns_rebinding_is_refused(served: Served, host: str) -> None:
    for path in ("/", "/v1/gallery", "/healthz", "/metrics", "/docs", "/static/theme.css"):
        answer = served.get(path, host=host)
        assert (answer.status, answer.code) == (403, "foreign_host"), path


def test_other_sites_can_neither_query_nor_embed(served: Served) -> None:
    port = served.process.port
    image_type = {"content-type": "image/png"}
    for foreign in (
        {"origin": "http://evil.example"},
        {"origin": f"http://127.0.0.1:{port + 1}"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    ):
        answer = ask(port, "/v1/query", "POST", sketch_png(), image_type | foreign)
        assert (answer.status, answer.code) == (403, "foreign_origin")
        image = ask(port, f"/v1/photos/{served.ids['photo-0001.png']}/file", headers=foreign)
        assert (image.status, image.code) == (403, "foreign_origin")
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    before_asking = ask(port, "/v1/query", "OPTIONS", headers=asked)
    assert before_asking.status == 403
    assert not [name for name in before_asking.headers if name.startswith("access-control")]
    own = image_type | {"origin": f"http://127.0.0.1:{port}", "sec-fetch-site": "same-origin"}
    assert ask(port, "/v1/query", "POST", sketch_png(), own).status == 200


def test_an_empty_token_gives_no_access(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    # As in `--token "$TOKEN"`, where the variable is not set.
    gallery = served.process.log.parent / "gallery.sbtk"
    for host in ("0.0.0.0", "127.0.0.1"):
        command = ["serve", "--gallery", str(gallery), "--host", host, "--port", "0"]
        assert (
            main([*command, "--model", str(gallery.parent / "bundles" / "tiny"), "--token", ""])
            == 2
        )
        assert "token" in capfd.readouterr().err


def test_methods_that_change_things_are_not_allowed(served: Served) -> None:
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND"):
        for path in ("/v1/gallery", f"/v1/photos/{served.ids['photo-0001.png']}", "/v1/query", "/"):
            answer = ask(served.process.port, path, method)
            assert (answer.status, answer.code) == (405, "method_not_allowed"), (method, path)
