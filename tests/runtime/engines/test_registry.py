"""Engines compute what the model says, and refuse models and machines that do not fit."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.registry import ENGINE_NAMES, automatic_order, open_engine, probe_engines
from sbtk_runtime.engines.session import validate_embeddings
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable
from sbtk_runtime.machine import cpu_threads, quota_cpus
from tests.processes import run_python
from tests.tiny import tiny_bundle, tiny_model, write_tiny_manifest

SHAPE = (224, 224, 3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_bundle(tmp_path_factory.mktemp("tiny")))


def _images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return images with more than noise in them."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(28, axis=1).repeat(28, axis=2)


def _embedded_by_numpy(model: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    values = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    scaled = (images.astype(np.float64) - values["middle"]) * values["scale"]
    cells = scaled.reshape(len(images), 8, 28, 8, 28, 3).mean(axis=(2, 4))
    flat = cells.transpose(0, 3, 1, 2).reshape(len(images), -1)
    features = flat @ values["weights"].T.astype(np.float64) + values["bias"]
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("flags", "first"),
    [
        ("fpu sse2 avx2", "onnxruntime"),
        ("fpu sse2 avx2 avx512f", "onnxruntime"),
        ("fpu sse2 avx2 avx_vnni", "openvino"),
        ("fpu sse2 avx2 avx512f avx512_vnni", "openvino"),
        ("fp asimd", "openvino"),  # Arm
        ("", "openvino"),  # unknown
    ],
)
def test_auto_prefers_onnxruntime_on_x86_without_vnni(flags: str, first: str) -> None:
    ordered = automatic_order(frozenset(flags.split()))
    assert sorted(entry.name for entry in ordered) == sorted(ENGINE_NAMES)
    assert next(entry.name for entry in ordered if entry.device == "cpu") == first
    assert [entry.device for entry in ordered] == ["cuda"] * 3 + ["cpu"] * 2


def test_rows_equal_those_of_numpy(bundle: Bundle) -> None:
    engine = open_engine(bundle, EngineOptions(engine="onnxruntime", threads=2))
    images = _images(9)
    rows = engine.run(images, "photo")
    assert rows.dtype == np.float32
    assert np.abs(rows - _embedded_by_numpy(tiny_model(), images)).max() < 1e-5


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 33])
def test_the_batch_does_not_change_rows(bundle: Bundle, lanes: int, count: int) -> None:
    engine = open_engine(bundle, EngineOptions(threads=3), lanes=lanes)
    images = _images(count)
    rows = engine.run(images, "photo")
    assert rows.shape == (count, 16)
    one_by_one = [engine.run(image[None], "photo")[0] for image in images]
    assert np.allclose(rows, np.array(one_by_one).reshape(count, 16), atol=1e-6)


def test_lanes_can_run_at_once(bundle: Bundle) -> None:
    engine = open_engine(bundle, EngineOptions(threads=4), lanes=4)
    batches = [_images(5, seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(partial(engine.run, kind="photo"), batches))
    for batch, rows in zip(batches, at_once, strict=True):
        assert np.array_equal(rows, engine.run(batch, "photo"))


def test_views_and_slices_are_accepted(bundle: Bundle) -> None:
    engine = open_engine(bundle)
    images = _images(6)
    assert np.array_equal(engine.run(images[::2], "photo"), engine.run(images, "photo")[::2])
    mirrored = images[:, :, ::-1]
    assert np.array_equal(engine.run(mirrored, "photo"), engine.run(mirrored.copy(), "photo"))


def test_info_describes_the_running_engine(bundle: Bundle) -> None:
    info = open_engine(bundle, EngineOptions(engine="onnxruntime", threads=2)).info
    assert (info.name, info.precision, info.device) == ("onnxruntime", "int8", "cpu")
    assert (info.dim, info.threads, info.lanes) == (16, 2, 1)
    assert info.version.count(".") >= 2
    assert open_engine(bundle).info.threads == cpu_threads()
    assert open_engine(bundle, EngineOptions(precision="fp32")).info.precision == "fp32"


def test_auto_says_why_faster_engines_are_unavailable(bundle: Bundle) -> None:
    working = [report.name for report in probe_engines() if report.works]
    info = open_engine(bundle).info
    assert info.name == working[0]
    faster = ENGINE_NAMES[: ENGINE_NAMES.index(info.name)]
    assert [sentence.partition(":")[0] for sentence in info.passed_over] == list(faster)
    assert open_engine(bundle, EngineOptions(engine="onnxruntime")).info.passed_over == ()


_MODULES_AFTER_OPENING = """
import ctypes, sys
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.registry import open_engine
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    open_engine(Bundle.open(sys.argv[1]), single_query=True)
    print(*{name.partition(".")[0] for name in sys.modules})
