"""Export of a trained student: writes the models, checks them, then publishes the bundle."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx

from sbtk_export.card import CARD_NAME, StudentFacts, collect_facts, render_model_card
from sbtk_export.fp16 import make_half_trunk_student
from sbtk_export.images import ExportImages, choose_images
from sbtk_export.input_contract import write_contract
from sbtk_export.int8 import quantise, require_same_sums
from sbtk_export.int8_tensorrt import quantise_for_tensorrt
from sbtk_export.onnx_graph import ModelInputs, write_onnx
from sbtk_export.parity import (
    Parity,
    Reference,
    compute_reference,
    mean_average_precision,
    measure_parity,
    require_parity,
)
from sbtk_runtime.binary_codes import check_bits, fit_itq
from sbtk_runtime.bundle import Bundle, OnnxForm, itq_name, onnx_name
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Embedded
from sbtk_runtime.engines import onnxruntime as engine_onnxruntime
from sbtk_runtime.engines.base import Engine, EngineOptions, EngineRequest
from sbtk_runtime.errors import BadConfig, BadData, BadModel
from sbtk_runtime.evaluation.metrics import Embeddings
from sbtk_runtime.files import (
    disk_full_explained,
    fsync_folder,
    printable_name,
    sha256_of_file,
    write_atomically,
)
from sbtk_runtime.machine import installed_versions
from sbtk_runtime.manifest import MANIFEST_NAME, PRECISIONS, BundleManifest, FileRecord, Precision
from sbtk_runtime.onnx_file import DOMAIN_NAME
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.regions import RegionGrid
from sbtk_train.models.student import Student
from sbtk_train.progress import Notify
from sbtk_train.runs.checkpoint import TrainedRun, save_student

SLIM_BYTES = 80_000_000
# Most images of each kind to fit binary codes on; they take a minute on two cores.
_CODES_PER_KIND = 1000

_VERSIONS_OF = ("sbtk", "torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True)
class ExportPlan:
    """The files to write, and the target.

    Attributes:
        target: the bundle's folder, which must not exist.
        name: name of the model.
        variants: variants in addition to FP32, which is always written as the reference.
        is_slim: leave FP32 and the student's weights out of the bundle.
        bits: lengths of the binary codes that the bundle offers.
        opset: ONNX opset version, one of `OPSETS`; `None` for the exporter's default.
    """

    target: Path
    name: str
    variants: tuple[Variant, ...] = PRECISIONS
    is_slim: bool = False
    bits: tuple[int, ...] = ()
    opset: int | None = None


@dataclass(frozen=True)
class Exported:
    """A published bundle, and the images it was measured on.

    Attributes:
        bundle: the bundle, in its target folder.
        samples: the images that its models were compared on.
        reference: torch's embeddings of these images.
    """

    bundle: Bundle
    samples: ExportImages
    reference: Reference


def export_run(run: TrainedRun, plan: ExportPlan, images: Path | None, notify: Notify) -> Exported:
    """Export a run and return the published bundle.

    Args:
        run: the trained run.
        plan: the files to write.
        images: data to calibrate and measure on instead of the run's own.
        notify: called with progress messages.

    Raises:
        BadConfig: the target exists, or codes of these lengths are impossible.
        BadData: there are no images, or too few of the run's training classes.
        BadModel: a model exceeds its limits; nothing was published.
    """
    require_absent(plan.target)
    for length in plan.bits:
        check_bits(length, run.student.dim)
    facts = collect_facts(run)
    data = _data_folder(run, images)
    notify(f"reading images of {len(facts.training_classes)} training classes from {data}")
    samples = choose_images(
        data,
        facts.training_classes,
        facts.validation_classes,
        preprocessing=facts.preprocessing,
        is_calibrating=not {"int8", "int8.trt"}.isdisjoint(plan.variants),
        codes_per_kind=_CODES_PER_KIND if plan.bits else 0,
    )
    return export_student(run.student, facts, samples, plan, notify)


def export_student(
    student: Student, facts: StudentFacts, samples: ExportImages, plan: ExportPlan, notify: Notify
) -> Exported:
    """Export a student and return the published bundle.

    Card and manifest are written when every model is within its limits. Then the folder is renamed
    to its target.

    Args:
        student: the student.
        facts: for manifest and card.
        samples: images to calibrate and measure on.
        plan: the files to write.
        notify: called with progress messages.

    Raises:
        BadConfig: the plan leaves nothing to publish.
        BadModel: a model exceeds its limits; nothing was published.
    """
    for notice in samples.notices:
        notify(notice)
    variants = tuple(v for v in VARIANTS if v == "fp32" or v in plan.variants)
    if plan.is_slim and not {"fp16", "int8"} & set(variants):
        raise BadConfig(
            "a slim bundle without FP16 and INT8 would be empty", "--fp16 or --int8 with --slim"
        )
    with publish_folder(plan.target) as folder:
        write_models(student, folder, variants, samples.calibration.inputs, notify, plan.opset)
        draft = _manifest(folder, student, facts, plan)
        notify("torch: embedding the images")
        reference = compute_reference(student, samples)
        parities = check_models(Bundle(folder, draft), reference, samples, variants, notify)
        write_golden(Bundle(folder, draft), variants)
        metrics = facts.metrics
        if plan.bits:
            metrics = metrics | write_codes(
                Bundle(folder, draft), plan.bits, samples, reference.ranking, notify
            )
        if plan.is_slim:
            (folder / file_name("fp32")).unlink()
        else:
            save_student(folder, student.state_dict(), facts.backbone)
        figures = {
            variant: asdict(parity) | {"map_difference": parity.map_difference}
            for variant, parity in parities.items()
        }
        if "int8" in figures:
            path = folder / file_name("int8")
            figures["int8"]["largest_pair_sum"] = require_same_sums(onnx.load(path), path.name)
        write_manifest(folder, replace(draft, parity=figures, metrics=metrics))
        size = sum(path.stat().st_size for path in folder.iterdir())
        if plan.is_slim and size > SLIM_BYTES:
            raise BadModel(
                f"the slim bundle has {size:,} bytes",
                f"at most {SLIM_BYTES:,}",
                "leave out --fp16 or --int8-trt",
            )
    return Exported(Bundle.open(plan.target.absolute()), samples, reference)


def _manifest(
    folder: Path, student: Student, facts: StudentFacts, plan: ExportPlan
) -> BundleManifest:
    files = hash_files(folder)
    joined = "".join(record.sha256 for record in files.values())
    return BundleManifest(
        name=plan.name,
        # A hash of all models: bundles of one id give the same embeddings in each precision.
        model_id=f"{plan.name}@{hashlib.sha256(joined.encode()).hexdigest()[:12]}",
        method=facts.method,
        backbone=facts.backbone,
        dim=student.dim,
        preprocessing=facts.preprocessing.name,
        files=files,
        domain_input=DOMAIN_NAME if student.has_domain_input else None,
        training=facts.training,
        metrics=facts.metrics,
        versions=dict.fromkeys(_VERSIONS_OF, "source tree")
        | installed_versions(_VERSIONS_OF)
        | {"python": platform.python_version()},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def write_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Write the card and the manifest of a bundle whose other files exist, and verify the bundle.

    Raises:
        BadModel: the bundle cannot be read back.
    """
    manifest = replace(manifest, files=hash_files(folder))
    write_atomically(folder / CARD_NAME, render_model_card(manifest).encode())
    manifest = replace(manifest, files=hash_files(folder))
    manifest.write(folder)
    Bundle.open(folder.absolute()).verify()


