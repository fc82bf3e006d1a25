"""A tiny model with a feature map of 7 x 7 cells, whose windows can be pooled, made from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Embedded, Failed, Known
from sbtk_runtime.preprocess import DOMAINS, Kind
from sbtk_runtime.regions import RegionGrid
from tests.tiny import make_model, write_tiny_manifest

_CELL_PX = 32
_CHANNELS = 24


def tiny_map_bundle(folder: Path, dim: int = 16, *, has_domain: bool = False) -> Path:
    """Return `folder` holding a bundle of `tiny_map_model`, in two precisions that are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    content = tiny_map_model(dim, has_domain=has_domain).SerializeToString()
    for precision in ("fp32", "int8"):
        (folder / f"model.{precision}.onnx").write_bytes(content)
    write_tiny_manifest(folder, dim, "tinymap", "domain" if has_domain else None)
    return folder


def embed_photos(
    embedder: Embedder, paths: Sequence[Path], grid: RegionGrid
) -> list[Embedded | Failed | Known]:
    """Return what becomes of photos that are embedded with their regions."""
    with embedder.open_stream(grid) as stream:
        return list(stream.embed(paths, "photo"))


def tiny_map_model(dim: int = 16, *, has_domain: bool = False) -> onnx.ModelProto:
    """Return a model that ends as those of sbtk export do: mean over the map, head, norm.

    With the input `domain (N,) float32`, it is added to every channel of the map.
    """
    constants = _constants(dim)
    nodes = [
        helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["planes", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "filters"], ["cells"], strides=[_CELL_PX, _CELL_PX]),
        helper.make_node("Relu", ["cells"], ["map"]),
        helper.make_node("ReduceMean", ["map", "axes"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "weights", "bias"], ["linear"], transB=1),
        helper.make_node("ReduceL2", ["linear", "last"], ["length"], keepdims=1),
        helper.make_node("Div", ["linear", "length"], ["embeddings"]),
    ]
    if has_domain:
        constants["later"] = np.array([1, 2, 3])
        nodes[4].input[0] = "told"
        nodes[4:4] = [
            helper.make_node("Unsqueeze", ["domain", "later"], ["planes_of_domain"]),
            helper.make_node("Add", ["cells", "planes_of_domain"], ["told"]),
        ]
    return make_model("tiny map", nodes, constants, dim, has_domain=has_domain)


def map_by_numpy(
    images: NDArray[np.uint8], kind: Kind | None = None, dim: int = 16
) -> NDArray[np.float64]:
    """Return the map `(N, 24, H, W)` of `images (N, S, S, 3) uint8`; `kind` if it has a domain."""
    filters = _constants(dim)["filters"].astype(np.float64)
    cells = images.shape[1] // _CELL_PX
    parts = images.reshape(len(images), cells, _CELL_PX, cells, _CELL_PX, 3) / 255.0
    values = np.einsum("nhywxc,fcyx->nfhw", parts, filters)
    told = values + (0.0 if kind is None else DOMAINS[kind])
    return np.asarray(np.maximum(told, 0.0))


def head_by_numpy(pooled: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the unit rows `(N, 16)` of pooled features `(N, 24)`."""
    constants = _constants(16)
    rows = pooled @ constants["weights"].T.astype(np.float64) + constants["bias"].astype(float)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _constants(dim: int) -> dict[str, NDArray[np.generic]]:
    random = np.random.default_rng(0)
    # Each filter answers to one direction of colour, evenly over a cell.
    colours = random.standard_normal((_CHANNELS, 3, 1, 1)) / _CELL_PX**2
    weights = random.standard_normal((dim, _CHANNELS))
    grey = 0.5 * _CELL_PX**2 * colours.sum(axis=(1, 2, 3))
    return {
        "scale": np.array(1 / 255.0, np.float32),
        "filters": np.broadcast_to(colours, (_CHANNELS, 3, _CELL_PX, _CELL_PX)).astype(np.float32),
        "axes": np.array([2, 3]),
        "weights": weights.astype(np.float32),
        # Grey has a short row before the norm, so that colours differ much after it.
        "bias": (0.05 - weights @ np.maximum(grey, 0.0)).astype(np.float32),
        "last": np.array([1]),
    }
