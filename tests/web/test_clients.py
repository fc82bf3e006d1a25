"""The clients in `examples/clients` query a real server, in Python and in JavaScript."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.clients import client as client_module
from examples.clients.client import Answer, ApiError, Client, Hit
from tests.serve_client import sketch_png
from tests.serve_process import ServeProcess, free_port
from tests.web.conftest import Workplace

CLIENTS = Path(client_module.__file__).parent
TOKEN = "a-token-of-the-test"
#: A query, of a client in any language: its method, its arguments and its options.
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def locked(shared: Workplace) -> Iterator[ServeProcess]:
    """Return a server that requires a token."""
    with shared.serving("--token", TOKEN) as process:
        process.wait_until_ready()
        yield process


@pytest.fixture
def client(locked: ServeProcess) -> Client:
    return Client(locked.origin, TOKEN)


@pytest.fixture
def sketch(tmp_path: Path) -> Path:
    path = tmp_path / "sketch.png"
    path.write_bytes(sketch_png(3))
    return path


def _node(origin: str, body: str, token: str = TOKEN) -> Any:
    """Return what a JavaScript function of `client`, `sketch(number)` and `told` returns."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    images = [list(sketch_png(seed)) for seed in (3, 4)]
    script = f"""
        import {{ Client }} from {json.dumps((CLIENTS / "client.mjs").as_uri())};
        const images = {json.dumps(images)};
        const sketch = (number) => new Blob([new Uint8Array(images[number])]);
        const told = ({{ code, message, next, retryAfterMs }}) =>
            ({{ code, message, next, retry: retryAfterMs }});
        const client = new Client({json.dumps(origin)}, {{ token: {json.dumps(token)} }});
        const run = async () => {{ {body} }};
        console.log(JSON.stringify(await run()));
    """
    done = subprocess.run(
        [node, "--input-type=module"], input=script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _ids(hits: Any) -> list[int]:
    return [hit.id if isinstance(hit, Hit) else hit["id"] for hit in hits]


def test_clients_get_the_hits_of_the_library(
    client: Client, shared: Workplace, sketch: Path
) -> None:
    expected = shared.hits(sketch.read_bytes(), k=100)
    answer = client.query(sketch, limit=100)
    assert answer.kind == "sketch"
    shown = [(hit.rank, hit.id, hit.path, hit.match) for hit in answer.hits]
    assert shown == [(hit.rank, hit.id, hit.path, hit.match) for hit in expected]
    assert any("\udcff" in hit.path for hit in answer.hits)
    # The same with bytes, page by page.
    pages = [*client.all_hits(sketch.read_bytes(), limit=7)]
    assert [dataclasses.replace(hit, score=0) for hit in pages] == [
        dataclasses.replace(hit, score=0) for hit in answer.hits
    ]


def test_options_of_the_python_client_reach_the_server(
    client: Client, shared: Workplace, sketch: Path
) -> None:
    album = shared.photos / "album"
    within = client.query(sketch, limit=3, offset=1, under=album)
    assert [hit.rank for hit in within.hits] == [2, 3, 4]
    assert {Path(hit.path).parent for hit in within.hits} == {album}
    as_photo = client.query(sketch, "photo", fold=False, rerank="expand")
    assert as_photo.kind == "photo"
    long_ago = datetime.date(1990, 1, 1)
    assert client.query(sketch, taken_to=long_ago).hits == ()
    assert (
        client.query(sketch, limit=3, taken_from=long_ago).hits
        == client.query(sketch, limit=3).hits
    )
    best = within.hits[0].id
    assert best not in _ids(client.similar(best, limit=5).hits)
    liked = client.query(sketch, limit=2, like=[best], unlike=(within.hits[1].id,))
    assert len(liked.hits) == 2
    assert client.photo_file(best) == Path(within.hits[0].path).read_bytes()
    assert client.details(best)["width_px"] > 0


def test_a_batch_has_an_error_in_place_of_a_bad_image(client: Client, sketch: Path) -> None:
    good, bad = client.query_many([sketch, b"no image"], "sketch", limit=2)
    assert isinstance(good, Answer) and isinstance(bad, ApiError)
    assert good == client.query(sketch, "sketch", limit=2)
    assert (bad.code, str(bad)) == (
        "bad_image",
        "Unsupported image format; expected: PNG, JPEG or WebP.",
    )


def test_errors_have_the_servers_message_and_next_step(
    client: Client, locked: ServeProcess, sketch: Path
) -> None:
    with pytest.raises(ApiError) as unknown:
        client.query(sketch, colour="red")
    assert unknown.value.code == "bad_parameter"
    assert str(unknown.value).startswith("Unknown parameter 'colour'; expected: ")
    with pytest.raises(ApiError) as foreign:
        Client(locked.origin, "the-wrong-token").query(sketch)
    assert foreign.value.code == "no_token"
    assert "Authorization: Bearer" in foreign.value.next_step
    with pytest.raises(ApiError) as missing:
        client.similar(10**9)
    assert missing.value.code == "no_photo"
    with pytest.raises(ApiError) as nobody:
        Client(f"http://127.0.0.1:{free_port()}").query(sketch)
    assert nobody.value.code == "unreachable"
    assert nobody.value.retry_after_s is None


def test_the_command_prints_the_hits_of_each_sketch(
    locked: ServeProcess, client: Client, sketch: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    command = [sys.executable, "-P", str(CLIENTS / "client.py"), "--address", locked.origin]
    run = {"env": os.environ | {"SBTK_TOKEN": TOKEN}, "capture_output": True, "check": False}
    done = subprocess.run([*command, "--limit", "4", sketch, broken], **run)  # type: ignore[call-overload]
    paths = [line.split(b"\t")[2] for line in done.stdout.splitlines()]
    assert paths == [os.fsencode(hit.path) for hit in client.query(sketch, limit=4).hits]
    assert done.returncode == 1
    assert done.stderr.startswith(os.fsencode(broken))


def test_the_command_prints_notices_and_errors_in_a_line(
    locked: ServeProcess, sketch: Path
) -> None:
    environment = {**os.environ, "SBTK_TOKEN": TOKEN}
    for given, code, said in (
        ((locked.origin, "--under", "/nowhere"), 0, "0 photos are searchable below /nowhere"),
        (("127.0.0.1:1",), 1, "127.0.0.1:1 is not an address that starts with"),
    ):
        command = [sys.executable, "-P", str(CLIENTS / "client.py"), str(sketch), "--address"]
        run = {"capture_output": True, "text": True, "check": False, "env": environment}
        done = subprocess.run([*command, *given], **run)  # type: ignore[call-overload]
        assert done.returncode == code
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_javascript_client_gets_the_same_hits(
    locked: ServeProcess, client: Client, sketch: Path
) -> None:
    found = _node(
        locked.origin,
        """
        const all = [];
        for await (const hit of client.allHits(sketch(0), { limit: 9, fold: true })) all.push(hit);
        const second = await client.query(sketch(0), { limit: 2, offset: 1, as: "photo" });
        const batch = await client.queryMany([sketch(0), new Blob(["no image"])], { limit: 1 });
        const like = await client.similar(all[0].id, { limit: 3 });
        const file = await client.photoFile(all[0].id);
        const details = await client.details(all[0].id);
        return { all, second, batch: [batch[0].hits, told(batch[1])], like: like.hits,
            size: file.size, details };
        """,
    )
    every = client.query(sketch, limit=100).hits
    assert _ids(found["all"]) == _ids(every)
    assert [hit.get("match") for hit in found["all"]] == [hit.match for hit in every]
    assert _ids(found["second"]["hits"]) == _ids(client.query(sketch, "photo", limit=3).hits[1:])
    assert found["second"]["kind"] == "photo"
    assert _ids(found["batch"][0]) == _ids(every[:1])
    assert found["batch"][1]["code"] == "bad_image"
    assert _ids(found["like"]) == _ids(client.similar(every[0].id, limit=3).hits)
    assert found["size"] == Path(every[0].path).stat().st_size
    assert found["details"] == client.details(every[0].id)


def test_the_javascript_client_raises_the_servers_errors(locked: ServeProcess) -> None:
    ask = "return client.query(sketch(0)).then(() => null, told);"
    refused = _node(locked.origin, ask, token="the-wrong-token")
    assert refused["code"] == "no_token" and "Authorization: Bearer" in refused["next"]
    nobody = _node(f"http://127.0.0.1:{free_port()}", ask)
    assert (nobody["code"], nobody["retry"]) == ("unreachable", None)
    empty = "return client.query(new Blob(['no image'])).then(() => null, told);"
    assert _node(locked.origin, empty)["code"] == "bad_image"


@pytest.mark.install
def test_the_javascript_client_type_checks(tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    fetched = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(tmp_path)]
    done = subprocess.run([*fetched, "typescript@5.9.3"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install typescript: {done.stderr.decode()[-200:]}")
    shutil.copy(CLIENTS / "client.mjs", tmp_path / "client.mjs")
    use = 'import { Client } from "./client.mjs";\nexport const hits = await new Client().query('
    (tmp_path / "good.mts").write_text(f"{use}new Blob(), {{ limit: 5 }});\n")
    (tmp_path / "bad.mts").write_text(f"{use}new Blob(), {{ limit: 'five' }});\n")
    check = [str(tmp_path / "node_modules/.bin/tsc"), "--noEmit", "--allowJs", "--checkJs"]
    check += ["--strict", "--target", "es2022", "--module", "nodenext"]

    def errors(*files: str) -> str:
        return subprocess.run(
            [*check, *files], cwd=tmp_path, capture_output=True, text=True, check=False
        ).stdout

    assert not errors("client.mjs", "good.mts")
    assert "Type 'string' is not assignable to type 'number'" in errors("bad.mts")
