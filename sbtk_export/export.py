"""From a trained student to a published model bundle: make the files, prove them, then sign."""

from __future__ import annotations

import datetime
import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import onnx

from sbtk_export.binary_codes import CODES_PER_KIND, require_bits, write_codes
from sbtk_export.bundle_writer import file_records, published_folder, require_absent
from sbtk_export.card import CARD_NAME, model_card
from sbtk_export.model_files import (
    VARIANTS,
    Variant,
    check_models,
    file_name,
    write_golden,
    write_models,
)
from sbtk_export.parity import Parity, Reference, torch_reference
from sbtk_export.pictures import ExportPictures, choose_pictures
from sbtk_export.run_facts import StudentFacts, facts_from_run
from sbtk_export.saturation import require_same_sums
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.engine_request import Said
from sbtk_runtime.errors import BadConfig, BadData, BadModel
from sbtk_runtime.files import write_atomically
from sbtk_runtime.manifest import PRECISIONS, BundleManifest
from sbtk_runtime.names import printable_name
from sbtk_runtime.onnx_file import DOMAIN_NAME
from sbtk_runtime.preprocess import PREPROCESSING
from sbtk_train.runs.checkpoint import TrainedRun, save_student
from sbtk_train.students.student import Student

SLIM_BYTES = 80_000_000

_VERSIONS_OF = ("sbtk", "torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True)
class ExportPlan:
    """What to make and where.

    Attributes:
        target: the bundle's folder, which must not exist yet.
        name: of the model.
        variants: what to make beside FP32, which is always made as the reference.
        is_slim: leave FP32 and the student's weights out of the bundle.
        bits: lengths of binary codes that the bundle shall make of its embeddings.
        opset: version of ONNX's operators; `None` for the exporter's own choice.
    """

    target: Path
    name: str
    variants: tuple[Variant, ...] = PRECISIONS
    is_slim: bool = False
    bits: tuple[int, ...] = ()
    opset: int | None = None


@dataclass(frozen=True)
class Exported:
    """A published bundle, and what it was measured with.

    Attributes:
        bundle: the bundle, in its place.
        pictures: what its models were compared on.
        reference: what torch makes of these.
    """

    bundle: Bundle
    pictures: ExportPictures
    reference: Reference


def export_run(run: TrainedRun, plan: ExportPlan, images: Path | None, said: Said) -> Exported:
    """Returns the published bundle of a run.

    Args:
        run: the trained run.
        plan: what to make.
        images: data to calibrate and measure on instead of the run's own.
        said: told what is under way.

    Raises:
        BadData: there are no images, or too few of the run's training classes.
        BadModel: a model does not keep its limits; nothing was published.
    """
    require_absent(plan.target)
    require_bits(plan.bits, run.student.dim)
    facts = facts_from_run(run)
    data = _data_folder(run, images)
    said(f"reading pictures of {len(facts.training_classes)} training classes from {data}")
    pictures = choose_pictures(
        data,
        facts.training_classes,
        facts.validation_classes,
        is_calibrating=not {"int8", "int8.trt"}.isdisjoint(plan.variants),
        codes_per_kind=CODES_PER_KIND if plan.bits else 0,
    )
    return export_student(run.student, facts, pictures, plan, said)


def export_student(
    student: Student, facts: StudentFacts, pictures: ExportPictures, plan: ExportPlan, said: Said
) -> Exported:
    """Returns the published bundle of a student.

    The manifest, the card and the hashes are written last, when every model has kept its limits;
    the folder gets its name after that.

    Raises:
        BadConfig: the plan leaves nothing to publish.
        BadModel: a model does not keep its limits; nothing was published.
    """
    for notice in pictures.notices:
        said(notice)
    variants = tuple(v for v in VARIANTS if v == "fp32" or v in plan.variants)
    if plan.is_slim and not {"fp16", "int8"} & set(variants):
        raise BadConfig(
            "a slim bundle without FP16 and INT8 would be empty", "--fp16 or --int8 with --slim"
        )
    with published_folder(plan.target) as folder:
        write_models(student, folder, variants, pictures.calibration.inputs, said, plan.opset)
        draft = _manifest(folder, student, facts, plan)
        said("torch: embedding the pictures")
        reference = torch_reference(student, pictures)
        parities = check_models(Bundle(folder, draft), reference, pictures, variants, said)
        write_golden(Bundle(folder, draft), variants)
        metrics = facts.metrics
        if plan.bits:
            metrics = metrics | write_codes(
                Bundle(folder, draft), plan.bits, pictures, reference.ranking, said
            )
        if plan.is_slim:
            (folder / file_name("fp32")).unlink()
        else:
            save_student(folder, student.state_dict(), facts.backbone)
        told = {variant: dict(_told(parity)) for variant, parity in parities.items()}
        if "int8" in told:
            path = folder / file_name("int8")
            told["int8"]["largest_pair_sum"] = require_same_sums(onnx.load(path), path.name)
        _sign(folder, replace(draft, parity=told, metrics=metrics), plan)
    return Exported(Bundle.open(plan.target.absolute()), pictures, reference)


def _manifest(
    folder: Path, student: Student, facts: StudentFacts, plan: ExportPlan
) -> BundleManifest:
    files = file_records(folder)
    joined = "".join(record.sha256 for record in files.values())
    return BundleManifest(
        name=plan.name,
        # Of every model that was made: equal ids embed alike, in each precision.
        model_id=f"{plan.name}@{hashlib.sha256(joined.encode()).hexdigest()[:12]}",
        method=facts.method,
        backbone=facts.backbone,
        dim=student.dim,
        preprocessing=PREPROCESSING,
        files=files,
        domain_input=DOMAIN_NAME if student.has_domain_input else None,
        training=facts.training,
        metrics=facts.metrics,
        versions={name: _version(name) for name in _VERSIONS_OF}
        | {"python": platform.python_version()},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _sign(folder: Path, manifest: BundleManifest, plan: ExportPlan) -> None:
    """Writes card and manifest, and reads the bundle back as a user would."""
    manifest = replace(manifest, files=file_records(folder))
    write_atomically(folder / CARD_NAME, model_card(manifest).encode())
    manifest = replace(manifest, files=file_records(folder))
    total = sum(record.size_bytes for record in manifest.files.values())
    if plan.is_slim and total > SLIM_BYTES:
        raise BadModel(
            f"the slim bundle has {total:,} bytes",
            f"at most {SLIM_BYTES:,}",
            "leave out --fp16 or --int8-trt",
        )
    manifest.write(folder)
    Bundle.open(folder.absolute()).verify()


def _told(parity: Parity) -> Mapping[str, object]:
    return asdict(parity) | {"map_difference": parity.map_difference}


def _data_folder(run: TrainedRun, images: Path | None) -> Path:
    folder = Path(run.config.data) if images is None else images
    if folder.is_dir():
        return folder
    whose = "the run's data" if images is None else "the images"
    raise BadData(
        f"{whose} are gone: no folder {printable_name(folder)}",
        "real sketches and photos of the run's training classes",
        f"sbtk export {printable_name(run.folder)} --images DATA",
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "source tree"
