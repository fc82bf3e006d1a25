"""Model bundles: folders with a manifest and ONNX files, whose hashes the manifest lists."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.errors import BadModel
from sbtk_runtime.files import printable_name, without_waiting
from sbtk_runtime.manifest import (
    MANIFEST_NAME,
    PRECISIONS,
    BundleManifest,
    FileRecord,
    Precision,
    read_bundle_manifest,
)
from sbtk_runtime.onnx_file import DOMAIN_NAME, MAX_ONNX_BYTES, check_onnx
from sbtk_runtime.preprocess import KINDS, PREPROCESSINGS, SIZE_PX, Kind, Pixels, Preprocessing

#: Files that some program would load; a bundle's manifest must list them.
_LOADABLE_SUFFIXES = frozenset({".onnx", ".safetensors", ".data", ".pth", ".pt", ".npz"})
_ITQ_NAME = re.compile(r"itq([1-9][0-9]{0,4})\.npz")
# What `sbtk train` and `sbtk index` write, to tell their folders from bundles.
_RUN_CONFIG, _RUN_STATE, _STUDENT = (
    "config.resolved.toml",
    "last.safetensors",
    "student.safetensors",
)
_CATALOGUE = "catalogue.sqlite"
_LIST = "sbtk models lists bundles"
_GET_AGAIN = "get the bundle again, or export the run again"

#: The engines that an ONNX file is for. Only INT8 files differ: TensorRT supports neither unsigned
#: activations nor quantised biases, with which ONNX Runtime and OpenVINO are faster and more exact.
OnnxForm = Literal["plain", "tensorrt"]


@dataclass(frozen=True)
class Bundle:
    """A model bundle: its folder and its checked manifest. The model itself is not loaded.

    >>> bundle = Bundle.open()
    >>> bundle.manifest.dim, bundle.precisions
    (512, ('fp16', 'int8'))
    """

    folder: Path
    manifest: BundleManifest

    @classmethod
    def open(cls, where: str | Path | None = None) -> Self:
        """Return the bundle in a folder, the bundle with a name, or the included one.

        Args:
            where: a folder, or a name in `list_bundles`. Names of included bundles win over folders
                of the same name: write `./name` for the folder. `None` for the newest included one.

        Raises:
            BadModel: there is none, its manifest is not valid, or it needs other preprocessing.
        """
        folder = _default_folder() if where is None else _folder_of(where)
        _refuse_other_folders(folder)
        manifest = read_bundle_manifest(folder)
        if manifest.preprocessing not in PREPROCESSINGS:
            raise BadModel(
                f"{folder} was trained with preprocessing {manifest.preprocessing!r}",
                f"{' or '.join(map(repr, PREPROCESSINGS))}, those of this version of sbtk",
                "use the version of sbtk that made the bundle, or export the run again",
            )
        if manifest.domain_input not in (None, DOMAIN_NAME):
            raise BadModel(
                f"the model in {folder} has an input {manifest.domain_input!r}",
                f"{DOMAIN_NAME!r}, or no second input",
                "use the version of sbtk that made the bundle, or export the run again",
            )
        bundle = cls(folder, manifest)
        if not bundle.precisions:
            raise BadModel(
                f"{folder} has no model",
                " or ".join(onnx_name(precision) for precision in PRECISIONS),
                "sbtk export",
            )
        return bundle

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the model's input."""
        return PREPROCESSINGS[self.manifest.preprocessing]

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions of the bundle's ONNX files."""
        return self.precisions_of("plain")

    def precisions_of(self, form: OnnxForm) -> tuple[Precision, ...]:
        """Return the precisions of the bundle's ONNX files of a form."""
        return tuple(p for p in PRECISIONS if onnx_name(p, form) in self.manifest.files)

    def onnx_path(self, precision: Precision, form: OnnxForm = "plain") -> Path:
        """Return the path of the ONNX file of a precision.

        Raises:
            BadModel: the bundle has no file of that precision and form.
        """
        available = self.precisions_of(form)
        if precision not in available:
            engine = " for TensorRT" if form == "tensorrt" else ""
            option = "--int8-trt" if precision == "int8" and engine else f"--{precision}"
            raise BadModel(
                f"{self.folder} has no {precision} model{engine}",
                f"--precision {' or '.join(available)}" if available else "",
                f"make one with sbtk export RUN {option}",
            )
        return self.folder / onnx_name(precision, form)

    def verify_onnx(self, precision: Precision, form: OnnxForm = "plain") -> Path:
        """Return the path of a precision's ONNX file, after checking its content.

        Raises:
            BadModel: it is missing, does not match the manifest, or names external data.
        """
        path = self.onnx_path(precision, form)
        self.read_onnx(precision, form)
        return path

    def read_onnx(self, precision: Precision, form: OnnxForm = "plain") -> bytes:
        """Return the content of a precision's ONNX file, after checking it.

        Raises:
            BadModel: as `verify_onnx`.
        """
        path = self.onnx_path(precision, form)
        content = _read_verified(path, self.manifest.files[path.name])
        check_onnx(content, str(path))
        return content

    def content(self, name: str) -> bytes:
        """Return the content of a file of the bundle, after checking its hash.

        Raises:
            BadModel: the manifest does not list the file, or the file does not match it.
        """
        if name not in self.manifest.files:
            raise BadModel(
                f"{self.folder} has no {name}", "a file that its manifest lists", _GET_AGAIN
            )
        return _read_verified(self.folder / name, self.manifest.files[name])

    @property
    def bits(self) -> tuple[int, ...]:
        """The lengths of binary codes that the bundle can make, ascending."""
        return code_lengths(self.manifest)

    def itq(self, bits: int) -> Itq:
        """Return the ITQ that turns the model's embeddings into codes of `bits` bits.

        Raises:
            BadModel: the bundle has none of that length, or its file is damaged.
        """
        if bits not in self.bits:
            available = " or ".join(f"--bits {known}" for known in self.bits)
            raise BadModel(
                f"{self.folder} has no {bits}-bit codes",
                available or f"a bundle with {itq_name(bits)}",
                f"export the run with codes: sbtk export RUN --bits {bits}",
            )
        name = itq_name(bits)
        itq = Itq.from_bytes(
            _read_verified(self.folder / name, self.manifest.files[name]), str(self.folder / name)
        )
        if (itq.dim, itq.bits) != (self.manifest.dim, bits):
            raise BadModel(
                f"{self.folder / name} makes {itq.bits} bits of {itq.dim} dimensions",
                f"{bits} bits of {self.manifest.dim} dimensions",
                _GET_AGAIN,
            )
        return itq

    def verify(self) -> None:
        """Check size and SHA-256 of all files, and that the manifest lists all loadable files.

        Raises:
            BadModel: names the first file that does not match the manifest.
        """
        for name, record in sorted(self.manifest.files.items()):
            content = _read_verified(self.folder / name, record)
            if name.endswith(".onnx"):
                check_onnx(content, str(self.folder / name))
        for bits in self.bits:
            self.itq(bits)
        for path in sorted(self.folder.iterdir()):
            known = path.name in self.manifest.files or path.name == MANIFEST_NAME
            if not known and path.suffix.lower() in _LOADABLE_SUFFIXES:
                raise BadModel(
                    f"{path} is not in the bundle's manifest",
                    "only files that the manifest lists",
                    f"remove it: rm {path}",
                )


