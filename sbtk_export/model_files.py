"""The ONNX files of a bundle: which there can be, made from a student, and held to their limits."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from sbtk_export.fp16 import half_trunk_student
from sbtk_export.input_contract import write_contract
from sbtk_export.int8 import quantise
from sbtk_export.int8_tensorrt import quantise_for_tensorrt
from sbtk_export.model_inputs import ModelInputs
from sbtk_export.onnx_from_student import write_onnx
from sbtk_export.parity import Parity, Reference, measure_parity, require_parity
from sbtk_export.pictures import ExportPictures
from sbtk_runtime.bundle import Bundle, OnnxForm, onnx_name
from sbtk_runtime.cpu import cpu_threads
from sbtk_runtime.engines import engine_onnxruntime
from sbtk_runtime.engines.engine_request import EngineRequest, Said
from sbtk_runtime.manifest import Precision
from sbtk_train.students.student import Student

#: What an export can make: a precision, or INT8 as TensorRT takes it. Each is the middle part of
#: its file's name, and its key in the manifest's parity.
Variant = Literal["fp32", "fp16", "int8", "int8.trt"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def precision_and_form(variant: Variant) -> tuple[Precision, OnnxForm]:
    """Returns the precision of a variant, and the form of its ONNX file."""
    return ("int8", "tensorrt") if variant == "int8.trt" else (variant, "plain")


def file_name(variant: Variant) -> str:
    """Returns the name of a variant's ONNX file in every bundle."""
    return onnx_name(*precision_and_form(variant))


def write_models(
    student: Student,
    folder: Path,
    variants: Sequence[Variant],
    calibration: ModelInputs,
    said: Said,
    opset: int | None = None,
) -> None:
    """Writes an ONNX file for each variant into `folder`; `fp32` must be among them."""
    reference = folder / file_name("fp32")
    said("fp32: tracing")
    write_onnx(student, reference, opset)
    if "fp16" in variants:
        said("fp16: tracing with a half-precision trunk")
        write_onnx(half_trunk_student(student), folder / file_name("fp16"), opset)
    if "int8" in variants:
        said(f"int8: calibrating on {len(calibration)} pictures")
        quantise(reference, folder / file_name("int8"), calibration)
    if "int8.trt" in variants:
        said(f"int8 for TensorRT: calibrating on {len(calibration)} pictures")
        quantise_for_tensorrt(reference, folder / file_name("int8.trt"), calibration)


def check_models(
    bundle: Bundle,
    reference: Reference,
    pictures: ExportPictures,
    variants: Sequence[Variant],
    said: Said,
) -> dict[str, Parity]:
    """Returns how far each model is from torch, by variant, run by ONNX Runtime on the CPU.

    That engine is the one that every machine with the extra `cpu` has; GPUs round in their own way.

    Raises:
        BadModel: names each limit that is not kept.
    """
    parities: dict[str, Parity] = {}
    for variant in variants:
        said(f"{variant}: comparing with torch")
        engine = engine_onnxruntime.open_cpu(_request(bundle, variant))
        try:
            parities[variant] = measure_parity(engine, pictures, reference)
        finally:
            engine.close()
    require_parity(parities)
    return parities


def write_golden(bundle: Bundle, variants: Sequence[Variant]) -> None:
    """Writes the input contract and the golden images with the embeddings of each precision."""
    engines = {}
    with contextlib.ExitStack() as opened:
        for variant in variants:
            precision, form = precision_and_form(variant)
            if form == "plain":
                engines[precision] = engine_onnxruntime.open_cpu(_request(bundle, variant))
                opened.callback(engines[precision].close)
        write_contract(bundle.folder, bundle.manifest, engines)


def _request(bundle: Bundle, variant: Variant) -> EngineRequest:
    precision, form = precision_and_form(variant)
    return EngineRequest(bundle, precision, cpu_threads(), lanes=1, device="cpu", form=form)