def add_unseen_metric(folder: Path, log: Path) -> float:
    """Write a bundle's mAP@all on unseen classes into its manifest and card, and return it.

    Args:
        folder: the bundle.
        log: the log of `sbtk bench map --log`, whose lines have the date, model id, SHA-256,
            protocol and metric, separated by tabs. The last line of the bundle's model id is used.

    Raises:
        BadConfig: the log has no such line, or cannot be read.
    """
    manifest = Bundle.open(folder.absolute()).manifest
    try:
        lines = log.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise BadConfig(f"{log} cannot be read: {problem}", "a log of sbtk bench map") from problem
    entries = [line.split("\t") for line in lines if not line.startswith("#")]
    own = [entry for entry in entries if len(entry) == 5 and entry[1] == manifest.model_id]
    match = re.fullmatch(r"mAP@all ([0-9.]+)", own[-1][4]) if own else None
    if match is None:
        raise BadConfig(
            f"{log} has no mAP@all of {manifest.model_id}",
            "a line of that model",
            f"sbtk bench map DATA --model {printable_name(folder)} --log {printable_name(log)}",
        )
    date, _, _, protocol, _ = own[-1]
    entry = {"value": float(match[1]), "rule": f"mAP@all of the {protocol}; measured {date[:10]}"}
    metrics = {"unseen_map": entry} | {
        k: v for k, v in manifest.metrics.items() if k != "unseen_map"
    }
    write_manifest(folder, replace(manifest, metrics=metrics))
    return float(match[1])


