"""`sbtk export`: from a run folder to a bundle."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from sbtk_cli.export import variants_to_make
from sbtk_cli.main import main
from sbtk_export.export import Variant
from sbtk_export.images import choose_images
from sbtk_runtime.bundle import Bundle
from sbtk_train.models.student import SbtknetStudent
from sbtk_train.runs.checkpoint import STUDENT
from tests.fakes.machine import SURFACES, fake_machine
from tests.tiny_student import TRAINING, VALIDATION, fitted, write_run, write_textures

pytestmark = pytest.mark.usefixtures("narrow_resnet18", "operators_listed_once")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_textures(tmp_path_factory.mktemp("data") / "textures", training=40)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, data: Path, narrow_resnet18: None) -> Path:
    """A run in `runs/` of a folder of its own."""
    import torch

    torch.manual_seed(1)  # some random weights lose too much in INT8
    samples = choose_images(data, TRAINING, VALIDATION)
    student = SbtknetStudent("resnet18", 16, len(TRAINING))
    fitted(student, [samples.parity, samples.ranking], shrinkage=1e-2)
    return write_run(tmp_path_factory.mktemp("work") / "runs" / "2026-11-01-stripes", data, student)


@pytest.fixture
def work(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the folder that holds `runs/`, on a machine without TensorRT."""
    monkeypatch.chdir(run_folder.parent.parent)
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    return run_folder.parent.parent


@pytest.mark.slow
def test_newest_run_becomes_a_bundle_that_passes_its_check(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert "int8: calibrating on 32 images" in printed.err
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["fp32", "fp16", "int8"]
    assert "bundles/2026-11-01-stripes: 2026-11-01-stripes@" in lines[4]
    bundle = Bundle.open(work / "bundles" / "2026-11-01-stripes")
    assert STUDENT in bundle.manifest.files
    assert bundle.manifest.backbone == "resnet18"
    assert main(["models", "check", "2026-11-01-stripes"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count(" runs on ") == 3


@pytest.mark.slow
def test_one_precision_from_other_images_as_json(
    work: Path, run_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own data no longer exist; the same classes are in another folder."""
    moved = Path(shutil.copytree(run_folder, work / "elsewhere"))
    config = moved / "config.resolved.toml"
    config.write_text(config.read_text().replace(str(data), "/gone"))
    words = ["--int8", "--slim", "-o", "made/small", "--images", str(data), "--json", "--quiet"]
    assert main(["export", str(moved), *words, "--bits", "8", "--bits", "16"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    answer = json.loads(printed.out)
    assert answer["model_id"].startswith("small@")
    files = {"MODEL_CARD.md", "PREPROCESSING.md", "model.int8.onnx", "itq8.npz", "itq16.npz"}
    assert {name for name in answer["files"] if not name.startswith("golden.")} == files
    assert answer["bits"] == [8, 16]
    assert 0 < answer["metrics"]["codes_8_map"]["value"] <= 1
    assert set(answer["parity"]) == {"fp32", "int8"}
    assert answer["engines"] == []


@pytest.mark.slow
def test_if_tensorrt_works_its_int8_file_and_plans_are_made_too(
    work: Path,
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The GPU is a fake that computes through ONNX Runtime."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_machine(monkeypatch, SURFACES[0])
    assert main(["export", str(run_folder), "-o", "made/gpu", "--fp16", "--int8-trt"]) == 0
    printed = capsys.readouterr()
    assert "int8 for TensorRT: calibrating on 32 images" in printed.err
    lines = printed.out.splitlines()
    titles = [line.partition("  ")[0] for line in lines[1:6]]
    assert titles == ["fp32", "fp16", "int8.trt", "fp16 plan", "int8 plan"]
    assert "fp16 plan for tensorrt 10.16.1" in lines[-2]
    assert main(["engine", "list", "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(entry["precision"], entry["is_usable"]) for entry in listed] == [
        ("fp16", True),
        ("int8", True),
    ]


@pytest.mark.parametrize(
    ("asked", "for_tensorrt", "made"),
    [
        ([], False, ("fp32", "fp16", "int8")),
        ([], True, ("fp32", "fp16", "int8", "int8.trt")),
        (["fp16"], True, ("fp32", "fp16")),
        (["int8.trt"], False, ("fp32", "int8.trt")),
        (["fp16", "int8"], True, ("fp32", "fp16", "int8")),
    ],
)
def test_only_requested_variants_are_made_and_by_default_all_useful_ones(
    asked: list[Variant], for_tensorrt: bool, made: tuple[Variant, ...]
) -> None:
    assert variants_to_make(asked, for_tensorrt=for_tensorrt) == made


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["nowhere"], 2, "nowhere is not a trained run"),
        (["RUN", "--images", "nowhere", "-o", "new"], 1, "images do not exist: no folder nowhere"),
        (["RUN", "--images", ".", "-o", "new"], 1, ". has no folder 'sketch'"),
        (["RUN", "-o", "runs"], 2, "runs exists"),
        (["RUN", "--name", "../up"], 2, "'../up' cannot name a bundle"),
        (["RUN", "-o", "two words"], 2, "'two words' cannot name a bundle"),
        (["RUN", "--int4"], 2, "No such option"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(
    work: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    sentence: str,
) -> None:
    before = sorted(path.name for path in work.iterdir())
    replaced = [str(run_folder) if word == "RUN" else word for word in words]
    assert main(["export", *replaced]) == code
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.out == ""
    assert sorted(path.name for path in work.iterdir()) == before


def test_too_few_images_fail_before_any_work(
    work: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_textures(tmp_path / "few", training=24)
    assert main(["export", str(run_folder), "--images", str(few), "-o", "few"]) == 1
    printed = capsys.readouterr()
    assert "has 16 images for calibration" in printed.err
    assert "at least 32" in printed.err
    assert "tracing" not in printed.err
    assert not (work / "few").exists()


def test_without_a_run_the_error_names_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export"]) == 2
    printed = capsys.readouterr()
    assert "no trained run below runs" in printed.err
    assert "sbtk train DATA" in printed.err


@pytest.mark.slow
def test_regions_are_exported_from_a_run_and_from_its_bundle(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--fp16", "-o", "bundles/seen", "--regions"]) == 0
    assert "comparing 16 regions of" in capsys.readouterr().err
    metrics = Bundle.open(work / "bundles" / "seen").manifest.metrics
    assert "torch's" in metrics["regions_fp16"]["rule"]
    assert main(["export", "bundles/seen", "--regions", "9", "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert "9 regions" in printed["metrics"]["regions_fp16"]["rule"]
    assert main(["export", "seen", "--regions=9", "-o", "models", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    names = ["model.fp32.regions.onnx", "model.fp16.regions.onnx", "boxes.npy"]
    assert [Path(name).name for name in files] == names
    assert main(["export", "--regions", "bundles/seen"]) == 2
    assert "'bundles/seen' is not 9 or 16" in capsys.readouterr().err
