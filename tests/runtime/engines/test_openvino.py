"""OpenVINO gives what ONNX Runtime gives, from the same files, and stays on this machine."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from sbtk_cli.main import main
from sbtk_runtime.bundle import Bundle, pretrained_folder
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Embedded
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.registry import open_engine, probe_engines
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import prepare
from tests.processes import run_python
from tests.tiny import tiny_bundle, tiny_model, write_photos, write_tiny_manifest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra openvino is not installed"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_bundle(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    photos = write_photos(tmp_path_factory.mktemp("photos"), 20)
    return np.stack([prepare(path.read_bytes(), "photo").pixels for path in photos])


def test_rows_equal_those_of_onnx_runtime(bundle: Bundle, pixels: NDArray[np.uint8]) -> None:
    rows = open_engine(bundle, EngineOptions(engine="openvino", threads=2)).run(pixels, "photo")
    assert rows.dtype == np.float32
    assert rows.shape == (20, 16)
    other = open_engine(bundle, EngineOptions(engine="onnxruntime", threads=2)).run(pixels, "photo")
    assert np.abs(rows - other).max() < 1e-5


@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.99999), ("int8", 0.99)])
def test_embeddings_of_the_included_model_equal_those_of_onnx_runtime(
    pixels: NDArray[np.uint8], precision: Precision, least: float
) -> None:
    model = Bundle.open(next(path for path in pretrained_folder().iterdir() if path.is_dir()))
    assert precision in model.precisions
    engine = open_engine(model, EngineOptions(engine="openvino", precision=precision))
    rows = engine.run(pixels[:3], "photo")
    other = open_engine(model, EngineOptions(engine="onnxruntime", precision=precision)).run(
        pixels[:3], "photo"
    )
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-5
    # Processors with bfloat16 that took it would give FP16 a cosine of 0.9998.
    assert (rows * other).sum(axis=1).min() > least
    assert engine.info.precision == precision


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 8, 9, 20])
def test_batch_and_lanes_do_not_change_rows(
    bundle: Bundle, pixels: NDArray[np.uint8], lanes: int, count: int
) -> None:
    engine = open_engine(bundle, EngineOptions(engine="openvino", threads=3), lanes=lanes)
    rows = engine.run(pixels[:count], "photo")
    one_by_one = [engine.run(image[None], "photo")[0] for image in pixels[:count]]
    assert np.allclose(rows, np.array(one_by_one).reshape(count, 16), atol=1e-6)


def test_more_threads_than_lanes_can_call_at_once(
    bundle: Bundle, pixels: NDArray[np.uint8]
) -> None:
    engine = open_engine(bundle, EngineOptions(engine="openvino", threads=2), lanes=2)
    batches = [np.roll(pixels, seed, axis=0)[:5] for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(partial(engine.run, kind="photo"), batches))
    for batch, rows in zip(batches, at_once, strict=True):
        assert np.allclose(rows, engine.run(batch, "photo"), atol=1e-6)


def test_results_are_not_overwritten_by_later_ones(
    bundle: Bundle, pixels: NDArray[np.uint8]
) -> None:
    engine = open_engine(bundle, EngineOptions(engine="openvino"))
    first = engine.run(pixels[:2], "photo")
    kept = first.copy()
    engine.run(pixels[2:4], "photo")
    assert np.array_equal(first, kept)


def test_views_and_read_only_images_are_accepted(bundle: Bundle, pixels: NDArray[np.uint8]) -> None:
    engine = open_engine(bundle, EngineOptions(engine="openvino"))
    rows = engine.run(pixels, "photo")
    assert np.allclose(engine.run(pixels[::2], "photo"), rows[::2], atol=1e-6)
    read_only = pixels.copy()
    read_only.flags.writeable = False
    assert np.allclose(engine.run(read_only, "photo"), rows, atol=1e-6)


def test_info_describes_the_running_engine(bundle: Bundle) -> None:
    info = open_engine(bundle, EngineOptions(engine="openvino", threads=2), lanes=2).info
    assert (info.name, info.precision, info.device) == ("openvino", "int8", "cpu")
    assert (info.dim, info.threads, info.lanes) == (16, 2, 2)
    report = next(report for report in probe_engines() if report.name == "openvino")
    assert report.works
    assert info.version == report.version
    assert info.version[0].isdigit()
    assert info.version.count(".") == 2


def test_auto_prefers_it_to_onnx_runtime(bundle: Bundle) -> None:
    info = open_engine(bundle, EngineOptions(device="cpu")).info
    assert info.name == "openvino"
    assert info.passed_over == ()
    with pytest.raises(BadConfig, match="cannot run on cuda"):
        open_engine(bundle, EngineOptions(engine="openvino", device="cuda"))


def test_auto_uses_onnx_runtime_for_a_model_that_openvino_refuses(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "tiny")
    (folder / "model.int8.onnx").write_bytes(_with_an_operator_of_microsofts())
    write_tiny_manifest(folder)
    with pytest.raises(BadModel, match=r"refuses.*Inverse") as caught:
        open_engine(Bundle.open(folder), EngineOptions(engine="openvino"))
    assert "src/" not in caught.value.found
    info = open_engine(Bundle.open(folder), EngineOptions(device="cpu")).info
    assert info.name == "onnxruntime"
    assert info.passed_over[0].startswith("openvino: OpenVINO")


def test_wrong_input_is_an_error(bundle: Bundle, pixels: NDArray[np.uint8]) -> None:
    engine = open_engine(bundle, EngineOptions(engine="openvino"))
    with pytest.raises(EngineUnavailable, match=r"failed on 1 images: .*incompatible") as caught:
        engine.run(np.zeros((1, 100, 100, 3), dtype=np.uint8), "photo")
    assert "src/" not in caught.value.found
    assert engine.run(pixels[:1], "photo").shape == (1, 16)


def test_a_closed_engine_says_so_and_others_still_run(
    bundle: Bundle, pixels: NDArray[np.uint8]
) -> None:
    engine, other = (open_engine(bundle, EngineOptions(engine="openvino")) for _ in range(2))
    engine.close()
    engine.close()
    with pytest.raises(EngineUnavailable, match="openvino is closed"):
        engine.run(pixels[:1], "photo")
    assert other.run(pixels[:1], "photo").shape == (1, 16)


def test_a_stream_uses_as_many_lanes_as_threads(bundle: Bundle, tmp_path: Path) -> None:
    photos = write_photos(tmp_path, 30)
    with Embedder(bundle, engine="openvino", threads=2, batch=4) as embedder:
        assert embedder.engine.info.lanes == 1
        items = list(embedder.stream(photos, "photo"))
        assert embedder.engine.info.lanes == 2
        assert embedder.engine.info.name == "openvino"
        alone, _ = embedder.embed_one(photos[7].read_bytes(), "photo")
        assert embedder.engine.info.lanes == 1
    assert all(isinstance(item, Embedded) for item in items)
    seventh = items[7]
    assert isinstance(seventh, Embedded)
    assert np.allclose(seventh.row, alone, atol=1e-6)


def test_more_lanes_than_processors_are_not_reopened_for_each_image(
    bundle: Bundle, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path, 3)
    with Embedder(bundle, engine="openvino", threads=7) as embedder:
        list(embedder.stream(photos, "photo"))
        engine = embedder.engine
        assert engine.info.lanes == 7
        list(embedder.stream(photos, "photo"))
        assert embedder.engine is engine


def test_idle_threads_sleep(bundle: Bundle, pixels: NDArray[np.uint8]) -> None:
    engine = open_engine(bundle, EngineOptions(engine="openvino", threads=2))
    engine.run(pixels, "photo")
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_memory_depends_neither_on_the_batch_nor_on_the_number_of_engines(bundle: Bundle) -> None:
    script = (
        "import sys, numpy\n"
        "from sbtk_runtime.bundle import Bundle\n"
        "from sbtk_runtime.engines.base import EngineOptions\n"
        "from sbtk_runtime.engines.registry import open_engine\n"
        "from sbtk_runtime.machine import peak_resident_bytes, resident_bytes\n"
        "images = numpy.zeros((200, 224, 224, 3), numpy.uint8)\n"
        "images[:] = 7\n"
        "for turn in range(15):\n"
        "    engine = open_engine(Bundle.open(sys.argv[1]), EngineOptions('openvino', threads=2))\n"
        "    engine.run(images[:8], 'photo')\n"
        "    if turn == 4: before = resident_bytes()\n"
        "engine.run(images, 'photo')\n"
        "print((peak_resident_bytes() - before) // 2**20)\n"
    )
    (megabytes,) = run_python(script, bundle.folder).splitlines()
    # 200 images in float32 would be 120 MB more, and each forgotten engine more than 2 MB.
    assert int(megabytes) < 20


def test_telemetry_is_disabled(bundle: Bundle, tmp_path: Path) -> None:
    """OpenVINO's import tells its vendor of it over the network, and leaves files at home."""
    script = (
        "import json, sys\n"
        "seen = []\n"
        "def watch(event, arguments):\n"
        "    if event.startswith(('socket.', 'subprocess.', 'os.fork', 'os.posix_spawn')):\n"
        "        seen.append(event)\n"
        "sys.addaudithook(watch)\n"
        "from sbtk_runtime.bundle import Bundle\n"
        "from sbtk_runtime.engines.base import EngineOptions\n"
        "from sbtk_runtime.engines.registry import open_engine\n"
        "import multiprocessing, threading\n"
        "engine = open_engine(Bundle.open(sys.argv[1]), EngineOptions('openvino'))\n"
        "import openvino\n"
        "print(json.dumps([seen, [name for name in sys.modules if 'telemetry' in name],\n"
        "    callable(openvino.convert_model), len(multiprocessing.active_children()),\n"
        "    threading.active_count()]))\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    (line,) = run_python(script, bundle.folder, HOME=str(home), CI="", TF_BUILD="").splitlines()
    events, telemetry, can_convert, children, threads = json.loads(line)
    assert events == []
    assert not [name for name in telemetry if name.startswith("openvino_telemetry")]
    assert can_convert
    assert (children, threads) == (0, 1)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_included_model_gives_the_same_rows_on_one_lane_and_several(
    precision: Precision,
) -> None:
    """OpenVINO's streams have given noise for such a model, in rows of length 1."""
    pixels = np.random.default_rng(1).integers(0, 256, (6, 28, 28, 3), dtype=np.uint8)
    pixels = pixels.repeat(8, axis=1).repeat(8, axis=2)
    alone = open_engine(
        Bundle.open(), EngineOptions(engine="openvino", precision=precision, threads=2)
    )
    several = open_engine(
        Bundle.open(), EngineOptions(engine="openvino", precision=precision, threads=2), lanes=2
    )
    expected = alone.run(pixels, "photo")
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(partial(several.run, kind="photo"), [pixels] * 4):
            np.testing.assert_allclose(rows, expected, atol=1e-3)


def test_ctrl_c_raises_after_engines_were_opened_and_closed(bundle: Bundle) -> None:
    """OpenVINO has left the process with a stack for signal handlers that was freed already."""
    script = (
        "import gc, signal, sys\n"
        "from sbtk_runtime.bundle import Bundle\n"
        "from sbtk_runtime.engines.base import EngineOptions\n"
        "from sbtk_runtime.engines.registry import open_engine\n"
        "bundle = Bundle.open(sys.argv[1])\n"
        "first = open_engine(bundle, EngineOptions('openvino'))\n"
        "second = open_engine(bundle, EngineOptions('openvino'))\n"
        "for engine in (first, second):\n"
        "    engine.close()\n"
        "    gc.collect()\n"
        "del first, second, engine\n"
        "gc.collect()\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    assert run_python(script, bundle.folder).splitlines() == ["interrupted"]


def test_concurrent_threads_share_one_openvino_core() -> None:
    script = (
        "import time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from sbtk_runtime.engines.openvino import _openvino, openvino_core\n"
        "openvino = _openvino()\n"
        "real = openvino.Core\n"
        "def slowly():\n"
        "    time.sleep(0.2)\n"
        "    return real()\n"
        "openvino.Core = slowly\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    cores = [pool.submit(openvino_core) for _ in range(4)]\n"
        "print(len({id(core.result()) for core in cores}))\n"
    )
    assert run_python(script).splitlines() == ["1"]


def test_without_the_library_the_extra_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    command = ["embed", "a.jpg", "--as", "photo", "--engine", "openvino", "-o", "out.npz"]
    assert main([*command, "--model", str(bundle.folder)]) == 1
    shown = capsys.readouterr().err
    assert "OpenVINO is not installed" in shown
    assert 'pip install "sbtk[openvino]"' in shown
    report = next(report for report in probe_engines() if report.name == "openvino")
    assert not report.works
    assert "sbtk[openvino]" in report.reason
    assert open_engine(bundle, EngineOptions(device="cpu")).info.name == "onnxruntime"


def test_an_installation_without_files_is_recognised(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").touch()
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from sbtk_runtime.bundle import Bundle\n"
        "from sbtk_runtime.engines.base import EngineOptions\n"
        "from sbtk_runtime.engines.registry import open_engine\n"
        "from sbtk_runtime.errors import EngineUnavailable\n"
        "try: open_engine(Bundle.open(sys.argv[1]), EngineOptions('openvino'))\n"
        "except EngineUnavailable as problem: print(problem.found, '|', problem.next_step)\n"
    )
    (line,) = run_python(script, bundle.folder).splitlines()
    assert line.startswith("OpenVINO's installation is incomplete")
    assert "sbtk[openvino]" in line


def test_two_threads_can_open_the_first_engine_at_once(bundle: Bundle) -> None:
    script = (
        "import sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from sbtk_runtime.bundle import Bundle\n"
        "from sbtk_runtime.engines.base import EngineOptions\n"
        "from sbtk_runtime.engines.registry import open_engine\n"
        "bundle = Bundle.open(sys.argv[1])\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    options = [EngineOptions('openvino')] * 4\n"
        "    engines = list(pool.map(lambda each: open_engine(bundle, each), options))\n"
        "print(len(engines), 'openvino_telemetry' in sys.modules)\n"
    )
    assert run_python(script, bundle.folder).splitlines() == ["4 False"]
    assert threading.active_count() >= 1


def _with_an_operator_of_microsofts() -> bytes:
    """Return a model whose rows pass through an operator that only ONNX Runtime has."""
    model = tiny_model()
    graph = model.graph
    graph.node[-1].output[0] = "unit"
    graph.initializer.append(numpy_helper.from_array(np.eye(16, dtype=np.float32), "eye"))
    graph.node.append(helper.make_node("Inverse", ["eye"], ["same"], domain="com.microsoft"))
    graph.node.append(helper.make_node("MatMul", ["unit", "same"], ["embeddings"]))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return bytes(model.SerializeToString())