def onnx_name(precision: Precision, form: OnnxForm = "plain") -> str:
    """Return the file name of a precision's ONNX file."""
    if form == "tensorrt" and precision == "int8":
        return "model.int8.trt.onnx"
    return f"model.{precision}.onnx"


def code_lengths(manifest: BundleManifest) -> tuple[int, ...]:
    """Return the lengths of binary codes that a bundle has files for, ascending."""
    names = (_ITQ_NAME.fullmatch(name) for name in manifest.files)
    return tuple(sorted(int(match.group(1)) for match in names if match))


def itq_name(bits: int) -> str:
    """Return the name of the file with the ITQ for codes of `bits` bits."""
    return f"itq{bits}.npz"


def pretrained_folder() -> Path:
    """Return the folder of the included bundles."""
    return Path(__file__).parent / "pretrained"


def bundle_folders() -> list[Path]:
    """Return the folders with a manifest: the included ones, then those in `./bundles`."""
    return [
        path.parent
        for root in (pretrained_folder(), Path("bundles"))
        for path in sorted(root.glob(f"*/{MANIFEST_NAME}"))
    ]


def list_bundles() -> list[Bundle]:
    """Return the bundles in `bundle_folders` that can be opened, in that order."""
    bundles = []
    for folder in bundle_folders():
        try:
            # An absolute path never names an included bundle.
            bundles.append(Bundle.open(folder.absolute()))
        except BadModel:
            continue
    return bundles


