"""`sbtk bench`: tables, JSON, plots, the log, and invalid options."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbtk_cli.main import main
from sbtk_runtime.engines.registry import probe_engines
from sbtk_runtime.evaluation.bench.interleave import QUICK
from sbtk_runtime.generated_inputs import clustered_vectors
from sbtk_runtime.manifest import read_bundle_manifest
from sbtk_train.models import eager
from tests.tiny_data import write_dataset
from tests.tiny_student import tiny_student

# Two classes are unseen in SK-YE, two are seen.
CLASSES = ("cow", "windmill", "airplane", "cat")


@pytest.fixture
def data(workplace: Path) -> Path:
    return write_dataset(workplace / "data", CLASSES, sketches=3, photos=3)


@pytest.fixture
def small_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the ResNet50 with random weights by a student of two convolutions."""
    monkeypatch.setattr(
        eager, "make_random_student", lambda method, backbone, dim: tiny_student(dim)
    )


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    """Return the JSON line of the command."""
    assert main(["bench", *arguments, "--json"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    found: dict[str, Any] = json.loads(lines[0])
    return found


def tell_training(bundle: Path, **training: object) -> None:
    """Add training metadata to a bundle's manifest."""
    dataclasses.replace(read_bundle_manifest(bundle), training=training).write(bundle)


@pytest.mark.slow
def test_latency_of_all_engines_and_torch_as_json_csv_and_plot(
    small_student: None, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(
        capsys,
        *("latency", "--model", "tiny", "--threads", "1", "--batch", "1,2", "--batch", "2"),
        *("--engine", "all", "--quick", "--plot", "latency.png", "--csv", "latency.csv"),
    )
    assert found["machine"]["versions"]["numpy"] == np.__version__
    latency = found["latency"]
    peers = {"torch eager fp32", "torch eager channels_last fp32"}
    engines = {
        f"{report.name} {precision}"
        for report in probe_engines()
        if report.works
        for precision in ("int8", "fp32")
    }
    assert len(engines) >= 4
    assert {(point["name"], point["batch"]) for point in latency["throughput"]} == {
        (name, batch) for name in peers | engines for batch in (1, 2)
    }
    for point in latency["throughput"]:
        is_engine = point["name"] in engines
        assert point["times_eager"] > 0
        assert point["times_compiled"] is None
        assert (point["times_floor"] is not None) == is_engine
        assert (point["peak_memory_bytes"] is not None) == is_engine
    assert "synthetic" in latency["searched"]
    assert Path("latency.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(Path("latency.csv").read_text().splitlines()))
    assert len(rows) == len(latency["throughput"])
    for row, point in zip(rows, latency["throughput"], strict=True):
        assert row["model_id"] == latency["model_id"]
        assert float(row["photo_decode_ms"]) > 0
        for name, value in point.items():
            assert row[name] == ("" if value is None else str(value))


def test_latency_of_a_gallery_and_of_real_files_as_tables(
    gallery: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "photo" / "cow" / "0.jpg").write_bytes(b"no image")
    arguments = ["--model", "tiny", "--precision", "int8", "--batch", "1", "--no-torch", "--quick"]
    assert main(["bench", "latency", *arguments, "--data", "data", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "8 photos in a gallery" in " ".join(out.split())
    assert "12 sketches and 11 photos of data" in " ".join(out.split())
    for word in ("decode", "preprocess", "engine", "search", "p95", "images/s", "numpy"):
        assert word in out
    assert "int8 floor: 0.00 GMAC an image" in out
    assert "memory" in out
    assert "torch eager" not in out
    assert "mAP" not in out
    assert err == ""


@pytest.mark.slow
def test_map_on_validation_classes_is_reported_with_the_speeds(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_training(Path("bundles/tiny"), validation_classes=["cat", "airplane"])
    arguments = ["latency", "--model", "tiny", "--engine", "onnxruntime", "--threads", "1"]
    arguments += ["--batch", "1", "--no-torch", "--quick"]
    assert answer(capsys, *arguments)["latency"]["quality"] is None
    monkeypatch.setenv("SBTK_DATA", "data")
    latency = answer(capsys, *arguments, "--map")["latency"]
    assert latency["quality"]["protocol"].startswith("2 validation classes (seen, held out)")
    assert latency["quality"]["reference"] == "onnxruntime fp32"
    points = {point["precision"]: point for point in latency["throughput"]}
    assert points["fp32"]["map_difference"] == 0
    assert points["int8"]["map_all"] == latency["quality"]["metrics"]["onnxruntime int8"]
    assert main(["bench", *arguments, "--map"]) == 0
    out = capsys.readouterr().out
    assert "mAP - fp32" in out
    assert "reference: onnxruntime fp32" in out


def test_unavailable_map_is_an_error_only_with_the_option_map(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["latency", "--model", "tiny", "--threads", "1", "--batch", "1", "--no-torch"]
    assert main(["bench", *arguments, "--quick", "--map"]) == 2
    assert "SBTK_DATA" in capsys.readouterr().err
    assert main(["bench", *arguments, "--quick", "--map", "--data", "data"]) == 1
    assert "names no validation classes" in capsys.readouterr().err
    monkeypatch.setattr("sbtk_cli.bench_runs.USUAL", QUICK)
    latency = answer(capsys, *arguments, "--data", "data")["latency"]
    assert latency["quality"] is None
    assert any("names no validation classes" in note for note in latency["notes"])


@pytest.mark.parametrize("text", ["0", "1,", "8x", "-1", "1;2", "5000", "1,,2", ""])
def test_invalid_batch_sizes_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert main(["bench", "latency", "--model", "tiny", f"--batch={text}"]) == 2
    assert "1,8,32" in capsys.readouterr().err


def test_a_csv_file_that_cannot_be_written_is_refused_before_measuring(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "latency", "--model", "tiny", "--csv", "nowhere/x.csv"]) == 2
    assert "the folder of nowhere/x.csv does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_compiler_the_other_contenders_are_measured(
    small_student: None, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import config as inductor

    torch.compiler.reset()  # drop what other tests have compiled
    settings = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with inductor.patch(settings):
        latency = answer(
            capsys,
            *("latency", "--model", "tiny", "--engine", "onnxruntime", "--precision", "int8"),
            *("--threads", "1", "--batch", "1", "--compile", "--quick"),
        )["latency"]
    names = [point["name"] for point in latency["throughput"]]
    assert names == ["onnxruntime int8", "torch eager fp32", "torch eager channels_last fp32"]
    assert any(note.startswith("torch compiled") for note in latency["notes"])


@pytest.mark.slow
def test_bench_without_a_subcommand_measures_latency_and_with_data_map(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(
        capsys,
        *("--model", "tiny", "--threads", "1", "--quick", "--no-torch"),
        *("--data", "data", "--engine", "all"),
    )
    assert len(found["map"]) == 1
    assert set(found) == {"machine", "latency", "map"}
    assert "unseen" in found["map"][0]["protocol"]
    found = answer(capsys, "--model", "tiny", "--threads", "1", "--quick", "--no-torch")
    assert set(found) == {"machine", "latency"}


def test_map_of_each_precision_on_the_unseen_classes(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(
        capsys,
        *("map", "data", "--split", "SK-YE", "--model", "tiny"),
        *("--precision", "int8", "--precision", "fp32"),
    )
    assert [report["precision"] for report in found["map"]] == ["int8", "fp32"]
    for report in found["map"]:
        assert report["protocol"].startswith("2 of 21 unseen classes of SK-YE: 6 sketches against")
        assert set(report["class_map"]) == {"cow", "windmill"}
        assert 0 < report["figures"]["mAP@all"] <= 1
        assert "mean over queries" in report["definitions"]["mAP@all"]


def test_map_as_a_table_names_the_classes_and_defines_its_metrics(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "map", "data", "--model", "tiny", "--plot", "map.svg"]) == 0
    out, err = capsys.readouterr()
    assert "unseen classes of SK-YE" in " ".join(out.split())
    assert "sum_i P@i rel_i / R" in " ".join(out.split())
    assert "appended to" not in err
    assert "<svg" in Path("map.svg").read_text()


def test_unseen_runs_are_logged_if_a_log_exists(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Path("benchmarks/unseen.log")
    log.parent.mkdir()
    log.touch()
    assert main(["bench", "map", "data", "--model", "tiny"]) == 0
    assert "appended to" in capsys.readouterr().err
    assert main(["bench", "map", "data", "--model", "tiny"]) == 0
    assert "already has this model file" in capsys.readouterr().err
    assert log.read_text().count("2 of 21 unseen classes of SK-YE") == 2


def test_validation_classes_come_from_the_manifest_and_are_not_logged(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Path("benchmarks/unseen.log")
    log.parent.mkdir()
    log.touch()
    arguments = ["map", "data", "--model", "tiny", "--classes", "validation"]
    assert main(["bench", *arguments]) == 1
    assert "names no validation classes" in capsys.readouterr().err
    tell_training(Path("bundles/tiny"), validation_classes=["cat", "airplane", "elsewhere"])
    found = answer(capsys, *arguments)
    assert found["map"][0]["protocol"].startswith("2 validation classes (seen, held out)")
    assert set(found["map"][0]["class_map"]) == {"airplane", "cat"}
    assert log.read_text() == ""


def test_a_model_is_not_measured_on_its_training_classes(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = {"name": "mine.txt", "sha256": "0" * 64}
    tell_training(Path("bundles/tiny"), split=split, unseen_classes=["cat", "windmill"])
    assert main(["bench", "map", "data", "--model", "tiny", "--split", "SK-YE"]) == 1
    err = capsys.readouterr().err
    assert "may have been trained on cow" in err
    assert "--split mine.txt" in err
    found = answer(capsys, "map", "data", "--model", "tiny")
    assert found["map"][0]["protocol"].startswith("2 unseen classes of mine.txt")


def test_unreadable_images_are_named_and_the_exit_code_is_3(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "photo" / "cow" / "bad.jpg").write_bytes(b"no image")
    assert main(["bench", "map", "data", "--model", "tiny"]) == 3
    out, err = capsys.readouterr()
    assert "bad.jpg" in err
    assert "1 unreadable image excluded" in out


def test_missing_data_and_data_without_unseen_classes_are_errors(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "map", "--model", "tiny"]) == 2
    assert "SBTK_DATA" in capsys.readouterr().err
    write_dataset(workplace / "seen", ("cat", "airplane"), sketches=1, photos=1)
    assert main(["bench", "map", "seen", "--model", "tiny"]) == 1
    assert "none of the 21 unseen classes" in capsys.readouterr().err


def test_another_file_than_embeddings_is_refused_without_advice_to_unpickle_it(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("x.md").write_text("no embeddings\n")
    assert main(["bench", "search", "--embeddings", "x.md"]) == 1
    err = capsys.readouterr().err
    assert "x.md cannot be read as embeddings: not a NumPy file" in err
    assert "pickle" not in err


def test_search_over_synthetic_vectors_with_peers(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(
        capsys,
        *("search", "--synthetic", "600", "--dim", "16", "--seed", "3", "--threads", "1"),
        *("--ef", "5", "--ef", "64", "--plot", "search.pdf"),
        *("--peer", "faiss", "--peer", "usearch"),
    )["search"]
    assert "seed 3" in found["vectors"]
    assert (found["count"], found["dim"], found["k"]) == (600, 16, 10)
    assert [build["name"] for build in found["builds"]] == [
        "sign codes",
        "hnswlib",
        "faiss-cpu HNSW",
        "usearch",
        "faiss-cpu IVF-PQ",
    ]
    points = {(point["name"], point["ef"]): point["recall"] for point in found["points"]}
    # An ef below k is skipped.
    assert set(points) == {
        ("exact (NumPy)", None),
        ("sign codes", None),
        ("hnswlib", 64),
        ("faiss-cpu HNSW", 64),
        ("usearch", 64),
        ("faiss-cpu IVF-PQ, 4 lists", None),
    }
    assert points["exact (NumPy)", None] == 1.0
    assert min(points.values()) > 0.9
    assert (workplace / "search.pdf").read_bytes().startswith(b"%PDF")


def test_search_without_graphs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(
        capsys, *("search", "--synthetic", "600", "--dim", "16", "--no-graphs", "--peer", "faiss")
    )["search"]
    assert [build["name"] for build in found["builds"]] == ["sign codes", "faiss-cpu IVF-PQ"]


def test_search_of_a_gallery_measures_the_methods_of_queries(
    gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, "search", "-k", "3")["search"]
    assert found["count"] == 8
    assert {point["name"]: point["recall"] for point in found["points"]} == {
        "exact": 1.0,
        "sign codes": 1.0,
    }
    assert main(["bench", "search", "-k", "9"]) == 2
    assert "recall at 9 over 8 vectors" in capsys.readouterr().err


def test_search_over_embeddings_from_files(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("own.npz", paths=np.array(["a"] * 100), embeddings=clustered_vectors(100, 8))
    np.save("queries.npy", clustered_vectors(7, 8, of=100))
    found = answer(capsys, "search", "--embeddings", "own.npz", "--queries", "queries.npy")
    assert found["search"]["count"] == 100
    assert found["search"]["queries"] == "the first 7 embeddings of queries.npy"
    found = answer(capsys, "search", "--embeddings", "own.npz")
    assert found["search"]["count"] == 90
    assert main(["bench", "search", "--embeddings", "own.npz"]) == 0
    assert "recall@10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("text.npz", "cannot be read"), ("long.npy", "unit length"), ("flat.npy", "shape")],
)
def test_files_without_embeddings_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], name: str, complaint: str
) -> None:
    Path("text.npz").write_text("no embeddings")
    np.save("long.npy", np.full((20, 4), 2.0, dtype=np.float32))
    np.save("flat.npy", np.ones(20, dtype=np.float32))
    assert main(["bench", "search", "--embeddings", name]) == 1
    assert complaint in capsys.readouterr().err


def test_contradictory_search_options_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "search", "--synthetic", "50", "--embeddings", "x.npz"]) == 2
    assert main(["bench", "search", "--synthetic", "50", "--ef", "4"]) == 2
    capsys.readouterr()
    assert main(["bench", "--json", "latency"]) == 2
    assert "after the subcommand" in capsys.readouterr().err


def test_a_plot_that_cannot_be_drawn_is_refused_before_measuring(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "search", "--plot", "x.gif"]) == 2
    assert ".png" in capsys.readouterr().err
    assert main(["bench", "search", "--plot", "nowhere/x.png"]) == 2
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "search", "--plot", "x.png"]) == 1
    assert 'pip install "sbtk[plot]"' in capsys.readouterr().err