else:
    print("driver")
"""


def test_without_a_driver_auto_imports_nothing_of_cuda(bundle: Bundle) -> None:
    imported = set(run_python(_MODULES_AFTER_OPENING, bundle.folder).split())
    if "driver" in imported:
        pytest.skip("this machine has an NVIDIA driver")
    assert "numpy" in imported
    assert not imported & {"tensorrt", "tensorrt_rtx", "cuda", "openvino"}


def test_a_single_image_does_not_wait_for_an_engine_that_loads_slowly(bundle: Bundle) -> None:
    info = open_engine(bundle, single_query=True).info
    working = {report.name for report in probe_engines() if report.works}
    if "onnxruntime" in working:
        assert info.name != "openvino"
        assert "openvino: takes too long to load for one image" in info.passed_over
    if "openvino" in working:
        assert (
            open_engine(bundle, EngineOptions(engine="openvino"), single_query=True).info.name
            == "openvino"
        )


def test_without_int8_a_cpu_uses_fp32(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "tiny")
    (folder / "model.int8.onnx").rename(folder / "model.fp16.onnx")
    write_tiny_manifest(folder)
    assert open_engine(Bundle.open(folder), EngineOptions(device="cpu")).info.precision == "fp32"
    with pytest.raises(BadModel, match="no int8 model"):
        open_engine(Bundle.open(folder), EngineOptions(precision="int8"))


def test_a_closed_engine_says_so(bundle: Bundle) -> None:
    engine = open_engine(bundle)
    engine.close()
    engine.close()
    with pytest.raises(EngineUnavailable, match="is closed"):
        engine.run(_images(1), "photo")


def test_wrong_input_is_an_error(bundle: Bundle) -> None:
    engine = open_engine(bundle)
    with pytest.raises(EngineUnavailable, match="failed on 1 images"):
        engine.run(np.zeros((1, 100, 100, 3), dtype=np.uint8), "photo")
    assert engine.run(_images(1), "photo").shape == (1, 16)


def test_contradictory_options_are_refused(bundle: Bundle) -> None:
    with pytest.raises(BadConfig, match="unknown engine 'abacus'"):
        open_engine(bundle, EngineOptions(engine="abacus"))
    with pytest.raises(BadConfig, match="unknown device"):
        open_engine(bundle, EngineOptions(device="tpu"))
    with pytest.raises(BadConfig, match="cannot run on cuda:0"):
        open_engine(bundle, EngineOptions(engine="onnxruntime", device="cuda:0"))
    with pytest.raises(BadConfig, match="0 threads"):
        open_engine(bundle, EngineOptions(threads=0))
    with pytest.raises(BadConfig, match="2 threads for 3 lanes"):
        open_engine(bundle, EngineOptions(threads=2), lanes=3)
    with pytest.raises(BadConfig, match="unknown precision"):
        open_engine(bundle, EngineOptions(precision="fp8"))  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="a batch of 0"):
        open_engine(bundle, EngineOptions(batch=0))


def test_the_error_for_the_removed_engine_names_its_successor(bundle: Bundle) -> None:
    with pytest.raises(BadConfig) as caught:
        open_engine(bundle, EngineOptions("onnxruntime-tensorrt"))
    assert caught.value.found == "the engine onnxruntime-tensorrt no longer exists"
    assert caught.value.next_step == "--engine tensorrt"


def test_probe_engines_lists_all_in_order_of_preference() -> None:
    reports = probe_engines()
    assert tuple(report.name for report in reports) == ENGINE_NAMES
    cpu = next(report for report in reports if report.name == "onnxruntime")
    assert cpu.works
    assert cpu.reason == ""
    for report in reports:
        assert report.works == (report.reason == "")
        if report.name.startswith("onnxruntime"):
            assert report.version == cpu.version


def test_an_engine_by_name_is_never_replaced(bundle: Bundle) -> None:
    cuda = next(report for report in probe_engines() if report.name == "onnxruntime-cuda")
    if cuda.works:
        pytest.skip("this machine has CUDA")
    with pytest.raises(EngineUnavailable) as caught:
        open_engine(bundle, EngineOptions(engine="onnxruntime-cuda"))
    assert "sbtk[gpu]" in caught.value.next_step
    with pytest.raises(EngineUnavailable, match="no engine works"):
        open_engine(bundle, EngineOptions(device="cuda"))


def test_without_the_library_the_extra_is_named(bundle: Bundle) -> None:
    script = "import sys; sys.modules.update(onnxruntime=None, openvino=None)\n" + _OPEN_ENGINE
    answers = run_python(script, bundle.folder).splitlines()
    assert answers[0] == 'MissingExtra | ONNX Runtime is not installed | pip install "sbtk[cpu]"'
    assert answers[1].startswith("EngineUnavailable | no engine works on this machine: ")
    assert answers[1].endswith('pip install "sbtk[cpu]"')
    assert set(answers[2].split()) == {"False"}


def test_an_installation_without_files_is_recognised(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + _OPEN_ENGINE
    answers = run_python(script, bundle.folder).splitlines()
    assert answers[0].startswith("EngineUnavailable | ONNX Runtime's installation is incomplete")
    assert "pip uninstall onnxruntime onnxruntime-gpu" in answers[0]


FAULTS = [
    ("two inputs", r"takes images: .* and domain: tensor\(int64\)"),
    ("float input", r"takes images: tensor\(float\) \(\?, 224, 224, 3\)"),
    ("other input name", r"takes pixels: tensor\(uint8\)"),
    ("fixed batch", r"takes images: tensor\(uint8\) \(1, 224, 224, 3\)"),
    ("planes first", r"takes images: tensor\(uint8\) \(\?, 3, 224, 224\)"),
    ("two outputs", r"returns embeddings: .* and flat: "),
    ("int8 output", r"returns embeddings: tensor\(int8\)"),
    ("other rank", r"returns embeddings: tensor\(float\) \(\?, 16, 1\)"),
    ("other dim", r"returns embeddings: tensor\(float\) \(\?, 8\)"),
    ("dynamic rank", r"returns embeddings: tensor\(float\) \(\)"),
    ("undeclared other dim", r"returns \(1, 8\) for 1 images"),
    ("unknown operator", "refuses .*Conjure"),
    ("cut", "truncated or not an ONNX model|refuses"),
    ("empty", "is empty"),
    ("text", "truncated or not an ONNX model"),
]
# The faults that OpenVINO reports in the same words.
OPENVINO_FAULTS = (
    *("float input", "fixed batch", "other dim", "int8 output", "dynamic rank"),
    *("unknown operator", "cut", "empty"),
)


@pytest.mark.parametrize(
    ("engine", "fault", "complaint"),
    [
        *(("onnxruntime", fault, complaint) for fault, complaint in FAULTS),
        *(("openvino", *fault) for fault in FAULTS if fault[0] in OPENVINO_FAULTS),
        ("openvino", "two used inputs", FAULTS[0][1]),
    ],
)
def test_models_with_other_inputs_or_outputs_are_refused(
    tmp_path: Path, engine: str, fault: str, complaint: str
) -> None:
    pytest.importorskip(engine)
    folder = tiny_bundle(tmp_path / "tiny")
    (folder / "model.int8.onnx").write_bytes(_faulty(fault))
    write_tiny_manifest(folder)
    bundle = Bundle.open(folder)
    with pytest.raises(BadModel, match=complaint) as caught:
        open_engine(bundle, EngineOptions(engine=engine))
    assert caught.value.expected
    if engine == "openvino":
        # And not "no engine works": the model is at fault, whichever engine is used.
        with pytest.raises(BadModel):
            open_engine(bundle, EngineOptions(device="cpu"))
    assert open_engine(bundle, EngineOptions(engine, "fp32")).info.dim == 16


def test_truncated_models_are_refused_and_never_crash(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "tiny")
    content = (folder / "model.int8.onnx").read_bytes()
    for sixteenth in range(16):
        (folder / "model.int8.onnx").write_bytes(content[: len(content) * sixteenth // 16])
        write_tiny_manifest(folder)
        with pytest.raises(BadModel):
            open_engine(Bundle.open(folder))


def test_invalid_rows_are_found_and_zeroed() -> None:
    unit = np.zeros((9, 4), dtype=np.float32)
    unit[:, 0] = 1.0
    rows = unit.copy()
    rows[1, 2] = np.nan
    rows[2, 0] = np.inf
    rows[3, 0] = -np.inf
    rows[4] = 0.0
    rows[5, 0] = 1.002
    rows[6] = 3e38
    rows[7, 0] = 1.0005
    checked, is_bad = validate_embeddings(rows)
    assert is_bad.tolist() == [False, True, True, True, True, True, True, False, False]
    assert (checked[is_bad] == 0).all()
    assert np.array_equal(checked[~is_bad], rows[~is_bad])
    assert np.isnan(rows[1, 2])
    none, nobody = validate_embeddings(np.empty((0, 4), dtype=np.float32))
    assert none.shape == (0, 4)
    assert not nobody.any()


def test_the_default_threads_are_those_this_process_may_use() -> None:
    assert 1 <= cpu_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "own", "quota"),
    [
        ({}, "/", None),
        ({"cpu.max": "150000 100000\n"}, "/", 1.5),
        ({"cpu.max": "max 100000\n"}, "/", None),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, "/a/b", 2.0),
        ({"a/b/cpu.max": "50000 100000", "a/cpu.max": "max 100000"}, "/a/b", 0.5),
        ({"cpu.max": "200000 100000"}, "/path/of/the/host", 2.0),
        ({"cpu.max": "nonsense"}, "/", None),
        ({"cpu.max": "1 0"}, "/", None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, "/", 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "/", None),
    ],
)
def test_container_cpu_quotas_are_respected(
    tmp_path: Path, files: dict[str, str], own: str, quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_cpus(tmp_path, own) == quota


_OPEN_ENGINE = """
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.registry import open_engine, probe_engines
from sbtk_runtime.errors import SbtkError
for name in ("onnxruntime", "auto"):
    try:
        open_engine(Bundle.open(sys.argv[1]), EngineOptions(engine=name))
    except SbtkError as problem:
        print(type(problem).__name__, problem.found, problem.next_step, sep=" | ")
