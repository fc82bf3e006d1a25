"""ONNX Runtime's GPU providers on a machine without a GPU: refused by name, and never silently.

The real onnxruntime-gpu runs in processes of their own. It lies beside the environment and not in
it, since it would overwrite the files of onnxruntime there.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbtk_runtime.engines import onnxruntime as engine_onnxruntime
from sbtk_runtime.engines.base import EngineInfo
from sbtk_runtime.engines.cuda import cuda_runtime, find_device
from sbtk_runtime.engines.onnxruntime import (
    CPU,
    find_onnxruntime,
    new_session,
)
from sbtk_runtime.engines.session import Feeds, SessionEngine, first_line
from sbtk_runtime.errors import BadConfig, SbtkError
from tests.tiny import tiny_bundle, write_photos

_BESIDE = Path(os.environ.get("SBTK_TEST_ONNXRUNTIME_GPU", Path(sys.prefix) / "onnxruntime-gpu"))


def _is_gpu_at_hand() -> bool:
    try:
        find_device("cuda")
    except SbtkError:
        return False
    return True


needs_onnxruntime_gpu = pytest.mark.skipif(
    not (_BESIDE / "onnxruntime").is_dir(),
    reason=f"onnxruntime-gpu is not in {_BESIDE} (make test puts it there)",
)
needs_no_gpu = pytest.mark.skipif(_is_gpu_at_hand(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


@needs_onnxruntime_gpu
@needs_no_gpu
def test_an_unavailable_provider_requested_by_name_is_an_error(folder: Path) -> None:
    answers = _opened(folder, "onnxruntime-cuda", "auto", "onnxruntime")
    refused = answers["onnxruntime-cuda"]
    assert refused["error"] == "EngineUnavailable"
    assert "no NVIDIA driver" in refused["found"]
    assert "driver" in refused["next_step"]
    assert answers["onnxruntime"]["device"] == "cpu"
    assert answers["auto"]["device"] == "cpu"
    why = next(text for text in answers["auto"]["passed_over"] if "onnxruntime-cuda" in text)
    assert "no NVIDIA driver" in why


@needs_onnxruntime_gpu
@needs_no_gpu
def test_a_silent_fallback_to_the_cpu_is_refused(folder: Path) -> None:
    """ONNX Runtime says that it has CUDA, takes the request, and would run on the CPU."""
    answers = _opened(folder, "onnxruntime-cuda", "auto", hidden=("cuda", "cuda.bindings"))
    refused = answers["onnxruntime-cuda"]
    assert refused["error"] == "EngineUnavailable"
    assert "fell back to CPUExecutionProvider" in refused["found"]
    assert "libcublas" in refused["found"]
    assert "sbtk[gpu]" in refused["next_step"]
    assert answers["auto"]["device"] == "cpu"


@needs_onnxruntime_gpu
@needs_no_gpu
def test_the_command_exits_with_1_and_prints_nothing_but_the_reason(
    folder: Path, tmp_path: Path
) -> None:
    (photo,) = write_photos(tmp_path, 1)
    out = tmp_path / "out.npz"
    command = ["-m", "sbtk_cli", "embed", str(photo), "--as", "photo", "-o", str(out)]
    done = _python(*command, "--model", str(folder), "--engine", "onnxruntime-cuda")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: there is no NVIDIA driver")
    assert "Traceback" not in done.stderr
    assert not out.exists()
    done = _python(*command, "--model", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    assert "EP Error" not in done.stdout
    assert out.exists()


@needs_onnxruntime_gpu
def test_doctor_names_both_installations(folder: Path, tmp_path: Path) -> None:
    command = ["-m", "sbtk_cli", "doctor", "--model", str(folder), "--gallery", str(tmp_path)]
    done = _python(*command, "--json")
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)["findings"]
    (double,) = [found for found in findings if "both installed" in found["text"]]
    assert double["level"] == "problem"
    assert "onnxruntime-gpu" in double["text"]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in double["next_step"]
    engines = {engine["name"]: engine for engine in json.loads(done.stdout)["engines"]}
    assert engines["onnxruntime"]["works"]


@needs_onnxruntime_gpu
def test_the_options_are_known_to_the_provider() -> None:
    """An option that a provider does not know makes it fail, and that needs a GPU to be seen."""
    cuda_options = engine_onnxruntime._cuda_provider(0)[1]
    assert "use_tf32" in cuda_options
    choices = ["kSameAsRequested", "HEURISTIC"]
    assert set(choices) <= set(cuda_options.values())
    _check_strings("libonnxruntime_providers_cuda.so", [*cuda_options, *choices])


def _check_strings(library: str, texts: list[str]) -> None:
    (path,) = (_BESIDE / "onnxruntime" / "capi").glob(library)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        for text in texts:
            assert content.find(b"\0" + text.encode() + b"\0") >= 0, text


def test_invalid_devices_are_refused() -> None:
    cuda_runtime()
    for name in ("cuda:", "cuda:x", "cuda:-1", "gpu"):
        with pytest.raises(BadConfig, match="unknown GPU"):
            find_device(name)


def test_an_error_of_a_session_is_not_retried_on_the_cpu(tmp_path: Path) -> None:
    model = tiny_bundle(tmp_path / "tiny") / "model.int8.onnx"
    session = new_session(find_onnxruntime(), str(model), 1, (CPU, {}))
    assert session._enable_fallback is False


def test_lack_of_memory_halves_the_chunks_until_they_fit() -> None:
    """What a GPU does at 256 images when other programs hold its memory."""
    sizes: list[int] = []
    notices: list[str] = []

    def infer(feeds: Feeds) -> np.ndarray[Any, Any]:
        images = feeds["images"]
        sizes.append(len(images))
        if len(images) > 10:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 9")
        return np.repeat(images[:, 0, 0, :1], 16, axis=1).astype(np.float32)

    info = EngineInfo("onnxruntime-cuda", "fp16", "cuda:0", 16, 1, 1, "1")
    engine = SessionEngine(infer, info, 64, first_line, notices.append)
    images = np.zeros((40, 224, 224, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(40)
    rows = engine.run(images, "photo")
    assert rows[:, 0].tolist() == list(range(40))
    assert sizes == [40, 20, 10, 10, 10, 10]
    assert notices[-1] == "onnxruntime-cuda is short of memory: continuing with 10 images at once"
    sizes.clear()
    engine.run(images[:15], "photo")
    assert sizes == [10, 5]


_OPEN = """
import json, sys
hidden, names = json.loads(sys.argv[2])
sys.modules.update(dict.fromkeys(hidden))
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.errors import SbtkError
answers = {}
for name in names:
    try:
        info = open_engine(Bundle.open(sys.argv[1]), EngineOptions(name, precision="fp32")).info
        answers[name] = {"device": info.device, "passed_over": info.passed_over}
    except SbtkError as problem:
        answers[name] = {"error": type(problem).__name__, "found": problem.found,
                         "expected": problem.expected, "next_step": problem.next_step}
print(json.dumps(answers))
"""


def _opened(folder: Path, *names: str, hidden: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return for each name the engine or the error, and check that nothing else is printed."""
    done = _python("-c", _OPEN, str(folder), json.dumps([hidden, names]))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answers: dict[str, Any] = json.loads(done.stdout)
    assert set(answers) == set(names)
    return answers


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with onnxruntime-gpu ahead of the environment's onnxruntime."""
    path = os.pathsep.join([str(_BESIDE), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
