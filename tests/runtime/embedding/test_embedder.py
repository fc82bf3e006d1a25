"""Streams keep order and memory limits; a bad image never ends a run, and every end is clean."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from PIL import Image

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Embedded, Failed, MemoryBudget, Timings
from sbtk_runtime.errors import BadConfig, BadData, BadImage, BadModel, EngineUnavailable
from sbtk_runtime.preprocess import prepare
from tests.processes import run_python
from tests.tiny import tiny_bundle, tiny_model, write_photos, write_sketch, write_tiny_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_photos(tmp_path_factory.mktemp("photos"), 40)


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in left if name.startswith("sbtk-")]


def test_one_image_gives_one_unit_row(folder: Path, photos: list[Path]) -> None:
    with Embedder(folder) as embedder:
        assert embedder.dim == 16
        assert embedder.model_id == Bundle.open(folder).manifest.model_id
        row, notices = embedder.embed_one(photos[0].read_bytes(), "photo")
        pixels = prepare(photos[0].read_bytes(), "photo").pixels
        assert np.array_equal(row, embedder.embed_images(pixels[None], "photo")[0])
        assert row.dtype == np.float32
        assert abs(float(np.linalg.norm(row)) - 1) < 1e-6
        assert notices == ()


def test_one_sketch_gives_one_row_and_its_notices(folder: Path, tmp_path: Path) -> None:
    data = write_sketch(tmp_path / "sketch.png").read_bytes()
    stream = io.BytesIO()
    Image.eval(Image.open(io.BytesIO(data)), lambda value: 255 - value).save(stream, "PNG")
    with Embedder(folder) as embedder:
        row, _ = embedder.embed_one(data, "sketch")
        inverted, notices = embedder.embed_one(stream.getvalue(), "sketch")
        assert np.array_equal(row, inverted)
        assert len(notices) == 1
        with pytest.raises(BadImage, match="not an image"):
            embedder.embed_one(b"x", "sketch")


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (1, 32), (2, 7), (3, 5), (4, 64)])
def test_a_stream_equals_one_by_one_in_order(
    folder: Path, photos: list[Path], threads: int, batch: int
) -> None:
    with Embedder(folder, threads=threads, batch=batch) as embedder:
        items = list(embedder.stream(photos, "photo"))
        assert [item.index for item in items] == list(range(len(photos)))
        assert [item.path for item in items] == photos
        for item in items:
            assert isinstance(item, Embedded)
            data = item.path.read_bytes()
            assert np.allclose(item.row, embedder.embed_one(data, "photo")[0], atol=1e-6)
            assert item.source.path == item.path
            assert item.source.sha256 == hashlib.sha256(data).hexdigest()
            assert item.source.size_bytes == len(data)
            assert item.source.mtime_ns == item.path.stat().st_mtime_ns


def test_bad_files_fail_alone_and_keep_their_place(
    folder: Path, photos: list[Path], tmp_path: Path
) -> None:
    bad = {
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"hello", "not an image in a supported format"),
        "cut.jpg": (photos[0].read_bytes()[:700], "damaged image"),
    }
    for name, (content, _) in bad.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "fifo.jpg")
    reasons = {name: reason for name, (_, reason) in bad.items()}
    reasons |= {"fifo.jpg": "not a regular file", "absent.jpg": "No such file", "n\0.jpg": "null"}
    paths = list(photos)
    for place, name in enumerate(reasons):
        paths.insert(place * 5, tmp_path / name)
    with Embedder(folder, batch=4) as embedder:
        items = list(embedder.stream(paths, "photo"))
    assert [item.path for item in items] == paths
    assert [item.index for item in items] == list(range(len(paths)))
    failed = [item for item in items if isinstance(item, Failed)]
    assert [item.path.name for item in failed] == list(reasons)
    for item in failed:
        assert reasons[item.path.name] in item.reason
        assert "\n" not in item.reason
        was_read = item.path.name in ("text.jpg", "cut.jpg")
        assert (item.source is not None) == was_read


def test_a_stream_of_sketches_reports_the_empty_one(folder: Path, tmp_path: Path) -> None:
    paths = [write_sketch(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    Image.new("L", (50, 50), 255).save(paths[1])
    with Embedder(folder) as embedder:
        first, second, third = embedder.stream(paths, "sketch")
    assert isinstance(second, Failed)
    assert second.reason.startswith("the sketch is empty")
    assert isinstance(first, Embedded)
    assert isinstance(third, Embedded)


def test_a_stream_of_bad_files_gives_only_errors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"x")
    with Embedder(folder, batch=2) as embedder:
        items = list(embedder.stream([tmp_path / "bad.jpg"] * 300, "photo"))
    assert len(items) == 300
    assert all(isinstance(item, Failed) for item in items)


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (1, 8), (2, 3), (4, 16)])
def test_any_order_of_good_and_bad_files_is_streamed_to_its_end(
    folder: Path, photos: list[Path], tmp_path: Path, threads: int, batch: int
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"x")
    runs = st.lists(st.tuples(st.booleans(), st.integers(1, 6 * batch)), min_size=1, max_size=5)

    @settings(max_examples=15)
    @example(runs=[(False, 4 * batch), (True, 1)])
    @example(runs=[(False, 80), (True, 80)])
    @given(runs=runs)
    def is_streamed(runs: list[tuple[bool, int]]) -> None:
        is_good = [kind for kind, count in runs for _ in range(count)]
        paths = [photos[i % len(photos)] if good else bad for i, good in enumerate(is_good)]
        items = list(embedder.stream(paths, "photo"))
        assert [item.index for item in items] == list(range(len(paths)))
        assert [item.path for item in items] == paths
        assert [isinstance(item, Embedded) for item in items] == is_good

    with Embedder(folder, engine="onnxruntime", threads=threads, batch=batch) as embedder:
        is_streamed()


def test_a_stream_without_files_is_empty(folder: Path) -> None:
    with Embedder(folder) as embedder:
        assert list(embedder.stream([], "photo")) == []
        assert embedder.timings == Timings()


@pytest.mark.parametrize("fault", ["zero", "nan"])
def test_an_invalid_row_from_the_model_fails_alone(
    tmp_path: Path, photos: list[Path], fault: str
) -> None:
    """The image (128, 128, 128) has no direction under a model without a bias."""
    bundle = tiny_bundle(tmp_path / "bundle")
    model = tiny_model(bias=0.0)
    if fault == "nan":
        _divide_by_length(model.graph)
    for precision in ("fp32", "int8"):
        (bundle / f"model.{precision}.onnx").write_bytes(model.SerializeToString())
    write_tiny_manifest(bundle)
    grey = tmp_path / "grey.png"
    Image.new("RGB", (100, 100), (128, 128, 128)).save(grey)
    paths = [*photos[:5], grey, *photos[5:10]]
    with Embedder(bundle) as embedder:
        raw = embedder.engine.run(prepare(grey.read_bytes(), "photo").pixels[None], "photo")
        assert np.isnan(raw).all() if fault == "nan" else (raw == 0).all()
        items = list(embedder.stream(paths, "photo"))
        assert [isinstance(item, Failed) for item in items] == [path == grey for path in paths]
        failed = items[5]
        assert isinstance(failed, Failed)
        assert "not of length 1" in failed.reason
        assert failed.source is not None
        with pytest.raises(BadImage, match="not of length 1"):
            embedder.embed_one(grey.read_bytes(), "photo")
        with pytest.raises(BadModel, match="1 of 2 embeddings"):
            pixels = [prepare(path.read_bytes(), "photo").pixels for path in (grey, photos[0])]
            embedder.embed_images(np.stack(pixels), "photo")


def test_paths_are_consumed_lazily_and_in_this_thread(folder: Path, photos: list[Path]) -> None:
    drawn = 0

    def endless() -> Iterator[Path]:
        nonlocal drawn
        for path in itertools.cycle(photos):
            assert threading.current_thread() is here
            drawn += 1
            yield path

    here = threading.current_thread()
    with Embedder(folder, threads=2, batch=8) as embedder:
        stream = embedder.stream(endless(), "photo")
        assert drawn == 0
        for _ in range(100):
            next(stream)
        ahead = drawn - 100
        stream.close()  # type: ignore[attr-defined]
        assert 0 < ahead <= 4 * 8 + 2 * 8
        assert len(list(embedder.stream(photos, "photo"))) == len(photos)


def test_an_error_of_the_paths_reaches_the_caller(folder: Path, photos: list[Path]) -> None:
    def broken() -> Iterator[Path]:
        yield from photos
        raise PermissionError("the folder vanished")

    with Embedder(folder) as embedder, pytest.raises(PermissionError, match="vanished"):
        list(embedder.stream(broken(), "photo"))


def test_an_error_of_the_caller_stops_the_stream(folder: Path, photos: list[Path]) -> None:
    with Embedder(folder) as embedder:
        with pytest.raises(KeyboardInterrupt):
            for item in embedder.stream(itertools.cycle(photos), "photo"):
                if item.index == 20:
                    raise KeyboardInterrupt
        assert len(list(embedder.stream(photos, "photo"))) == len(photos)


def test_a_failing_engine_stops_the_stream(folder: Path, photos: list[Path]) -> None:
    with Embedder(folder, batch=4) as embedder:
        stream = embedder.stream(itertools.cycle(photos), "photo")
        next(stream)
        embedder.engine.close()
        with pytest.raises(EngineUnavailable, match="is closed"):
            for _ in range(1000):
                next(stream)


def test_a_query_during_a_stream_changes_neither(folder: Path, photos: list[Path]) -> None:
    data = photos[3].read_bytes()
    with Embedder(folder, threads=2, batch=4) as embedder:
        alone = embedder.embed_one(data, "photo")[0]
        for item in embedder.stream(photos, "photo"):
            assert isinstance(item, Embedded)
            if item.index % 7 == 0:
                assert np.allclose(embedder.embed_one(data, "photo")[0], alone, atol=1e-6)
        assert embedder.engine.info.lanes == 2
        embedder.embed_one(data, "photo")
        assert embedder.engine.info.lanes == 1


def test_two_streams_can_run_at_once(folder: Path, photos: list[Path]) -> None:
    with Embedder(folder, threads=2, batch=4) as embedder:
        one = embedder.stream(photos, "photo")
        other = embedder.stream(reversed(photos), "photo")
        pairs = list(zip(one, other, strict=True))
    assert [first.path for first, _ in pairs] == photos
    assert [second.path for _, second in pairs] == photos[::-1]


def test_timings_add_up(folder: Path, photos: list[Path]) -> None:
    with Embedder(folder, threads=2) as embedder:
        list(embedder.stream(photos, "photo"))
        once = embedder.timings
        list(embedder.stream(photos, "photo"))
        twice = embedder.timings
    assert once.files == len(photos)
    assert twice.files == 2 * len(photos)
    for name in ("read_s", "decode_s", "preprocess_s", "engine_s", "wall_s"):
        assert 0 < getattr(once, name) < getattr(twice, name)
    assert 0 < once.waiting_s <= once.wall_s


def test_options_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="a batch of 0"):
        Embedder(folder, batch=0)
    with pytest.raises(BadModel, match="no fp16 model"):
        Embedder(folder, precision="fp16")
    with Embedder(folder) as embedder:
        for wrong in (np.zeros((1, 3, 224, 224), np.uint8), np.zeros((1, 224, 224, 3), np.float32)):
            with pytest.raises(BadData, match="uint8"):
                embedder.embed_images(wrong, "photo")  # type: ignore[arg-type]
    with pytest.raises(EngineUnavailable, match="closed"):
        embedder.embed_one(write_sketch(tmp_path / "sketch.png").read_bytes(), "photo")


def test_interrupt_ends_the_process_at_once(folder: Path, photos: list[Path]) -> None:
    script = (
        "import itertools, pathlib, sys\n"
        "from sbtk_runtime import Embedder\n"
        "paths = itertools.cycle(map(pathlib.Path, sys.argv[2:]))\n"
        "with Embedder(sys.argv[1]) as embedder:\n"
        "    for item in embedder.stream(paths, 'photo'):\n"
        "        if item.index == 10:\n"
        "            print('running', flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(folder), *map(str, photos)]
    with subprocess.Popen(
        command, stdout=PIPE, stderr=PIPE, text=True, env=_environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "running\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
        assert process.stderr.read().rstrip().endswith("KeyboardInterrupt")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_photos(folder: Path, photos: list[Path]) -> None:
    few, many = (_peak_mb(folder, photos * times, 2) for times in (3, 30))
    assert many < 700
    # Threads' own pools make some tens of MB of noise; kept pixels alone would be far more.
    assert many - few < 40


def test_many_large_images_are_decoded_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "0.png"
    Image.new("P", (4000, 4000), 7).save(image, transparency=7)
    for index in range(1, 8):
        shutil.copy(image, tmp_path / f"{index}.png")
    # Eight at once would hold 8 x 16 megapixels, twice, in four bytes each: 1 GB.
    assert _peak_mb(folder, sorted(tmp_path.glob("*.png")), 8) < 500


def test_the_memory_budget_admits_what_fits_or_one_large_image() -> None:
    budget = MemoryBudget(10)
    order = []

    def giant() -> None:
        with budget.reserve(100):
            order.append("giant")

    with budget.reserve(6), budget.reserve(4):
        thread = threading.Thread(target=giant)
        thread.start()
        time.sleep(0.05)
        order.append("small")
    thread.join()
    assert order == ["small", "giant"]
    with pytest.raises(RuntimeError), budget.reserve(100):
        raise RuntimeError
    with budget.reserve(10):
        pass


def test_importing_the_runtime_loads_no_heavy_libraries(folder: Path, photos: list[Path]) -> None:
    script = (
        "import sys\n"
        "import sbtk_runtime\n"
        "assert not {'numpy', 'PIL', 'onnxruntime'} & set(sys.modules), 'not lazy'\n"
        "from sbtk_runtime import Bundle, Embedder\n"
        "with Embedder(sys.argv[1]) as embedder:\n"
        "    embedder.embed_one(open(sys.argv[2], 'rb').read(), 'photo')\n"
        "print(*{'torch', 'torchvision', 'onnx', 'click', 'rich'} & set(sys.modules))\n"
    )
    assert run_python(script, folder, photos[0]).strip() == ""


def _peak_mb(folder: Path, paths: list[Path], threads: int) -> int:
    """Return the largest resident memory of a process that embeds the files, in MB."""
    script = (
        "import pathlib, sys\n"
        "from sbtk_runtime.embedding.embedder import Embedder\n"
        "from sbtk_runtime.embedding.stream import Embedded\n"
        "from sbtk_runtime.machine import peak_resident_bytes\n"
        "paths = [pathlib.Path(line) for line in sys.stdin.read().splitlines()]\n"
        "with Embedder(sys.argv[1], threads=int(sys.argv[2])) as embedder:\n"
        "    for item in embedder.stream(paths, 'photo'):\n"
        "        assert isinstance(item, Embedded), item\n"
        "print(peak_resident_bytes() // 1_000_000)\n"
    )
    return int(run_python(script, folder, f"{threads}", stdin="\n".join(map(str, paths))))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _divide_by_length(graph: onnx.GraphProto) -> None:
    """Normalise by a plain division, which gives NaN for the zero row."""
    del graph.node[-1]
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "columns"))
    graph.node.append(helper.make_node("ReduceL2", ["feature", "columns"], ["length"]))
    graph.node.append(helper.make_node("Div", ["feature", "length"], ["embeddings"]))


def test_a_lazy_embedder_opens_its_engine_when_it_is_used(folder: Path) -> None:
    with Embedder(folder, threads=2, batch=4, lazy=True) as embedder:
        assert embedder.dim == 16
        assert list(embedder.stream([], "photo")) == []
        assert embedder._engine is None
        assert embedder.engine.info.lanes == 2
    with pytest.raises(EngineUnavailable, match="closed"):
        _ = embedder.engine
    with pytest.raises(BadConfig, match="abacus"):
        Embedder(folder, engine="abacus", lazy=True)
