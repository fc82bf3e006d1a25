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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of a file in one worker, and starts with the files that take longest."""
    for item in items:
        if item.path.parent == config.rootpath / "tests" / "browser":
            item.add_marker(pytest.mark.browser)
    if not hasattr(config, "workerinput"):
        return
    groups: dict[str, bool] = {}
    for item in items:
        path = item.path.relative_to(config.rootpath)
        folder = path.parent.as_posix()
        name = folder if folder in _TOGETHER else path.with_suffix("").as_posix()
        if (chosen := item.get_closest_marker("xdist_group")) is not None:
            name = str(chosen.args[0])
        else:
            item.add_marker(pytest.mark.xdist_group(name))
        is_long = any(item.get_closest_marker(one) is not None for one in _LONG)
        groups[name] = groups.get(name, False) or is_long
    items.sort(key=lambda item: not groups[_group(item)])


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
