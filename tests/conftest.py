"""Hooks and fixtures of all tests."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

    from sbtk_runtime.embedding.embedder import Embedder

# Examples take longer on a busy machine.
settings.register_profile("sbtk", deadline=None)
settings.load_profile("sbtk")

# A shell that runs its commands in the background lets them ignore Ctrl-C, and nohup a hangup; so
# would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Each of xdist's workers has a core to itself. Before anything imports NumPy or torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

#: Folders whose files share something that is expensive to make, and so run in one worker.
_TOGETHER = ("tests/browser", "tests/export")
#: What `make test` leaves out.
_LONG = ("slow", "browser", "kill", "install")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests in Chromium; where workers share the tests, the longest files come first."""
    for item in items:
        if _group(item.nodeid) == "tests/browser":
            item.add_marker(pytest.mark.browser)
    if not hasattr(config, "workerinput"):
        return
    long = {
        _group(item.nodeid)
        for item in items
        if any(item.get_closest_marker(mark) is not None for mark in _LONG)
    }
    items.sort(key=lambda item: _group(item.nodeid) not in long)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Keep the tests of a file, or of a folder that shares much, in one worker.

    xdist's own groups, `--dist loadgroup`, do nothing with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return ByFile(config, log)


def _group(nodeid: str) -> str:
    path = nodeid.partition("::")[0]
    folder = path.rpartition("/")[0]
    return folder if folder in _TOGETHER else path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give this process, and those that it starts, a cache folder of its own.

    All but matplotlib's list of fonts, which takes seconds to make.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    with pytest.MonkeyPatch.context() as patch:
        if "MPLCONFIGDIR" not in os.environ:
            patch.setenv("MPLCONFIGDIR", str(Path(home) / "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def narrow_resnet18() -> Iterator[None]:
    """Give ResNet18 a quarter of its channels and half of its blocks."""
    from tests.narrow_resnet import NarrowResNet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models.resnet18", NarrowResNet)
        yield


@pytest.fixture(scope="session")
def operators_listed_once() -> Iterator[None]:
    """Let torch's ONNX exporter list its operators once, not for each export of a tiny network."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        listed = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
        patch.setattr(ONNXRegistry, "from_torchlib", listed)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of six classes; tests must not change it."""
    from tests.tiny_data import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def embedder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Embedder]:
    """A tiny model, as wide as the test file's DIM and with codes of its BITS, if it has them."""
    from sbtk_runtime.embedding.embedder import Embedder
    from tests.tiny_gallery import tiny_code_bundle

    dim, bits = (getattr(request.module, name, None) for name in ("DIM", "BITS"))
    folder = tmp_path_factory.mktemp("bundle")
    bundle = tiny_code_bundle(folder, *filter(None, [bits]), dim=dim or 16)
    with Embedder(bundle, engine="onnxruntime", threads=1, batch=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of the test file's COUNT random rows of DIM numbers."""
    from tests.tiny_gallery import gallery_of, unit_rows

    folder = tmp_path_factory.mktemp("good") / "g.sbtk"
    gallery_of(folder, unit_rows(request.module.COUNT, request.module.DIM))
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the gallery `good`, with its times of modification."""
    return Path(shutil.copytree(good, tmp_path / "g.sbtk"))