def _data_folder(run: TrainedRun, images: Path | None) -> Path:
    folder = Path(run.config.data) if images is None else images
    if folder.is_dir():
        return folder
    whose = "the run's data" if images is None else "the images"
    raise BadData(
        f"{whose} do not exist: no folder {printable_name(folder)}",
        "real sketches and photos of the run's training classes",
        f"sbtk export {printable_name(run.folder)} --images DATA",
    )


#: ONNX opset versions to write models in. Means over axes that are an input need 18; not all
#: engines read newer ones than 23.
OPSETS = range(18, 24)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def validate_name(name: str) -> str:
    """Return `name` if it is a valid name of a bundle.

    Raises:
        BadConfig: it is not.
    """
    if not _NAME.fullmatch(name):
        raise BadConfig(
            f"{name!r} cannot name a bundle",
            "1 to 64 letters, digits, dots, hyphens and underscores, a letter or digit first",
            "--name NAME",
        )
    return name


@contextlib.contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target` that is renamed to `target` on success.

    If the block fails, the temporary folder is deleted.

    Raises:
        BadConfig: `target` exists.
        DiskFull: the device ran out of space.
    """
    require_absent(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.export-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        with disk_full_explained(temporary):
            yield temporary
            for path in temporary.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            fsync_folder(temporary)
        try:
            temporary.rename(target)
        except OSError:
            require_absent(target)  # another export may have made it since
            raise
        fsync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_absent(target: Path) -> None:
    """Check that a target does not exist, before any work is done.

    Raises:
        BadConfig: `target` exists.
    """
    if target.exists() or target.is_symlink():
        raise BadConfig(
            f"{printable_name(target)} exists",
            "a new folder",
            "choose another with -o BUNDLE, or remove it",
        )


def hash_files(folder: Path) -> dict[str, FileRecord]:
    """Return the size and SHA-256 of every file in `folder`, except the manifest, by name."""
    return {
        path.name: FileRecord(sha256_of_file(path), path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_NAME
    }


#: What an export can write: a precision, or TensorRT's form of INT8. The middle part of the file's
#: name, and the key in the manifest's parity.
Variant = Literal["fp32", "fp16", "int8", "int8.trt"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def precision_and_form(variant: Variant) -> tuple[Precision, OnnxForm]:
    """Return a variant's precision and the form of its ONNX file."""
    return ("int8", "tensorrt") if variant == "int8.trt" else (variant, "plain")


def file_name(variant: Variant) -> str:
    """Return the name of a variant's ONNX file in every bundle."""
    return onnx_name(*precision_and_form(variant))


def write_models(
    student: Student,
    folder: Path,
    variants: Sequence[Variant],
    calibration: ModelInputs,
    notify: Notify,
    opset: int | None = None,
) -> None:
    """Write the ONNX files of the variants, of which `fp32` must be one, into `folder`.

    Args:
        student: in evaluation mode.
        folder: where to write them.
        variants: what to write.
        calibration: images to calibrate INT8 on.
        notify: called with progress messages.
        opset: ONNX opset version; `None` for the exporter's default.
    """
    reference = folder / file_name("fp32")
    notify("fp32: tracing")
    write_onnx(student, reference, opset)
    if "fp16" in variants:
        notify("fp16: tracing with a half-precision trunk")
        write_onnx(make_half_trunk_student(student), folder / file_name("fp16"), opset)
    if "int8" in variants:
        notify(f"int8: calibrating on {len(calibration)} images")
        quantise(reference, folder / file_name("int8"), calibration)
    if "int8.trt" in variants:
        notify(f"int8 for TensorRT: calibrating on {len(calibration)} images")
        quantise_for_tensorrt(reference, folder / file_name("int8.trt"), calibration)


def check_models(
    bundle: Bundle,
    reference: Reference,
    samples: ExportImages,
    variants: Sequence[Variant],
    notify: Notify,
) -> dict[str, Parity]:
    """Compare each variant with torch, on ONNX Runtime and the CPU; return the results by variant.

    Every machine with the extra `cpu` has that engine; GPUs round differently.

    Raises:
        BadModel: names each exceeded limit.
    """
    parities: dict[str, Parity] = {}
    for variant in variants:
        notify(f"{variant}: comparing with torch")
        with contextlib.closing(open_variant(bundle, variant)) as engine:
            parities[variant] = measure_parity(engine, samples, reference)
    require_parity(parities)
    return parities


def write_golden(bundle: Bundle, variants: Sequence[Variant]) -> None:
    """Write the input contract and the golden images with the embeddings of each precision."""
    engines = {}
    with contextlib.ExitStack() as opened:
        for variant in variants:
            precision, form = precision_and_form(variant)
            if form == "plain":
                engine = open_variant(bundle, variant)
                engines[precision] = opened.enter_context(contextlib.closing(engine))
        write_contract(bundle.folder, bundle.manifest, engines)


def open_variant(bundle: Bundle, variant: Variant, regions: RegionGrid | None = None) -> Engine:
    """Open a variant with ONNX Runtime on the CPU, to embed whole images or their regions."""
    precision, form = precision_and_form(variant)
    options = EngineOptions(precision=precision, device="cpu")
    request = EngineRequest(bundle, options, form=form, regions=regions)
    return engine_onnxruntime.open_cpu(request)


_CODES_RULE = (
    "mAP@all (plain AP, mean over sketches, equal distances at their expected value) by Hamming "
    "distance, of {images}; ITQ learnt on {sketches:,} sketches and {photos:,} photos of "
    "training classes"
)


def write_codes(
    bundle: Bundle,
    bits: Sequence[int],
    samples: ExportImages,
    ranking: Embeddings,
    notify: Notify,
) -> dict[str, Any]:
    """Fit binary codes of each length, write them into a bundle, and return their metrics.

    ITQ is fitted on the FP32 embeddings of the runtime's own engine, of sketches and photos in
    equal parts, since a code must serve both.

    Args:
        bundle: a bundle with an FP32 model.
        bits: lengths, each at most the embedding's.
        samples: names the files to fit the codes on.
        ranking: torch's embeddings of the images to rank, `(N, D) float32`.
        notify: called with progress messages.

    Returns:
        Metrics for the manifest, by name.

    Raises:
        BadData: too few images can be read.
    """
    counts = {kind: len(files) for kind, files in samples.code_files.items()}
    notify(f"codes: embedding {sum(counts.values()):,} images of training classes")
    rows, read = _embedded(bundle, samples.code_files)
    of = "validation" if samples.ranks_validation else "training"
    images = f"images of {of} classes"
    rule = _CODES_RULE.format(images=images, sketches=read["sketch"], photos=read["photo"])
    metrics: dict[str, Any] = {}
    for length in sorted(set(bits)):
        notify(f"codes: learning {length} bits")
        itq = fit_itq(rows, length)
        write_atomically(bundle.folder / itq_name(length), itq.to_bytes())
        metrics[f"codes_{length}_map"] = {
            "value": mean_average_precision(
                itq.codes(ranking), samples.ranking, distance="hamming", ties="expected"
            ),
            "of_embeddings": mean_average_precision(ranking, samples.ranking, ties="expected"),
            "rule": rule,
        }
    return metrics


def _embedded(
    bundle: Bundle, files: Mapping[Kind, Sequence[Path]]
) -> tuple[Embeddings, dict[Kind, int]]:
    """Return the embeddings of all readable files, and how many of each kind there are."""
    rows: list[Embeddings] = []
    read: dict[Kind, int] = {}
    with Embedder(bundle, engine="onnxruntime", precision="fp32", device="cpu") as embedder:
        for kind, paths in files.items():
            before = len(rows)
            rows += [
                item.row for item in embedder.stream(paths, kind) if isinstance(item, Embedded)
            ]
            read[kind] = len(rows) - before
    if not rows:
        raise BadData("no image for binary codes can be read", "images of training classes")
    return np.stack(rows), read
