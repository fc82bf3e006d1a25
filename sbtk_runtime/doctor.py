"""Checks what this machine can run; each finding says what to type to improve it."""

from __future__ import annotations

import platform
import re
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from PIL import features

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.registry import EngineReport, open_engine, probe_engines
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.files import printable_name
from sbtk_runtime.machine import Machine, cpu_flags, cpu_threads, extras, this_machine
from sbtk_runtime.manifest import MANIFEST_NAME, GalleryManifest, read_gallery_manifest

Level = Literal["ok", "note", "problem"]

#: The extra that only developers install.
_DEVELOPERS = "dev"

# The best comes first. The first names are those in Linux's /proc/cpuinfo.
_INT8_INSTRUCTIONS = (
    ("amx_int8", "AMX"),
    ("avx512_vnni", "AVX-512 VNNI"),
    ("avx_vnni", "AVX VNNI"),
    ("i8mm", "Arm I8MM"),
    ("asimddp", "Arm dot product"),
)


@dataclass(frozen=True)
class Finding:
    """The result of one check; `next_step` is the command to type, where one helps."""

    topic: str
    level: Level
    text: str
    next_step: str = ""


@dataclass(frozen=True)
class Examination:
    """What `examine` found.

    Attributes:
        machine: processor, memory and versions.
        engines: all engines, in the order in which `auto` tries them.
        engine: the engine that `auto` takes; `None` if none works.
        findings: in the order in which they are shown.
    """

    machine: Machine
    engines: tuple[EngineReport, ...]
    engine: str | None
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object."""
        return asdict(self)


def examine(gallery: Path, model: str | None = None) -> Examination:
    """Return what this machine can run, and the state of the model and the gallery.

    Problems with either become findings; none is raised.
    """
    machine = this_machine()
    engines = tuple(probe_engines())
    bundle, model_finding = _model(model)
    taken = _automatic(engines)
    findings = [
        _processor(machine),
        _system(machine),
        _int8(cpu_flags()),
        _gpu(gpu_names()),
        *(_engine(report) for report in engines),
        *_double_onnxruntime(installed_onnxruntimes()),
        _auto(engines, bundle),
        model_finding,
        _gallery(gallery, bundle),
        _photos(),
        _extras(),
    ]
    return Examination(machine, engines, taken.name if taken else None, tuple(findings))


def gpu_names(driver: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Return the models of the NVIDIA GPUs that the driver lists."""
    names = []
    for path in sorted(driver.glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", path.read_text(errors="replace"), re.MULTILINE)
        names.append(match.group(1).strip() if match else "unnamed GPU")
    return names


def installed_onnxruntimes() -> list[str]:
    """Return the installed distributions of the module `onnxruntime`, with their versions."""
    found = {
        f"{name} {distribution.version}"
        for distribution in metadata.distributions()
        if (name := (distribution.metadata["Name"] or "").lower()).startswith("onnxruntime")
        and name not in ("onnxruntime-extensions", "onnxruntime-tools", "onnxruntime-genai")
    }
    return sorted(found)


def installed_extras() -> dict[str, bool]:
    """Return for each extra for users whether all of its distributions are installed."""
    return {
        extra: all(map(_is_installed, names))
        for extra, names in extras().items()
        if extra != _DEVELOPERS
    }


def _processor(machine: Machine) -> Finding:
    cores = f"{machine.cores} core{'' if machine.cores == 1 else 's'}"
    if machine.cores != machine.cores_total:
        cores += f" of {machine.cores_total}"
    text = (
        f"{machine.cpu}, {cores}, {machine.memory_bytes / 2**30:.1f} GiB memory, "
        f"{machine.system}, Python {machine.python}"
    )
    threads = cpu_threads()
    if threads < machine.cores:
        text += f"; a container's quota allows {threads} threads"
    return Finding("machine", "ok", text)


def _system(machine: Machine) -> Finding:
    """Return the systems that sbtk supports; importing it fails on others."""
    name = "WSL" if "microsoft" in platform.release().lower() else machine.system.split()[0]
    return Finding("system", "ok", f"{name}: sbtk runs on Linux, on macOS, and on Windows in WSL")


def _int8(flags: frozenset[str]) -> Finding:
    names = [name for flag, name in _INT8_INSTRUCTIONS if flag in flags]
    if names:
        return Finding("int8", "ok", f"{names[0]}: the processor has instructions for INT8")
    if not flags:
        return Finding("int8", "note", f"unknown instruction sets ({platform.machine()})")
    best = next((flag for flag in ("avx512bw", "avx2", "asimd") if flag in flags), "no SIMD")
    return Finding(
        "int8",
        "note",
        f"no instructions for INT8 (best: {best}): INT8 works, but gains less over FP32",
        "sbtk bench latency",
    )


def _gpu(names: list[str]) -> Finding:
    if not names:
        return Finding("gpu", "ok", "no NVIDIA GPU: models run on the CPU")
    installed = installed_extras()
    is_there = any(installed.get(extra) for extra in ("tensorrt", "tensorrt-rtx", "gpu"))
    next_step = (
        ""
        if is_there
        else 'pip install "sbtk[tensorrt]", '
        'or pip uninstall -y onnxruntime && pip install "sbtk[gpu]"'
    )
    return Finding("gpu", "ok" if is_there else "note", ", ".join(names), next_step)


def _engine(report: EngineReport) -> Finding:
    version = f" {report.version}" if report.version else ""
    if report.works:
        return Finding("engine", "ok", f"{report.name}{version} works")
    return Finding("engine", "note", f"{report.name}{version}: {report.reason}")


def _double_onnxruntime(installed: list[str]) -> list[Finding]:
    if len(installed) < 2:
        return []
    names = " ".join(name.split()[0] for name in installed)
    return [
        Finding(
            "engine",
            "problem",
            f"{' and '.join(installed)} are both installed and overwrite each other's files",
            f'pip uninstall -y {names} && pip install "sbtk[cpu]"   (or "sbtk[gpu]")',
        )
    ]


def _auto(engines: tuple[EngineReport, ...], bundle: Bundle | None) -> Finding:
    """Return which engine `auto` takes; if there is a model, the engine runs a test image."""
    taken = _automatic(engines)
    if taken is None:
        return Finding("auto", "problem", "no engine works", 'pip install "sbtk[cpu]"')
    before = [engine.name for engine in engines[: engines.index(taken)]]
    why = f"; not {' or '.join(before)}, see above" if before else ""
    if bundle is None:
        return Finding(
            "auto", "note", f"takes {taken.name}; not tested, because there is no model{why}"
        )
    try:
        engine = open_engine(bundle)
    except SbtkError as problem:
        return Finding("auto", "problem", f"{taken.name}: {problem.found}", problem.next_step)
    info = engine.info
    engine.close()
    threads = f"{info.threads} thread{'' if info.threads == 1 else 's'}"
    text = f"takes {info.name}, {info.precision}, {threads}; it ran a test image"
    return Finding("auto", "ok", text + why)


def _automatic(engines: tuple[EngineReport, ...]) -> EngineReport | None:
    return next((engine for engine in engines if engine.works), None)


def _model(model: str | None) -> tuple[Bundle | None, Finding]:
    try:
        bundle = Bundle.open(model)
    except SbtkError as problem:
        return None, Finding("model", "problem", problem.found, problem.next_step)
    manifest = bundle.manifest
    try:
        bundle.verify()
    except SbtkError as problem:
        return None, Finding("model", "problem", problem.found, problem.next_step)
    precisions = ", ".join(bundle.precisions)
    text = f"{manifest.model_id} ({precisions}; {manifest.dim} dimensions): all files are intact"
    return bundle, Finding("model", "ok", text)


def _gallery(folder: Path, bundle: Bundle | None) -> Finding:
    shown = printable_name(folder)
    if not (folder / MANIFEST_NAME).exists():
        return Finding(
            "gallery", "note", f"none in {shown} yet", f"sbtk index PHOTOS --gallery {shown}"
        )
    try:
        manifest = read_gallery_manifest(folder)
    except SbtkError as problem:
        return Finding("gallery", "problem", problem.found, problem.next_step)
    codes = "" if manifest.bits is None else f" as {manifest.bits}-bit codes"
    text = f"{shown}: {manifest.live:,} photos searchable{codes}, made by {manifest.model_id}"
    if missing := _missing(folder, manifest):
        text += f"; {missing} is missing and will be rebuilt"
        return Finding("gallery", "note", text, f"sbtk index --gallery {shown} --verify")
    if bundle is not None and bundle.manifest.model_id != manifest.model_id:
        return Finding("gallery", "note", f"{text}, not the model above")
    return Finding("gallery", "ok", text)


def _missing(folder: Path, manifest: GalleryManifest) -> str | None:
    """Return the first file that can be rebuilt and is not there."""
    names = [] if manifest.graph is None else [manifest.graph.file]
    if manifest.codes is not None:
        names += [f"{manifest.codes.folder}/{name}" for name in manifest.codes.files]
    return next((name for name in names if not (folder / name).is_file()), None)


def _photos() -> Finding:
    readers = {"HEIC": "pillow-heif", "camera RAW": "rawpy"}
    lack = [name for name, distribution in readers.items() if not _is_installed(distribution)]
    if not features.check("avif"):
        return Finding(
            "photos",
            "note",
            "this build of Pillow cannot read AVIF",
            "pip install --force-reinstall pillow",
        )
    if lack:
        text = f"{' and '.join(lack)} cannot be read: such photos are skipped and counted"
        return Finding("photos", "note", text, 'pip install "sbtk[photos]"')
    return Finding(
        "photos", "ok", "HEIC and camera RAW can be read, as can JPEG, PNG, AVIF and others"
    )


def _extras() -> Finding:
    installed = installed_extras()
    have = ", ".join(extra for extra, is_there in installed.items() if is_there) or "none"
    lack = ", ".join(extra for extra, is_there in installed.items() if not is_there)
    text = f"installed: {have}" + (f"; not installed: {lack}" if lack else "")
    return Finding("extras", "ok", text)


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
