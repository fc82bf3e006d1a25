"""`sbtk export --regions`: of a run, and of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sbtk_cli.main import main
from sbtk_export.images import choose_images
from sbtk_runtime.bundle import Bundle
from sbtk_train.models.sbtknet import SbtknetStudent
from tests.tiny_student import TRAINING, VALIDATION, fitted, write_run, write_textures


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_resnet18")
def test_regions_of_a_run_and_of_its_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_textures(tmp_path / "textures", training=40)
    samples = choose_images(data, TRAINING, VALIDATION)
    student = SbtknetStudent("resnet18", 16, len(TRAINING))
    fitted(student, [samples.parity, samples.ranking], shrinkage=1e-2)
    write_run(tmp_path / "runs" / "2026-11-01-stripes", data, student)
    assert main(["export", "--fp16", "-o", "bundles/seen", "--regions"]) == 0
    assert "comparing 16 regions of" in capsys.readouterr().err
    metrics = Bundle.open(tmp_path / "bundles" / "seen").manifest.metrics
    assert "torch's" in metrics["regions_fp16"]["rule"]
    assert main(["export", "bundles/seen", "--regions", "9", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "9 regions" in told["metrics"]["regions_fp16"]["rule"]
    assert main(["export", "seen", "--regions=9", "-o", "models", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    names = ["model.fp32.regions.onnx", "model.fp16.regions.onnx", "boxes.npy"]
    assert [Path(name).name for name in files] == names
    assert main(["export", "--regions", "bundles/seen"]) == 2
    assert "'bundles/seen' is not 9 or 16" in capsys.readouterr().err
