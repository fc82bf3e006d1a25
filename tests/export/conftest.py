"""A tiny student, exported once for all tests of exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbtk_export.card import StudentFacts, collect_facts
from sbtk_export.export import ExportPlan, export_student
from sbtk_export.images import ExportImages, choose_images
from sbtk_runtime.bundle import Bundle
from sbtk_train.models.student import SbtknetStudent
from sbtk_train.runs.checkpoint import TrainedRun
from tests.tiny_student import (
    TRAINING,
    VALIDATION,
    fitted,
    tiny_student,
    trained_run,
    write_run,
    write_textures,
)


@pytest.fixture(autouse=True, scope="session")
def listed_once(operators_listed_once: None) -> None:
    """Use it in all tests of this folder."""


@pytest.fixture(scope="session")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with training, validation and unseen classes."""
    return write_textures(tmp_path_factory.mktemp("data") / "textures")


@pytest.fixture(scope="session")
def samples(textures: Path) -> ExportImages:
    return choose_images(textures, TRAINING, VALIDATION)


@pytest.fixture(scope="session")
def student(samples: ExportImages) -> SbtknetStudent:
    return fitted(tiny_student(), [samples.parity, samples.ranking])


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory, textures: Path, student: SbtknetStudent
) -> TrainedRun:
    folder = write_run(tmp_path_factory.mktemp("runs") / "2026-11-01-tiny", textures, student)
    return trained_run(folder, student)


@pytest.fixture(scope="session")
def facts(run: TrainedRun) -> StudentFacts:
    return collect_facts(run)


@pytest.fixture(scope="session")
def bundle(
    tmp_path_factory: pytest.TempPathFactory,
    student: SbtknetStudent,
    facts: StudentFacts,
    samples: ExportImages,
) -> Bundle:
    """The full bundle of the tiny student."""
    plan = ExportPlan(tmp_path_factory.mktemp("bundles") / "tiny", "tiny")
    return export_student(student, facts, samples, plan, print).bundle
