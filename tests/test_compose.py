"""The Compose file is valid, and its commands index a folder of photos and serve its page.

No container engine is needed: the commands run here, with the mounted folders' own paths.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import dockerfile
from tests.serve_client import ask, query, sketch_png
from tests.serve_process import ServeProcess, free_port
from tests.tiny import tiny_bundle, write_photos

DOCKER = Path(__file__).parents[1] / "deploy" / "docker"
TOKEN = "a-token-of-the-test"


def _services(**variables: str) -> dict[str, Any]:
    """Return the services as Compose reads them, with these variables."""
    import yaml

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, operator, rest = match[1], match[2], match[3]
        if operator == ":?" and not variables.get(name):
            raise LookupError(f"{name}: {rest}")
        return variables.get(name) or rest

    text = (DOCKER / "compose.yaml").read_text()
    shown = re.sub(r"\$\$|\$\{(\w+)(:[-?])([^}]*)\}", value, text)
    return dict(yaml.safe_load(shown)["services"])


def test_the_compose_file_follows_its_schema(tmp_path: Path) -> None:
    def errors(file: Path) -> str:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
        done = subprocess.run(
            [*command, "vendor.compose-spec", file], capture_output=True, text=True, check=False
        )
        return done.stdout if done.returncode else ""

    assert not errors(DOCKER / "compose.yaml")
    misspelt = tmp_path / "compose.yaml"
    text = (DOCKER / "compose.yaml").read_text()
    misspelt.write_text(text.replace("read_only", "readonly"))
    assert "readonly" in errors(misspelt)


def test_it_does_not_start_without_photos_and_a_token() -> None:
    with pytest.raises(LookupError, match="PHOTOS: set PHOTOS"):
        _services(SBTK_TOKEN=TOKEN)
    with pytest.raises(LookupError, match="SBTK_TOKEN: set SBTK_TOKEN"):
        _services(PHOTOS="/srv/photos")


def test_photos_are_mounted_read_only_and_the_image_has_the_extras() -> None:
    services = _services(PHOTOS="/srv/photos", SBTK_TOKEN=TOKEN)
    file = dockerfile.parse((DOCKER / "cpu.Dockerfile").read_text())
    for service in services.values():
        photos, gallery = service["volumes"]
        assert (photos["source"], photos["read_only"]) == ("/srv/photos", True)
        assert gallery == "gallery:/gallery"
        assert '["/gallery"]' in file.stages[-1].rests("VOLUME")
        assert (DOCKER / service["build"]["context"]).resolve() == DOCKER.parents[1]
        assert "serve" in service["build"]["args"]["EXTRAS"].split(",")
    assert services["page"]["ports"] == ["127.0.0.1:8000:8000"]
    opened = _services(PHOTOS="/srv/photos", SBTK_TOKEN=TOKEN, PUBLISH="8000")
    assert opened["page"]["ports"] == ["8000:8000"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with photos, of which one is damaged, and `sbtk` on the path."""
    write_photos(tmp_path / "photos", 3)
    (tmp_path / "photos" / "damaged.jpg").write_bytes(b"no photo")
    (tmp_path / "bin").mkdir()
    command = f'exec "{sys.executable}" -P -m sbtk_cli "$@"'
    tiny = f"--model '{tiny_bundle(tmp_path / 'tiny')}' --engine onnxruntime"
    (tmp_path / "bin" / "sbtk").write_text(f"#!/bin/sh\n{command} {tiny}\n")
    (tmp_path / "bin" / "sbtk").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SBTK_GALLERY", str(tmp_path / "gallery"))
    return tmp_path


def _index(place: Path) -> int:
    service = _services(PHOTOS="/srv/photos", SBTK_TOKEN=TOKEN)["index"]
    words = [*service["entrypoint"], *service["command"]]
    here = [str(place / "photos") if word == "/photos" else word for word in words]
    return subprocess.run(here, capture_output=True, check=False).returncode


@contextlib.contextmanager
def _serving(place: Path) -> Iterator[tuple[ServeProcess, list[str]]]:
    """Give the block the page's server, and the command of its health check."""
    port = free_port()
    page = _services(PHOTOS="/srv/photos", SBTK_TOKEN=TOKEN)["page"]
    log = place / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["sbtk", *page["command"], "--port", str(port)],
            env=os.environ | page["environment"],
            stdout=output,
            stderr=output,
        )
    served = ServeProcess(port, process, log)
    kind, _, *check = page["healthcheck"]["test"]
    assert kind == "CMD"
    try:
        served.wait_until_ready()
        yield served, [sys.executable, *(word.replace("8000", str(port)) for word in check)]
    finally:
        served.stop()


@pytest.mark.slow
def test_its_commands_index_photos_and_serve_the_page_with_a_token(place: Path) -> None:
    assert _index(place) == 0
    with _serving(place) as (served, check):
        assert ask(served.port, "/v1/gallery").status == 401
        signed_in = {"authorization": f"Bearer {TOKEN}"}
        assert ask(served.port, "/v1/gallery", headers=signed_in).json()["count"] == 3
        headers = signed_in | {"content-type": "image/png"}
        found = ask(served.port, "/v1/query", "POST", sketch_png(), headers)
        assert len(found.json()["hits"]) == 3
        assert query(served.port, sketch_png()).status == 401
        assert ask(served.port, f"/?token={TOKEN}").status == 303
        assert subprocess.run(check, check=False).returncode == 0
        # A later start updates the gallery that is served.
        shutil.copy(next((place / "photos").glob("photo-*")), place / "photos" / "copy.jpg")
        assert _index(place) == 0
        served.wait_for(
            lambda: ask(served.port, "/v1/gallery", headers=signed_in).json()["count"] == 4
        )
    assert subprocess.run(check, capture_output=True, check=False).returncode != 0


@pytest.mark.slow
def test_a_failed_index_starts_no_server(place: Path) -> None:
    shutil.rmtree(place / "photos")
    page = _services(PHOTOS="/srv/photos", SBTK_TOKEN=TOKEN)["page"]
    assert page["depends_on"]["index"]["condition"] == "service_completed_successfully"
    assert _index(place) == 1
