"""The Dockerfiles keep their promises, and their steps work.

No container engine is needed: `tests/layers.py` follows the files on a layer above this
machine's root folder. The GPU file is followed with the extra `cpu`, which leaves out 1.4 GB of
CUDA libraries; that pip finds what its own extra names for this Python is asked of pip apart.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbtk_cli.main import COMMANDS
from tests import dockerfile
from tests.dockerfile import Dockerfile
from tests.layers import Builder, Image, why_not
from tests.tiny import write_photos, write_sketch

ROOT = Path(__file__).parents[1]
FILES = {
    name: dockerfile.parse((ROOT / "deploy" / "docker" / f"{name}.Dockerfile").read_text())
    for name in ("cpu", "gpu")
}
both = pytest.mark.parametrize("file", FILES.values(), ids=FILES)


@both
def test_galleries_and_plans_are_in_volumes(file: Dockerfile) -> None:
    last = file.stages[-1]
    environment = " ".join(last.rests("ENV")).split()
    volumes = [path for one in last.instructions if one.word == "VOLUME" for path in one.form or ()]
    assert "SBTK_GALLERY=/gallery" in environment
    assert ("XDG_CACHE_HOME=/cache" in environment) == ("/cache" in volumes)
    assert volumes == (["/gallery", "/cache"] if file is FILES["gpu"] else ["/gallery"])


@both
def test_the_build_context_is_what_the_dockerfile_copies(file: Dockerfile) -> None:
    sent = dockerfile.sent_files(ROOT)
    sources = [source for copy in file.stages[0].rests("COPY") for source in copy.split()[:-1]]
    copied = {path for source in sources for path in dockerfile.files_of(source, sent)}
    assert copied == sent


def test_data_runs_and_history_are_not_in_the_build_context(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    kept = {"pyproject.toml", "sbtk_runtime/__init__.py", "sbtk_runtime/pretrained/a/model.onnx"}
    left = {
        ".env",
        ".git/config",
        ".venv/lib/a.py",
        "bundles/mine/student.safetensors",
        "data/photo/cat/1.jpg",
        "gallery.sbtk/catalogue.sqlite",
        "runs/1/checkpoint.safetensors",
        "sbtk_runtime/__pycache__/bundle.cpython-311.pyc",
        "cli/sbtk_cli/__pycache__/main.cpython-311.pyc",
        "tests/test_docker.py",
    }
    for path in kept | left:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert dockerfile.sent_files(tmp_path) == kept


@pytest.mark.install
def test_pip_finds_the_requirements_of_the_gpu_image() -> None:
    """Without their dependencies: pip would fetch 1.4 GB of them only to name them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"]["gpu"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
    command += ["--ignore-installed", "--only-binary", ":all:", "--report", "-"]
    done = subprocess.run(
        [*command, "--constraint", str(ROOT / "constraints.txt"), *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"name": "onnxruntime-gpu"' in done.stdout


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    place = tmp_path_factory.mktemp("layers")
    reason = why_not(place)
    if reason is not None:
        pytest.skip(reason)
    yield Builder(ROOT, place)
    shutil.rmtree(place)


@pytest.fixture(scope="module", params=FILES)
def image(builder: Builder, request: pytest.FixtureRequest) -> Image:
    """Return the image of each file, built with the extra `cpu`."""
    built = builder.build(FILES[request.param], {"EXTRAS": "cpu"})
    for line in builder.left_out:
        warnings.warn(f"apt does not work here; the build went on without: {line}", stacklevel=1)
    return built


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", 6)
    return tmp_path / "photos"


@pytest.fixture
def gallery(tmp_path: Path, image: Image) -> Path:
    """Return an empty folder like the image's own: what an engine makes a new volume of."""
    return _volume(image, "/gallery", tmp_path / "gallery")


@pytest.mark.install
def test_the_image_works_without_root_network_and_writable_files(
    image: Image, photos: Path, gallery: Path, tmp_path: Path
) -> None:
    before = _content(photos)
    volumes = {"/photos": (photos, "ro"), "/gallery": (gallery, "rw")}
    indexed = image.run("index", "/photos", volumes=volumes)
    assert (indexed.returncode, indexed.stdout[:20]) == (0, b"6 photos searchable "), indexed.stderr
    assert b"elemetry" not in indexed.stderr
    owner = (gallery / "manifest.json").stat().st_uid
    assert owner == int(image.user.partition(":")[0])
    assert owner >= 1000
    assert _content(photos) == before

    sketch = write_sketch(tmp_path / "sketch.png").read_bytes()
    reading = volumes | {"/gallery": (gallery, "ro")}
    queried = image.run("query", "-", "-k", "3", "--paths0", volumes=reading, stdin=sketch)
    assert queried.returncode == 0, queried.stderr
    hits = queried.stdout.decode().rstrip("\0").split("\0")
    assert len(hits) == 3
    assert set(hits) <= {f"/photos/{path.name}" for path in photos.iterdir()}


@pytest.mark.install
def test_read_only_mounts_are_not_written(
    image: Image, photos: Path, gallery: Path, tmp_path: Path
) -> None:
    volumes = {"/photos": (photos, "ro"), "/gallery": (gallery, "ro")}
    refused = image.run("index", "/photos", volumes=volumes)
    assert refused.returncode == 1
    assert b"cannot be written" in refused.stderr
    assert not list(gallery.iterdir())


@pytest.mark.install
def test_the_image_has_a_description_and_a_health_check(image: Image) -> None:
    shown = image.run(volumes={})
    assert shown.returncode == 0
    assert b"Find photos from a sketch." in shown.stdout
    healthy = image.run("doctor", volumes={})
    assert healthy.returncode == 0, healthy.stdout
    assert b"ok  engine   onnxruntime " in healthy.stdout
    assert b"!!" not in healthy.stdout


@pytest.mark.install
def test_hnswlib_in_the_image_runs_on_every_processor(image: Image) -> None:
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("registers are told apart on x86-64, with objdump")
    (library,) = image.path("/opt/sbtk").glob("lib/python3.*/site-packages/hnswlib*.so")
    code = subprocess.run(
        ["objdump", "--disassemble", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert code.count("%xmm") > 1000
    assert not re.search(r"%[yz]mm", code)


@pytest.mark.install
def test_the_gpu_image_keeps_plans_in_its_volume(builder: Builder, tmp_path: Path) -> None:
    image = builder.build(FILES["gpu"], {"EXTRAS": "cpu"})
    cache = _volume(image, image.environment["XDG_CACHE_HOME"], tmp_path / "cache")
    assert cache.stat().st_mode & 0o777 == 0o700
    if "engine" not in COMMANDS:
        pytest.skip("this sbtk has no command that lists plans")
    listed = image.run("engine", "list", volumes={"/cache": (cache, "rw")})
    assert listed.returncode == 0, listed.stderr


def _volume(image: Image, point: str, folder: Path) -> Path:
    original = image.path(point)
    folder.mkdir()
    folder.chmod(original.stat().st_mode & 0o777)
    shutil.chown(folder, original.stat().st_uid, original.stat().st_gid)
    return folder


def _content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