def _default_folder() -> Path:
    """Return the newest included bundle."""
    found = [path.parent for path in sorted(pretrained_folder().glob(f"*/{MANIFEST_NAME}"))]
    if not found:
        raise BadModel(
            "this installation of sbtk includes no model",
            f"a bundle in {pretrained_folder()}",
            "make one with sbtk train and sbtk export, then name it: --model BUNDLE",
        )
    if len(found) == 1:
        return found[0]
    return max(found, key=lambda folder: read_bundle_manifest(folder).created)


def _refuse_other_folders(folder: Path) -> None:
    """Refuse training runs and galleries, and name the command that makes a bundle of a run.

    Raises:
        BadModel: the folder is a run, contains runs, or is a gallery.
    """
    shown = shlex.quote(printable_name(folder))
    expected = f"a model bundle: a folder with a {MANIFEST_NAME} and model.*.onnx"
    if (folder / MANIFEST_NAME).exists():
        if (folder / _CATALOGUE).exists():
            raise BadModel(
                f"{printable_name(folder)} is a gallery, not a model bundle", expected, _LIST
            )
        return
    if _is_run(folder):
        if not (folder / _STUDENT).is_file():
            raise BadModel(
                f"{printable_name(folder)} is a training run that has no student yet",
                expected,
                f"finish it, then export it: sbtk train --resume {shown} && sbtk export {shown}",
            )
        name = folder.absolute().name
        raise BadModel(
            f"{printable_name(folder)} is a training run, not a model bundle",
            expected,
            f"export it first: sbtk export {shown}, then name bundles/{printable_name(name)}",
        )
    runs = sorted(path.parent for path in folder.glob(f"*/{_RUN_CONFIG}"))
    if runs:
        first = shlex.quote(printable_name(runs[0]))
        raise BadModel(
            f"{printable_name(folder)} contains training runs; it is not a model bundle",
            expected,
            f"export one of them first: sbtk export {first}",
        )


def is_run_folder(path: Path) -> bool:
    """Return whether a folder is a training run rather than a model bundle."""
    return not (path / MANIFEST_NAME).exists() and _is_run(path)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_RUN_CONFIG, _RUN_STATE))


def _folder_of(where: str | Path) -> Path:
    path = Path(where)
    if str(where) == path.name:
        named = [folder for folder in bundle_folders() if folder.name == path.name]
        if named:
            return named[0]
    if path.is_dir():
        return path
    shown = printable_name(path)
    found = f"{shown} is a file" if path.exists() else f"there is no bundle {shown!r}"
    names = ", ".join(folder.name for folder in bundle_folders()) or "none here"
    next_step = _LIST
    if path.is_file() and path.parent.is_dir():
        if (path.parent / MANIFEST_NAME).exists():
            next_step = f"name its folder: {shlex.quote(printable_name(path.parent))}"
        elif _is_run(path.parent):
            next_step = f"export the run: sbtk export {shlex.quote(printable_name(path.parent))}"
    elif str(where) == path.name and _is_run(Path("runs") / path.name):
        next_step = f"export the run first: sbtk export {shlex.quote(f'runs/{shown}')}"
    raise BadModel(found, f"a folder with a {MANIFEST_NAME}, or one of: {names}", next_step)


