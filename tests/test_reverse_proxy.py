"""The guide's configurations of nginx and Caddy, in front of a real server, where installed."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.update import update_gallery
from tests.serve_process import ServeProcess, free_port, serving
from tests.tiny import tiny_bundle, write_photos, write_sketch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NAME = "photos.example.org"
LOGIN = {"Authorization": "Basic " + base64.b64encode(b"you:a-password").decode()}
_BLOCK = re.compile(r"^```(nginx|caddy)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PLACES = "/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """Return a server that stays on the loopback address and answers to the proxy's name."""
    folder = tmp_path_factory.mktemp("behind")
    model = tiny_bundle(folder / "tiny")
    write_photos(folder / "photos", 6)
    with Embedder(model, threads=1) as embedder:
        update_gallery(folder / "gallery.sbtk", [folder / "photos"], embedder)
    options = ("--model", str(model), "--allow-host", NAME)
    with serving(folder / "gallery.sbtk", *options, log=folder / "serve.log") as served:
        served.wait_until_ready()
        yield served


@pytest.fixture(params=["nginx", "caddy"])
def proxy(request: pytest.FixtureRequest, server: ServeProcess, tmp_path: Path) -> Iterator[int]:
    """Return the port of a proxy that is set up as the guide says, but for TLS."""
    name = str(request.param)
    program = shutil.which(name) or shutil.which(name, path=_PLACES)
    if program is None:
        pytest.skip(f"{name} is not installed")
    blocks = dict(_BLOCK.findall((ROOT / "docs" / "guide.md").read_text()))
    text = blocks[name].replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    port = free_port()
    begin: Callable[[str, str, int, Path], list[str]] = _nginx if name == "nginx" else _caddy
    command = begin(program, text, port, tmp_path)
    log = tmp_path / "proxy.log"
    environment = {"HOME": str(tmp_path), "PATH": _PLACES}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        _wait_until_listening(port, process, log)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def test_the_page_works_through_the_proxy(proxy: int, tmp_path: Path) -> None:
    sketch = write_sketch(tmp_path / "sketch.png").read_bytes()
    own_page = {"Origin": f"https://{NAME}", "Sec-Fetch-Site": "same-origin"}
    headers = LOGIN | own_page | {"Content-Type": "image/png"}
    status, body = _ask(proxy, "POST", "/v1/query?k=3", headers, sketch)
    assert status == 200, body
    assert [hit["rank"] for hit in json.loads(body)["hits"]] == [1, 2, 3]
    status, body = _ask(proxy, "GET", "/v1/photos/1/thumbnail", LOGIN)
    assert status == 200
    assert body[:2] == b"\xff\xd8"


def test_a_foreign_page_is_refused_through_the_proxy(proxy: int, tmp_path: Path) -> None:
    sketch = write_sketch(tmp_path / "sketch.png").read_bytes()
    headers = LOGIN | {"Origin": "https://elsewhere.example", "Content-Type": "image/png"}
    status, body = _ask(proxy, "POST", "/v1/query", headers, sketch)
    assert status == 403
    assert json.loads(body)["error"]["code"] == "foreign_origin"


def test_the_proxy_requires_a_login_and_hides_the_metrics(proxy: int) -> None:
    assert _ask(proxy, "GET", "/v1/gallery")[0] == 401
    assert _ask(proxy, "GET", "/v1/gallery", LOGIN)[0] == 200
    assert _ask(proxy, "GET", "/metrics", LOGIN)[0] == 404


def test_a_large_body_is_refused_by_the_proxy_or_the_server(proxy: int) -> None:
    headers = LOGIN | {"Content-Type": "image/png"}
    # What sbtk refuses before it has come, a proxy may take for a broken connection.
    assert _ask(proxy, "POST", "/v1/query", headers, bytes(9 * 2**20))[0] in (413, 502)
    assert _ask(proxy, "GET", "/v1/gallery", LOGIN)[0] == 200


def _nginx(program: str, text: str, port: int, folder: Path) -> list[str]:
    plain = re.sub(r"^ *ssl_.*\n", "", text, flags=re.MULTILINE)
    assert "listen 443 ssl;" in plain
    plain = plain.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    (folder / "photos.htpasswd").write_text("you:{PLAIN}a-password\n")
    plain = plain.replace("/etc/nginx/photos.htpasswd", str(folder / "photos.htpasswd"))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off; user root; pid {folder}/nginx.pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {places}\n{plain} }}\n"
    )
    return [program, "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


def _caddy(program: str, text: str, port: int, folder: Path) -> list[str]:
    command = [program, "hash-password", "--plaintext", "a-password"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plain = text.replace("HASH-FROM-CADDY-HASH-PASSWORD", done.stdout.strip())
    assert plain.startswith(f"{NAME} {{")
    plain = plain.replace(f"{NAME} {{", f"http://{NAME}:{port} {{", 1)
    (folder / "Caddyfile").write_text(f"{{\n    admin off\n}}\n{plain}")
    return [program, "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


def _wait_until_listening(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            _ask(port, "GET", "/")
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def _ask(
    port: int,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
) -> tuple[int, bytes]:
    """Return status and body of an answer to a request by the proxy's public name."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as asked:
        asked.putrequest(method, path, skip_host=True)
        asked.putheader("Host", NAME)
        for name, value in (headers or {}).items():
            asked.putheader(name, value)
        if body is not None:
            asked.putheader("Content-Length", str(len(body)))
        asked.endheaders()
        # A refused body may find the connection closed before all of it is sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            asked.send(body or b"")
        answer = asked.getresponse()
        return answer.status, answer.read()
