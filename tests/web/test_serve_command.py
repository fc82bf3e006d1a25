"""`sbtk serve` as users start and stop it, and its errors at the start."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from sbtk_cli.main import main
from tests.serve_client import all_received, ask, connected, post_head, query, sketch_png
from tests.serve_process import free_port
from tests.tiny import tiny_bundle
from tests.web.conftest import ENGINE, Workplace


@contextlib.contextmanager
def started(place: Workplace, *options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start `sbtk serve` on a free port, and kill what has not ended at the end."""
    command = [sys.executable, "-P", "-m", "sbtk_cli", "serve", "--gallery", str(place.gallery)]
    command += ["--port", "0", "--model", str(place.bundle), *ENGINE, *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def address_of(process: subprocess.Popen[str]) -> str:
    """Return what it prints for people to open."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def port_of(address: str) -> int:
    return int(address.split("/")[2].rpartition(":")[2])


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(HTTPError):
            if is_so():
                return
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_until_ready(port: int) -> None:
    wait_until(lambda: ask(port, "/healthz").status == 200)


def test_the_gallery_route_gives_the_command_without_the_token(shared: Workplace) -> None:
    options = ("--allow-host", "a.test", "--allow-host", "b.test", "--token", "a-secret-token")
    with started(shared, *options) as process:
        port = port_of(address_of(process))
        wait_until_ready(port)
        bearer = {"authorization": "Bearer a-secret-token"}
        content = ask(port, "/v1/gallery", headers=bearer).json()
    command = shlex.split(content["command"])
    assert command[:6] == [
        *("sbtk", "serve", "--gallery", str(shared.gallery.absolute())),
        *("--port", str(port)),
    ]
    assert command[6:10] == ["--allow-host", "a.test", "--allow-host", "b.test"]
    assert command[10:] == ["--model", str(shared.bundle), *ENGINE]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_its_address_and_stops_on_a_signal(
    shared: Workplace, number: signal.Signals
) -> None:
    with started(shared) as process:
        address = address_of(process)
        port = port_of(address)
        assert address == f"http://127.0.0.1:{port}/"
        wait_until_ready(port)
        assert query(port, sketch_png()).status == 200
        process.send_signal(number)
        rest, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert rest == ""
    shown = said.splitlines()
    assert shown[0].startswith("34 photos of ")
    assert shown[1:] == ["Stopped."]


def test_running_requests_are_answered_or_refused_when_the_server_stops(shared: Workplace) -> None:
    with started(shared) as process:
        port = port_of(address_of(process))
        wait_until_ready(port)
        with connected(port) as client:
            client.sendall(post_head(port, "Content-Length: 100", "Expect: 100-continue"))
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 100 ")  # the body is awaited
            process.terminate()
            answer = all_received(client)
        _, said = process.communicate(timeout=20)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "stopping"
    assert process.returncode == 0
    assert said.splitlines()[1:] == ["Stopped."]


def test_event_streams_end_whole_when_the_server_stops(shared: Workplace) -> None:
    with started(shared) as process:
        port = port_of(address_of(process))
        with connected(port) as client:
            head = f"GET /v1/indexing/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
            client.sendall(head.encode())
            received = b""
            while b"event: indexing" not in received:
                received += client.recv(1 << 16)
            process.terminate()
            received += all_received(client)
        process.communicate(timeout=20)
    assert received.endswith(b"\r\n0\r\n\r\n"), "the last chunk"
    assert process.returncode == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_serve_runs_with_closed_input_and_output(shared: Workplace, closed: str) -> None:
    port = free_port()
    command = [sys.executable, "-P", "-m", "sbtk_cli", "serve", "--gallery", str(shared.gallery)]
    command += ["--port", str(port), "--model", str(shared.bundle), *ENGINE]
    shell = ["sh", "-c", f'exec "$0" "$@" {closed}', *command]
    with subprocess.Popen(shell, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    wait_until_ready(port)
                    break
                time.sleep(0.05)
            assert query(port, sketch_png()).status == 200
        finally:
            process.kill()


def test_serve_can_be_stopped_while_loading(shared: Workplace) -> None:
    with started(shared, "--quiet") as process:
        address_of(process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == ""


def test_serve_says_that_it_is_loading_before_it_is_ready(shared: Workplace) -> None:
    with started(shared) as process:
        port = port_of(address_of(process))
        seen = set()
        while (answer := query(port, sketch_png())).status == 503:
            seen.add(answer.code)
            assert answer.headers["retry-after"] == "1"
        assert answer.status == 200
    assert seen <= {"loading"}


def test_the_error_for_a_used_port_names_a_free_one(
    shared: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        arguments = ["serve", "--gallery", str(shared.gallery), "--port", str(port)]
        assert main([*arguments, "--model", str(shared.bundle)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"port {port} is in use" in shown.err
    assert f"ss -ltnp 'sport = :{port}' shows the other program" in shown.err
    free = int(shown.err.rpartition("--port ")[2].split()[0])
    assert port < free <= 65_535
    with socket.create_server(("127.0.0.1", free)):
        pass


def test_other_machines_need_the_token_which_is_printed_once(shared: Workplace) -> None:
    with started(shared, "--host", "0.0.0.0") as process:
        address = address_of(process)
        port = port_of(address)
        start, _, token = address.partition("/?token=")
        assert start == f"http://127.0.0.1:{port}"
        assert len(token) >= 32
        bearer = {"authorization": f"Bearer {token}"}
        wait_until_ready(port)
        assert ask(port, "/healthz").json() == {"status": "ok"}
        assert ask(port, "/healthz", headers=bearer).json()["photos"] == 34
        refused = ask(port, "/v1/gallery")
        assert (refused.status, refused.code) == (401, "no_token")
        assert ask(port, "/v1/gallery", headers=bearer).status == 200
        visit = ask(port, f"/?token={token}")
        assert (visit.status, visit.headers["location"]) == (303, "./")
        cookie = visit.headers["set-cookie"].partition(";")[0]
        assert ask(port, "/", headers={"cookie": cookie}).status == 200
        process.terminate()
        rest, said = process.communicate(timeout=20)
    assert token not in rest + said
    assert "can connect, with this machine's address in place of 127.0.0.1;" in said


@pytest.mark.parametrize(
    ("host", "shown", "message"),
    [
        ("::1", "[::1]", ""),
        ("[::1]", "[::1]", ""),
        ("::", "[::1]", "in place of [::1];"),
        ("localhost", "localhost", ""),
    ],
)
def test_serve_listens_on_the_given_address(
    shared: Workplace, host: str, shown: str, message: str
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((shown.strip("[]"), 0), family=family):
            pass
    except OSError:
        pytest.skip(f"this machine has no {shown}")
    with started(shared, "--host", host, SBTK_TOKEN="a-token-of-mine") as process:
        address = address_of(process)
        assert address == f"http://{shown}:{port_of(address)}/"
        asked = Request(f"{address}v1/gallery", headers={"Authorization": "Bearer a-token-of-mine"})
        wait_until(lambda: urlopen(asked).status == 200)
        process.terminate()
        _, said = process.communicate(timeout=20)
    assert message in said
    assert ("other machines" in said) == bool(message)


def test_a_given_token_is_required_and_not_printed(shared: Workplace) -> None:
    token = "known-to-me-already"
    with started(shared, "--allow-host", "photos.example", SBTK_TOKEN=token) as process:
        address = address_of(process)
        port = port_of(address)
        assert "token" not in address
        bearer = {"authorization": f"Bearer {token}"}
        wait_until_ready(port)
        assert ask(port, "/v1/gallery").status == 401
        assert ask(port, "/v1/gallery", headers=bearer).status == 200
        by_name = {**bearer, "host": "photos.example"}
        assert ask(port, "/v1/gallery", headers=by_name).status == 200
        process.terminate()
        rest, said = process.communicate(timeout=20)
    assert token not in rest + said


def test_the_browser_is_opened_on_request(shared: Workplace, tmp_path: Path) -> None:
    visited = tmp_path / "visited"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {visited}\n')
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    options = ("--open", "--token", "a-token-of-mine")
    with started(shared, *options, BROWSER=f"{browser} %s") as process:
        address = address_of(process)
        end = time.monotonic() + 30
        while not (visited.exists() and visited.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        assert visited.read_text().strip() == f"{address}?token=a-token-of-mine"


def test_a_missing_browser_is_reported(shared: Workplace, tmp_path: Path) -> None:
    nowhere = {"BROWSER": "/no/such/browser %s", "PATH": str(tmp_path)}
    with started(shared, "--open", **nowhere) as process:
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(2)]
    assert said[1] == "no browser was found: open the address in one\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--gallery", "none.sbtk"], 1, "sbtk index PHOTOS --gallery none.sbtk"),
        (["--model", "no-such-model"], 1, "no-such-model"),
        (["--engine", "warp"], 2, "unknown engine 'warp'"),
        (["--engine", "onnxruntime", "--device", "cuda"], 2, "cannot run on cuda"),
        (["--precision", "fp16"], 1, "fp16"),
        (["--host", "192.0.2.1"], 1, "an address of this machine"),
        (["--host", "a" * 70], 1, "is not a name of this machine"),
        (["--host", "not a host"], 2, "is not a host"),
        (["--token", "short"], 2, "the token is malformed"),
        (["--allow-host", "http://photos.example/"], 2, "is not a host"),
        (["--port", "70000"], 2, "--port"),
    ],
)
def test_errors_at_the_start_are_reported(
    shared: Workplace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SBTK_GALLERY", "SBTK_TOKEN", "SBTK_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    # The later of two equal options counts.
    usual = ["--gallery", str(shared.gallery), "--port", "0", "--model", str(shared.bundle)]
    assert main(["serve", *usual, "--quiet", *arguments]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err


def test_a_gallery_of_another_model_is_refused(
    shared: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_bundle(tmp_path / "other", seed=5, name="other")
    usual = ["--gallery", str(shared.gallery), "--port", "0", "--threads", "1"]
    assert main(["serve", *usual, "--model", str(other)]) == 1
    assert "embeddings of two models cannot be compared" in capsys.readouterr().err
