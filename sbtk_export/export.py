"""From a trained student to a published model bundle: make the files, prove them, then sign."""

from __future__ import annotations

import datetime
import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

from sbtk_export.bundle_writer import file_records, published_folder, require_absent
from sbtk_export.card import CARD_NAME, model_card
from sbtk_export.fp16 import half_trunk_student
from sbtk_export.int8 import quantise
from sbtk_export.onnx_from_student import write_onnx
from sbtk_export.parity import Parity, measure_parity, require_parity, torch_reference
from sbtk_export.pictures import ExportPictures, choose_pictures
from sbtk_export.run_facts import StudentFacts, facts_from_run
from sbtk_runtime.bundle import Bundle, onnx_name
from sbtk_runtime.engine import open_engine
from sbtk_runtime.errors import BadConfig, BadData, BadModel
from sbtk_runtime.files import write_atomically
from sbtk_runtime.manifest import PRECISIONS, BundleManifest, Precision
from sbtk_runtime.names import printable_name
from sbtk_runtime.preprocess import PREPROCESSING, Pixels
from sbtk_train.checkpoint import TrainedRun, save_student
from sbtk_train.student import Student

SLIM_BYTES = 80_000_000

# The one engine that every machine with the extra `cpu` has; GPUs round in their own way.
_ENGINE = "onnxruntime"
_VERSIONS_OF = ("sbtk", "torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")

Said = Callable[[str], None]


@dataclass(frozen=True)
class ExportPlan:
    """What to make and where.

    Attributes:
        target: the bundle's folder, which must not exist yet.
        name: of the model.
        precisions: what to make beside FP32, which is always made as the reference.
        is_slim: leave FP32 and the student's weights out of the bundle.
    """

    target: Path
    name: str
    precisions: tuple[Precision, ...] = PRECISIONS
    is_slim: bool = False


def export_run(run: TrainedRun, plan: ExportPlan, images: Path | None, said: Said) -> Bundle:
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
    facts = facts_from_run(run)
    data = _data_folder(run, images)
    said(f"reading pictures of {len(facts.training_classes)} training classes from {data}")
    pictures = choose_pictures(
        data,
        facts.training_classes,
        facts.validation_classes,
        is_calibrating="int8" in plan.precisions,
    )
    return export_student(run.student, facts, pictures, plan, said)


def export_student(
    student: Student, facts: StudentFacts, pictures: ExportPictures, plan: ExportPlan, said: Said
) -> Bundle:
    """Returns the published bundle of a student.

    The manifest, the card and the hashes are written last, when every model has kept its limits;
    the folder gets its name after that.

    Raises:
        BadConfig: the plan leaves nothing to publish.
        BadModel: a model does not keep its limits; nothing was published.
    """
    for notice in pictures.notices:
        said(notice)
    precisions = tuple(p for p in PRECISIONS if p == "fp32" or p in plan.precisions)
    if plan.is_slim and precisions == ("fp32",):
        raise BadConfig(
            "a slim bundle without FP16 and INT8 would be empty", "--fp16 or --int8 with --slim"
        )
    with published_folder(plan.target) as folder:
        write_models(student, folder, precisions, pictures.calibration.pixels, said)
        draft = _manifest(folder, student, facts, plan)
        parities = check_models(Bundle(folder, draft), student, pictures, precisions, said)
        if plan.is_slim:
            (folder / onnx_name("fp32")).unlink()
        else:
            save_student(folder, student.state_dict(), facts.backbone)
        told = {str(precision): _told(parity) for precision, parity in parities.items()}
        _sign(folder, replace(draft, parity=told), plan)
    return Bundle.open(plan.target.absolute())


def write_models(
    student: Student,
    folder: Path,
    precisions: Sequence[Precision],
    calibration: Pixels,
    said: Said,
) -> None:
    """Writes an ONNX file for each precision into `folder`; `fp32` must be among them."""
    reference = folder / onnx_name("fp32")
    said("fp32: tracing")
    write_onnx(student, reference)
    if "fp16" in precisions:
        said("fp16: tracing with a half-precision trunk")
        write_onnx(half_trunk_student(student), folder / onnx_name("fp16"))
    if "int8" in precisions:
        said(f"int8: calibrating on {len(calibration)} pictures")
        quantise(reference, folder / onnx_name("int8"), calibration)


def check_models(
    bundle: Bundle,
    student: Student,
    pictures: ExportPictures,
    precisions: Sequence[Precision],
    said: Said,
) -> dict[Precision, Parity]:
    """Returns how far each model is from torch, run by the runtime's own engine.

    Raises:
        BadModel: names each limit that is not kept.
    """
    said("torch: embedding the pictures")
    reference = torch_reference(student, pictures)
    parities: dict[Precision, Parity] = {}
    for precision in precisions:
        said(f"{precision}: comparing with torch")
        engine = open_engine(bundle, engine=_ENGINE, precision=precision)
        try:
            parities[precision] = measure_parity(engine, pictures, reference)
        finally:
            engine.close()
    require_parity(parities)
    return parities


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
        dim=student.embedding.out_features,
        preprocessing=PREPROCESSING,
        files=files,
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
            f"the slim bundle has {total:,} bytes", f"at most {SLIM_BYTES:,}", "leave out --fp16"
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
