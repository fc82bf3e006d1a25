"""What every test may rely on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell that runs its commands in the background lets them ignore Ctrl-C, and so would every
# process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each of xdist's workers has a core to itself. Before anything imports NumPy or torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

#: Folders whose files share something that is expensive to make, and so run in one worker.
_TOGETHER = ("tests/browser", "tests/export")
#: What `make test` leaves out.
_LONG = ("slow", "browser", "kill", "install")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks the tests in Chromium, and keeps the tests of a file in one worker."""
    path = item.path.relative_to(item.config.rootpath)
    folder = path.parent.as_posix()
    if folder == "tests/browser":
        item.add_marker(pytest.mark.browser)
    if item.get_closest_marker("xdist_group") is None:
        name = folder if folder in _TOGETHER else path.with_suffix("").as_posix()
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Starts with the files that take longest, where several workers share the tests."""
    if not hasattr(config, "workerinput"):
        return
    long = {
        _group(item)
        for item in items
        if any(item.get_closest_marker(mark) is not None for mark in _LONG)
    }
    items.sort(key=lambda item: _group(item) not in long)


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return str(marker.args[0])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Gives this process, and those that it starts, a cache folder of its own.

    All but matplotlib's list of fonts, which takes seconds to make.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    with pytest.MonkeyPatch.context() as patch:
        if "MPLCONFIGDIR" not in os.environ:
            patch.setenv("MPLCONFIGDIR", str(Path(home) / "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
