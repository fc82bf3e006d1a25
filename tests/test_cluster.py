"""The jobs for clusters are valid, and their commands index and merge all photos."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sbtk_runtime.gallery.gallery import Gallery
from tests.tiny import tiny_bundle, write_photos

CLUSTER = Path(__file__).parents[1] / "deploy" / "cluster"
COUNT = 12


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with photos, of which one is damaged, and `sbtk` on the path."""
    write_photos(tmp_path / "photos", COUNT)
    (tmp_path / "photos" / "damaged.jpg").write_bytes(b"no photo")
    (tmp_path / "galleries").mkdir()
    (tmp_path / "bin").mkdir()
    bundle = tiny_bundle(tmp_path / "tiny")
    sbtk = f'exec "{sys.executable}" -P -m sbtk_cli'
    small = f'test "$1" = index && {sbtk} "$@" --model "{bundle}" --engine onnxruntime'
    (tmp_path / "bin" / "sbtk").write_text(f'#!/bin/sh\n{small}\n{sbtk} "$@"\n')
    (tmp_path / "bin" / "sbtk").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PHOTOS", str(tmp_path / "photos"))
    monkeypatch.setenv("GALLERIES", str(tmp_path / "galleries"))
    return tmp_path


def _jobs() -> list[dict[str, Any]]:
    import yaml

    return list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))


def _container(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return dict(container)


def _run(command: list[str], **variables: str) -> None:
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _names(gallery: Path) -> list[str]:
    with Gallery.open(gallery) as opened:
        return sorted(Path(found.photo.path).name for found in opened.recent(COUNT + 1))


def test_the_jobs_follow_the_schema_of_kubernetes() -> None:
    import kubernetes_validate

    for job in _jobs():
        for version in ("1.31.0", "1.37.0"):
            kubernetes_validate.validate(job, version, strict=True)
    misspelt = _jobs()[0]
    misspelt["spec"]["completion_mode"] = misspelt["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError, match="completion_mode"):
        kubernetes_validate.validate(misspelt, "1.37.0", strict=True)


def test_every_part_has_a_machine() -> None:
    index, merge = _jobs()
    shards = [
        int(variable["value"])
        for job in (index, merge)
        for variable in _container(job)["env"]
        if variable["name"] == "SHARDS"
    ]
    assert shards == [index["spec"]["completions"], index["spec"]["parallelism"]]


@pytest.mark.slow
def test_the_kubernetes_jobs_make_one_gallery(place: Path) -> None:
    index, merge = map(_container, _jobs())
    for machine in range(4):
        command = [*index["command"], *index["args"]]
        _run(command, SHARDS="4", JOB_COMPLETION_INDEX=str(machine))
    _run([*merge["command"], *merge["args"]], SHARDS="4")
    found = _names(place / "galleries" / "all.sbtk")
    assert found == sorted(path.name for path in (place / "photos").glob("photo-*"))


@pytest.mark.slow
def test_the_slurm_array_makes_one_gallery(place: Path) -> None:
    script = CLUSTER / "slurm.sh"
    text = script.read_text()
    declared = re.search(r"^#SBATCH --array=1-(\d+)$", text, re.MULTILINE)
    merge = re.search(r"--wrap='(.+)'", text)
    assert declared is not None and merge is not None
    for task in range(1, int(declared[1]) + 1):
        _run(["sh", str(script)], SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT=declared[1])
    _run(["sh", "-c", merge[1]])
    assert len(_names(place / "galleries" / "all.sbtk")) == COUNT
    # A job that is repeated alone has a count of its own.
    shutil.rmtree(place / "galleries" / "shard-3.sbtk")
    _run(["sh", str(script)], SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="1", SHARDS="4")
    _run(["sh", "-c", merge[1]])
    # A job that fails says so.
    shutil.rmtree(place / "photos")
    failing = os.environ | {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "9"}
    done = subprocess.run(["sh", str(script)], env=failing, capture_output=True, check=False)
    assert done.returncode == 1