def _read_verified(path: Path, record: FileRecord) -> bytes:
    """Return the content of a regular file that has the size and SHA-256 of `record`."""
    try:
        with open(path, "rb", opener=without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadModel(f"{path} is not a regular file")
            if status.st_size != record.size_bytes or status.st_size > MAX_ONNX_BYTES:
                raise BadModel(
                    f"{path} has {status.st_size:,} bytes",
                    f"{record.size_bytes:,} bytes, at most {MAX_ONNX_BYTES:,}",
                    _GET_AGAIN,
                )
            content = file.read()
    except OSError as problem:
        raise BadModel(f"{path} cannot be read: {problem.strerror}", "", _GET_AGAIN) from problem
    digest = hashlib.sha256(content).hexdigest()
    if digest != record.sha256:
        raise BadModel(
            f"{path} is damaged or was changed: its SHA-256 is {digest}",
            f"{record.sha256}, as in the manifest",
            _GET_AGAIN,
        )
    return content


#: The file of golden embeddings, by kind and precision.
GOLDEN_NAME = "golden.json"
#: The smallest cosine to a golden embedding. Engines round INT8 differently.
LEAST_COSINE: dict[Precision, float] = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.97}


@dataclass(frozen=True)
class Golden:
    """A reference image, with its pixels and embeddings.

    Attributes:
        kind: what it is prepared as.
        image: the bytes of the image file.
        pixels: `(224, 224, 3) uint8` RGB, the prepared image.
        embeddings: by precision, `(D,) float32` of length 1, by ONNX Runtime on a CPU.
    """

    kind: Kind
    image: bytes
    pixels: Pixels
    embeddings: dict[Precision, NDArray[np.float32]]


def image_name(kind: Kind) -> str:
    """Return the file name of the golden image of a kind."""
    return f"golden.{kind}.png"


def pixels_name(kind: Kind) -> str:
    """Return the file name of the pixels of a golden image, a PNG of 224 x 224."""
    return f"golden.{kind}.pixels.png"


def read_golden(bundle: Bundle) -> tuple[Golden, ...]:
    """Return the golden images of a bundle; older bundles have none.

    Raises:
        BadModel: one of their files is damaged.
    """
    if GOLDEN_NAME not in bundle.manifest.files:
        return ()
    try:
        tables = json.loads(bundle.content(GOLDEN_NAME))
        return tuple(
            Golden(
                kind,
                bundle.content(image_name(kind)),
                _pixels_from_png(bundle.content(pixels_name(kind))),
                {
                    precision: np.array(row, dtype=np.float32)
                    for precision, row in tables[kind]["embeddings"].items()
                    if precision in LEAST_COSINE
                },
            )
            for kind in KINDS
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        raise BadModel(
            f"{bundle.folder / GOLDEN_NAME} is damaged ({problem})",
            "golden images as sbtk export writes them",
            "get the bundle again, or export the run again",
        ) from problem


def require_golden_pixels(golden: Golden, preprocessing: Preprocessing) -> None:
    """Check that this installation prepares a golden image as its bundle expects.

    Raises:
        BadModel: the pixels differ by more than 1.
    """
    found = preprocessing.prepare(golden.image, golden.kind).pixels
    largest = int(np.abs(found.astype(np.int16) - golden.pixels.astype(np.int16)).max())
    # Versions of Pillow may round differently, by 1.
    if largest > 1:
        raise BadModel(
            f"the golden {golden.kind} is prepared differently: pixels differ by up to {largest}",
            "the golden pixels of the bundle",
            "use the library versions in the bundle's model card",
        )


def require_golden_embedding(
    golden: Golden, precision: Precision, row: NDArray[np.float32]
) -> float | None:
    """Compare a model's embedding of golden pixels with the golden embedding.

    Args:
        golden: the image.
        precision: of the model.
        row: `(D,) float32` of length 1.

    Returns:
        The cosine of the two; `None` if the bundle has no golden embedding of that precision.

    Raises:
        BadModel: the cosine is too small.
    """
    expected = golden.embeddings.get(precision)
    if expected is None:
        return None
    cosine = float(expected @ row) if expected.shape == row.shape else float("nan")
    if not cosine >= LEAST_COSINE[precision]:
        raise BadModel(
            f"the {precision} model embeds the golden {golden.kind} differently: cosine "
            f"{cosine:.4f}",
            f"{LEAST_COSINE[precision]} or more",
            "try --engine onnxruntime, or get the bundle again",
        )
    return cosine


def png_from_pixels(pixels: Pixels) -> bytes:
    """Return a PNG file of `(H, W, 3) uint8` RGB pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _pixels_from_png(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.size != (SIZE_PX, SIZE_PX):
            raise ValueError(f"pixels of {image.size[0]} x {image.size[1]}")
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