print(*(report.works for report in probe_engines()))
"""


def _faulty(fault: str) -> bytes:
    """Return a model with one fault, or what is no model at all."""
    model = tiny_model()
    graph = model.graph
    images, embeddings = graph.input[0], graph.output[0]
    if fault == "two inputs":
        graph.input.append(helper.make_tensor_value_info("domain", TensorProto.INT64, ["batch"]))
    elif fault == "two used inputs":
        graph.input.append(helper.make_tensor_value_info("domain", TensorProto.INT64, [1]))
        _append(graph, helper.make_node("Cast", ["domain"], ["number"], to=TensorProto.FLOAT))
        graph.node.append(helper.make_node("Add", ["unit", "number"], ["embeddings"]))
    elif fault == "float input":
        images.type.tensor_type.elem_type = TensorProto.FLOAT
    elif fault == "other input name":
        images.name = "pixels"
        graph.node[0].input[0] = "pixels"
    elif fault == "fixed batch":
        images.type.tensor_type.shape.dim[0].dim_value = 1
    elif fault == "planes first":
        images.CopyFrom(
            helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, 224, 224])
        )
        del graph.node[1]
        graph.node[1].input[0] = "cast"
    elif fault == "two outputs":
        graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, None))
    elif fault == "int8 output":
        _append(graph, helper.make_node("Cast", ["unit"], ["embeddings"], to=TensorProto.INT8))
        embeddings.type.tensor_type.elem_type = TensorProto.INT8
    elif fault == "other rank":
        graph.initializer.append(numpy_helper.from_array(np.array([2]), "axes"))
        _append(graph, helper.make_node("Unsqueeze", ["unit", "axes"], ["embeddings"]))
        embeddings.CopyFrom(
            helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", 16, 1])
        )
    elif fault == "other dim":
        model = tiny_model(dim=8)
    elif fault == "dynamic rank":
        _append(graph, helper.make_node("Squeeze", ["unit"], ["embeddings"]))
        embeddings.CopyFrom(helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, None))
    elif fault == "undeclared other dim":
        model = tiny_model(dim=8)
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "dim"
        _hide_width(model.graph)
    elif fault == "unknown operator":
        _append(graph, helper.make_node("Conjure", ["unit"], ["embeddings"]))
    elif fault == "cut":
        return bytes(model.SerializeToString()[:-7])
    elif fault == "empty":
        return b""
    elif fault == "text":
        return b"version https://git-lfs.github.com/spec/v1\n"
    return bytes(model.SerializeToString())


def _append(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Put a node behind the last one, which now gives `unit`."""
    graph.node[-1].output[0] = "unit"
    graph.node.append(node)


def _hide_width(graph: onnx.GraphProto) -> None:
    """Append a slice of all columns, whose number shape inference cannot find."""
    constants = {"one": np.array(1), "start": np.array([0]), "columns": np.array([1])}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(value, name))
    _append(graph, helper.make_node("NonZero", ["unit"], ["places"]))
    graph.node.append(helper.make_node("ReduceMax", ["places"], ["last"], keepdims=0))
    graph.node.append(helper.make_node("Add", ["last", "one"], ["count"]))
    graph.node.append(helper.make_node("Reshape", ["count", "columns"], ["end"]))
    slice_inputs = ["unit", "start", "end", "columns"]
    graph.node.append(helper.make_node("Slice", slice_inputs, ["embeddings"]))


WITHOUT_MEMORY = """
import resource, sys
from pathlib import Path
from sbtk_runtime.embedding.embedder import Embedder
size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = size_bytes + 40 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    Embedder(sys.argv[1]).close()
except MemoryError:
    print("not enough memory")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_lack_of_memory_is_not_reported_as_a_missing_engine(bundle: Bundle) -> None:
    assert run_python(WITHOUT_MEMORY, bundle.folder) == "not enough memory\n"
