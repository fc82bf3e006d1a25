"""What ONNX Runtime's TensorRT provider needs: its library, its options, and a cache of engines.

No precision is named among the options: without one, TensorRT takes that of the ONNX file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbtk_runtime.engines.cuda_device import CudaDevice
from sbtk_runtime.engines.engine_request import EngineRequest
from sbtk_runtime.engines.onnxruntime_library import TENSORRT
from sbtk_runtime.engines.plan_cache import cache_folder
from sbtk_runtime.engines.tensorrt_library import find_tensorrt
from sbtk_runtime.errors import BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.files import read_json_object, sha256_of_file, write_json_atomically
from sbtk_runtime.onnx_file import INPUT_NAME
from sbtk_runtime.preprocess import SIZE_PX

#: Makes a session tell which provider runs which node, for `check_assignment`.
SESSION_ENTRIES = {"session.record_ep_graph_assignment_info": "1"}

_WORKSPACE_BYTES = 4 << 30
_RECORD = "vouched.json"
_INSTALL = 'pip install "sbtk[gpu,tensorrt]" "tensorrt-cu13<11"'

# TensorRT may leave the conversion of uint8 to whoever has the image first.
_LEFT_TO_OTHERS = frozenset({"Cast"})


@dataclass(frozen=True)
class EngineCache:
    """A folder where the provider keeps what it built for one model, batch and library.

    The provider runs whatever lies there under the right name, so the folder is the user's own
    and holds nothing but what `vouch` has recorded.
    """

    folder: Path

    @property
    def is_empty(self) -> bool:
        """Whether an engine has still to be built."""
        return not (self.folder / _RECORD).exists()

    def vouch(self) -> None:
        """Records what the provider has just written and run; a full disk is no reason to fail."""
        names = sorted(path.name for path in self.folder.iterdir() if path.name != _RECORD)
        with contextlib.suppress(OSError):
            hashes = {name: sha256_of_file(self.folder / name) for name in names}
            write_json_atomically(self.folder / _RECORD, hashes)

    def remove_strangers(self) -> bool:
        """Empties the folder unless every file is what was recorded; returns whether it did."""
        paths = [path for path in self.folder.iterdir() if path.name != _RECORD]
        if not paths or self._is_as_recorded(paths):
            return False
        for path in [*paths, self.folder / _RECORD]:
            path.unlink(missing_ok=True)
        return True

    def _is_as_recorded(self, paths: list[Path]) -> bool:
        if not all(map(_is_own_file, [*paths, self.folder / _RECORD])):
            return False
        try:
            recorded = read_json_object(self.folder / _RECORD, BadModel)
        except BadModel:
            return False
        return recorded == {path.name: sha256_of_file(path) for path in paths}


def load_tensorrt(runtime: Any) -> str:
    """Loads the TensorRT that the provider is linked with, and returns its library's name.

    Raises:
        EngineUnavailable: it cannot be loaded.
    """
    provider = Path(runtime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    try:
        linked = re.search(rb"libnvinfer\.so\.\d+", provider.read_bytes())
    except OSError:
        return ""  # Windows, where the session says what is missing
    if linked is None:
        return ""
    name = linked.group().decode()
    found = "TensorRT is not installed"
    # Importing pip's TensorRT loads its libraries, to which no search path leads.
    with contextlib.suppress(EngineUnavailable, MissingExtra):
        found = f"TensorRT {find_tensorrt('tensorrt').version} is installed"
    try:
        ctypes.CDLL(name)
    except OSError as problem:
        major = name.rpartition(".")[2]
        raise EngineUnavailable(
            f"ONNX Runtime's TensorRT provider needs {name}, which cannot be loaded; {found}",
            f"TensorRT {major}",
            _INSTALL,
        ) from problem
    return name


def options(
    index: int, batch: int, kept: EngineCache | None, domain_input: str | None = None
) -> dict[str, str]:
    """Returns the provider's options for one engine of 1 to `batch` images on the GPU `index`.

    Args:
        index: of the GPU.
        batch: most images of a run.
        kept: where the engine is kept, if anywhere.
        domain_input: of the model, as its manifest has it.
    """

    def shapes(count: int) -> str:
        images = f"{INPUT_NAME}:{count}x{SIZE_PX}x{SIZE_PX}x3"
        return images if domain_input is None else f"{images},{domain_input}:{count}"

    chosen = {
        "device_id": str(index),
        "trt_max_workspace_size": str(_WORKSPACE_BYTES),
        "trt_profile_min_shapes": shapes(1),
        "trt_profile_opt_shapes": shapes(batch),
        "trt_profile_max_shapes": shapes(batch),
    }
    if kept is not None:
        chosen |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(kept.folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(kept.folder),
        }
    return chosen


def engine_cache(
    request: EngineRequest, batch: int, versions: tuple[str, str], gpu: CudaDevice | None
) -> EngineCache | None:
    """Returns the cache for what is asked; `None`, told to `request.said`, if it cannot be used.

    Args:
        request: names model and precision.
        batch: most images of the engine.
        versions: of ONNX Runtime, and the name of TensorRT's library.
        gpu: that will run it, where that is known.
    """
    path = request.bundle.onnx_path(request.precision, request.form)
    onnx_sha256 = request.bundle.manifest.files[path.name].sha256
    where = "" if gpu is None else f"-sm{gpu.compute_capability}"
    key = "-".join((*versions, onnx_sha256[:16], request.precision, f"b{batch}")) + where
    try:
        folder = cache_folder().parent
        for name in ("onnxruntime-tensorrt", re.sub(r"[^\w.-]", "_", key)):
            folder = folder / name
            folder.mkdir(mode=0o700, exist_ok=True)
            _check_own_folder(folder)
        kept = EngineCache(folder)
        if kept.remove_strangers():
            request.said(f"{folder} held what was not written there by sbtk: emptied")
    except (OSError, EngineUnavailable) as problem:
        request.said(f"the engine is built anew each time, since its cache fails: {problem}")
        return None
    return kept


def check_assignment(session: Any) -> None:
    """Checks that TensorRT runs the model, and not the provider that is there for what is left.

    Raises:
        EngineUnavailable: names the operators that it does not run.
    """
    elsewhere: Counter[str] = Counter()
    for subgraph in session.get_provider_graph_assignment_info():
        if subgraph.ep_name != TENSORRT:
            elsewhere.update(node.op_type for node in subgraph.get_nodes())
    left = {kind: count for kind, count in elsewhere.items() if kind not in _LEFT_TO_OTHERS}
    if left:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        raise EngineUnavailable(
            f"ONNX Runtime's TensorRT provider leaves work to others: {told}",
            "a model that it runs as a whole",
            "--engine tensorrt, or --engine onnxruntime-cuda",
        )


def _check_own_folder(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or not _is_only_ours(status):
        raise EngineUnavailable(
            f"{folder} is no folder of yours alone", "mode 0700, no link", f"rm -r {folder}"
        )


def _is_own_file(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and _is_only_ours(status)


def _is_only_ours(status: os.stat_result) -> bool:
    is_closed = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_closed and status.st_uid == os.geteuid()
