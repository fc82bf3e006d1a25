"""Small inputs for tests: a valid model bundle, photos and sketches, made from seeds."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from sbtk_runtime.files import sha256_of_file
from sbtk_runtime.manifest import BundleManifest, FileRecord
from sbtk_runtime.preprocess import PREPROCESSING

_CELL_PX = 28
_CELLS = 8 * 8 * 3


def tiny_bundle(
    folder: Path, dim: int = 16, seed: int = 0, name: str = "tiny", *, has_domain: bool = False
) -> Path:
    """Return `folder` holding a valid bundle whose model looks at 8 x 8 coloured cells.

    Both precisions hold the same graph, so they give the same embeddings. Other seeds give
    other models, with other model ids. With a domain input, sketches and photos of the same
    pixels have other embeddings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = tiny_model(dim, seed, has_domain=has_domain).SerializeToString()
    for precision in ("fp32", "int8"):
        (folder / f"model.{precision}.onnx").write_bytes(content)
    write_tiny_manifest(folder, dim=dim, name=name, domain_input="domain" if has_domain else None)
    return folder


def write_tiny_manifest(
    folder: Path, dim: int = 16, name: str = "tiny", domain_input: str | None = None
) -> BundleManifest:
    """Write, and return, a manifest that vouches for every ONNX file that is in `folder`."""
    files = {
        path.name: FileRecord(sha256_of_file(path), path.stat().st_size)
        for path in sorted(folder.glob("*.onnx"))
    }
    joined = "".join(record.sha256 for record in files.values())
    manifest = BundleManifest(
        name=name,
        model_id=f"{name}@{hashlib.sha256(joined.encode()).hexdigest()[:12]}",
        method="sbtknet",
        backbone="resnet50-v1",
        dim=dim,
        preprocessing=PREPROCESSING,
        files=files,
        domain_input=domain_input,
        training={"data": "none: random weights"},
        created=datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC).isoformat(),
    )
    manifest.write(folder)
    return manifest


def tiny_model(
    dim: int = 16, seed: int = 0, *, bias: float = 0.05, has_domain: bool = False
) -> onnx.ModelProto:
    """Return the tiny model: uint8 `images (N, 224, 224, 3)` to unit rows `embeddings (N, dim)`.

    With a bias of 0 the image (128, 128, 128) has the zero row as its embedding. With the input
    `domain (N,) float32`, it is added to the first feature once, to the second twice, and so on.
    """
    random = np.random.default_rng(seed)
    weights = random.standard_normal((dim, _CELLS)).astype(np.float32)
    constants = {
        "middle": np.float32(128.0),
        "scale": np.float32(1 / 128.0),
        "weights": weights,
        "bias": np.full(dim, bias, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "middle"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["scaled"]),
        helper.make_node(
            "AveragePool",
            ["scaled"],
            ["cells"],
            kernel_shape=[_CELL_PX, _CELL_PX],
            strides=[_CELL_PX, _CELL_PX],
        ),
        helper.make_node("Flatten", ["cells"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["feature"], transB=1),
        helper.make_node("LpNormalization", ["feature"], ["embeddings"], axis=1, p=2),
    ]
    if has_domain:
        constants["shift"] = np.arange(1, dim + 1, dtype=np.float32)
        constants["columns"] = np.array([1])
        nodes[-1].input[0] = "shifted"
        nodes[-1:-1] = [
            helper.make_node("Unsqueeze", ["domain", "columns"], ["column"]),
            helper.make_node("Mul", ["column", "shift"], ["shifts"]),
            helper.make_node("Add", ["feature", "shifts"], ["shifted"]),
        ]
    return make_model("tiny", nodes, constants, dim, has_domain=has_domain)


def make_model(
    name: str,
    nodes: list[onnx.NodeProto],
    constants: Mapping[str, Any],
    dim: int,
    *,
    has_domain: bool,
) -> onnx.ModelProto:
    """Return a model from `images (N, 224, 224, 3) uint8` to `embeddings (N, dim) float32`."""
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 224, 224, 3])]
    if has_domain:
        inputs.append(helper.make_tensor_value_info("domain", TensorProto.FLOAT, ["batch"]))
    output = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", dim])
    tensors = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    # Old enough for every ONNX Runtime that the extra `cpu` admits.
    model.ir_version = 9
    onnx.checker.check_model(model)
    return model


def write_photos(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Return `count` distinct images of gradients and shapes, JPEG and PNG by turns."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        path = folder / f"photo-{index:04d}{'.jpg' if index % 2 == 0 else '.png'}"
        tiny_photo(seed * 100_003 + index).save(path)
        paths.append(path)
    return paths


def tiny_photo(seed: int) -> Image.Image:
    """Return an RGB image of some 160 x 120 pixels that no other seed gives."""
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers((120, 90), (200, 150)))
    corners = random.integers(0, 256, size=(2, 2, 3)).astype(np.uint8)
    image = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        _shape(draw, random, (width, height), tuple(int(c) for c in random.integers(0, 256, 3)))
    return image


def write_sketch(path: Path, seed: int = 0) -> Path:
    """Return `path` holding a sketch: dark outlines on white, 256 x 256 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny_sketch(seed).save(path)
    return path


def tiny_sketch(seed: int) -> Image.Image:
    """Return a grey image of dark outlines on white."""
    random = np.random.default_rng(seed)
    image = Image.new("L", (256, 256), 255)
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        _shape(draw, random, image.size, None)
    return image


def _shape(
    draw: ImageDraw.ImageDraw,
    random: np.random.Generator,
    size: tuple[int, int],
    fill: tuple[int, ...] | None,
) -> None:
    """Draw one random ellipse, box or triangle; an outline when there is no fill."""
    low, high = random.uniform(0.05, 0.45, 2), random.uniform(0.55, 0.95, 2)
    left, top, right, bottom = (
        int(share * side) for share, side in zip((*low, *high), (*size, *size), strict=True)
    )
    outline = 0 if fill is None else None
    kind = int(random.integers(3))
    if kind == 0:
        draw.ellipse((left, top, right, bottom), fill=fill, outline=outline, width=4)
    elif kind == 1:
        draw.rectangle((left, top, right, bottom), fill=fill, outline=outline, width=4)
    else:
        corners = [(left, bottom), ((left + right) // 2, top), (right, bottom)]
        draw.polygon(corners, fill=fill, outline=outline, width=4)
