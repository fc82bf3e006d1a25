"""`sbtk doctor`: instruction sets, conflicting installs, models and galleries."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from sbtk_runtime import doctor
from sbtk_runtime.doctor import Finding, examine, gpu_names
from sbtk_runtime.machine import cpu_flags, extras
from sbtk_runtime.manifest import GalleryManifest, GraphRecord
from sbtk_runtime.preprocess import PREPROCESSING
from tests.tiny import tiny_bundle
from tests.tiny_gallery import gallery_of, unit_rows


def finding(topic: str, gallery: Path, model: Path | str | None) -> Finding:
    examination = examine(gallery, None if model is None else str(model))
    return next(f for f in examination.findings if f.topic == topic)


def write_gallery_manifest(folder: Path, model_id: str, graph: GraphRecord | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    GalleryManifest(3, model_id, "int8", 16, PREPROCESSING, 1234, graph).write(folder)
    return folder


def test_an_intact_model_is_run(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    examination = examine(tmp_path / "none", str(bundle))
    by_topic = {f.topic: f for f in examination.findings}
    taken = next(engine.name for engine in examination.engines if engine.works)
    assert examination.engine == taken
    assert by_topic["model"].level == "ok"
    assert f"takes {taken}, int8" in by_topic["auto"].text
    assert by_topic["gallery"].next_step.startswith("sbtk index")
    assert json.loads(json.dumps(examination.to_json()))["engine"] == taken


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    path = bundle / "model.int8.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    found = finding("model", tmp_path / "none", bundle)
    assert found.level == "problem"
    assert "model.int8.onnx" in found.text


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    found = finding("model", tmp_path / "none", tmp_path / "nowhere")
    assert found.level == "problem"
    assert "nowhere" in found.text


def test_a_gallery_of_the_same_model_is_ok(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    model_id = json.loads((bundle / "manifest.json").read_text())["model_id"]
    found = finding("gallery", write_gallery_manifest(tmp_path / "g", model_id), bundle)
    assert found.level == "ok"
    assert "1,234 photos" in found.text


def test_a_gallery_of_another_model_is_noted(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    found = finding("gallery", write_gallery_manifest(tmp_path / "g", "old@1"), bundle)
    assert found.level == "note"
    assert "old@1" in found.text


def test_a_missing_graph_is_noted(tmp_path: Path) -> None:
    graph = GraphRecord("graph-3.hnsw", "0" * 64, 10, 16, 200, 64)
    found = finding("gallery", write_gallery_manifest(tmp_path / "g", "old@1", graph), None)
    assert "graph-3.hnsw is missing" in found.text


def test_missing_sign_codes_are_noted(tmp_path: Path) -> None:
    folder = tmp_path / "g"
    gallery_of(folder, unit_rows(30, 16))
    assert "is missing" not in finding("gallery", folder, None).text
    (folder / "codes-1" / "000000.bits").unlink()
    found = finding("gallery", folder, None)
    assert "codes-1/000000.bits is missing" in found.text


def test_a_damaged_gallery_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    assert finding("gallery", tmp_path, None).level == "problem"


@pytest.mark.parametrize(
    ("line", "level", "named"),
    [
        ("flags\t\t: fpu avx2 avx512bw avx512_vnni amx_int8", "ok", "AMX"),
        ("flags\t\t: fpu avx2 avx512_vnni", "ok", "AVX-512 VNNI"),
        ("flags\t\t: fpu avx2 avx_vnni", "ok", "AVX VNNI"),
        ("Features\t: fp asimd asimddp i8mm", "ok", "Arm I8MM"),
        ("flags\t\t: fpu sse4_2 avx2", "note", "avx2"),
        ("flags\t\t: fpu sse4_2", "note", "no SIMD"),
        ("model name\t: mystery", "note", "unknown"),
    ],
)
def test_int8_instructions_of_the_processor_are_recognised(
    tmp_path: Path, line: str, level: str, named: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    found = doctor._int8(cpu_flags(cpuinfo))
    assert found.level == level
    assert named in found.text


def test_no_cpuinfo_means_no_flags(tmp_path: Path) -> None:
    assert cpu_flags(tmp_path / "missing") == frozenset()


def test_gpus_are_read_from_the_driver(tmp_path: Path) -> None:
    folder = tmp_path / "0000:3b:00.0"
    folder.mkdir()
    (folder / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    assert gpu_names(tmp_path) == ["NVIDIA H100 80GB HBM3"]
    assert gpu_names(tmp_path / "missing") == []


def test_two_installed_onnx_runtimes_are_found_by_their_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.31.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.31.0\n"
        )
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    installed = doctor.installed_onnxruntimes()
    assert installed == ["onnxruntime 1.31.0", "onnxruntime-gpu 1.31.0"]
    (found,) = doctor._double_onnxruntime(installed)
    assert found.level == "problem"
    assert found.next_step.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && ")


def test_one_onnx_runtime_is_ok() -> None:
    assert doctor._double_onnxruntime(["onnxruntime 1.31.0"]) == []


def test_extras_come_from_the_packages_metadata() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    declared = tomllib.loads(text)["project"]["optional-dependencies"]
    assert declared.pop("heic") == ["sbtk[photos]"]  # its name before it brought RAW too
    found = extras()
    assert set(found) == set(declared)
    for extra, requirements in declared.items():
        assert len(found[extra]) == len(requirements)
        assert all(map(str.startswith, requirements, found[extra]))
    assert set(doctor.installed_extras()) == set(declared) - {"dev"}


def test_unsupported_photo_formats_name_their_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pillow_heif")
    pytest.importorskip("rawpy")
    assert doctor._photos().level == "ok"

    def version(name: str) -> str:
        if name == "rawpy":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    found = doctor._photos()
    assert found.level == "note"
    assert found.text.startswith("camera RAW cannot be read")
    assert found.next_step == 'pip install "sbtk[photos]"'
