"""The cache returns what was stored, and nothing that others may have made."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sbtk_runtime.engines.tensorrt.build import BuildSettings
from sbtk_runtime.engines.tensorrt.cache import (
    NO_DEVICE,
    PlanCache,
    PlanCacheUnusable,
    PlanRecord,
    PlanWanted,
    cache_folder,
)
from sbtk_runtime.errors import BadModel

PLAN = bytes(range(256)) * 40
ONNX_SHA256 = "ab" * 32
H100 = ("NVIDIA H100 80GB HBM3", "9.0")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


def _record(plan: bytes = PLAN, **changes: Any) -> PlanRecord:
    record = PlanRecord(
        model_id="tiny@0123456789ab",
        onnx_sha256=ONNX_SHA256,
        precision="fp16",
        module="tensorrt",
        version="10.16.1.11",
        device=H100[0],
        compute_capability=H100[1],
        settings=BuildSettings(),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        created="2026-11-22T01:00:00Z",
        build_s=12.5,
        sbtk_version="0.1.0",
    )
    return replace(record, **changes)


WANTED = PlanWanted(ONNX_SHA256, "fp16", "tensorrt", "10.16.1.11", *H100)


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    folder = tmp_path / "plans"
    folder.mkdir(mode=0o700)
    return PlanCache(folder)


def _sidecar(cache: PlanCache) -> Path:
    (path,) = cache.folder.glob("*.json")
    return path


def _plan(cache: PlanCache) -> Path:
    (path,) = cache.folder.glob("*.plan")
    return path


def test_a_stored_plan_is_found(cache: PlanCache) -> None:
    path = cache.store(_record(), PLAN)
    search = cache.find(WANTED)
    assert search.found is not None
    assert (search.found.plan, search.found.record) == (PLAN, _record())
    assert search.found.path == path
    assert search.passed_over == ()
    # The file is the plan and nothing else, so trtexec loads it too.
    assert path.read_bytes() == PLAN
    assert [(p.stat().st_mode & 0o777) for p in (path, _sidecar(cache))] == [0o600, 0o600]
    assert {p.suffix for p in cache.folder.iterdir()} == {".plan", ".json"}


def test_the_umask_does_not_make_the_cache_accessible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    before = os.umask(0)
    try:
        cache = PlanCache(cache_folder())
        cache.store(_record(), PLAN)
        assert cache.find(WANTED).found is not None
    finally:
        os.umask(before)
    assert cache.folder == tmp_path / "new" / "cache" / "sbtk" / "plans"
    for path in (cache.folder, cache.folder.parent):
        assert path.stat().st_mode & 0o777 == 0o700
    assert _plan(cache).stat().st_mode & 0o777 == 0o600


def test_access_for_others_to_our_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "sbtk").mkdir(mode=0o755)
    cache_folder()
    assert (tmp_path / "sbtk").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("named", [None, "", "relative/cache"])
def test_without_xdg_the_cache_is_below_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if named is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert cache_folder() == tmp_path / ".cache" / "sbtk" / "plans"


def _link(path: Path) -> None:
    elsewhere = path.parents[1] / path.name
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# What can be wrong with a stored plan, and what the search then says.
ATTACKS: dict[str, tuple[str, Callable[[PlanCache], object]]] = {
    "flipped byte in the plan": ("SHA-256 differs", lambda c: _flip(_plan(c), 5000)),
    "flipped byte in the sidecar": ("not JSON", lambda c: _flip(_sidecar(c), 0)),
    "other hash in the sidecar": ("No such file", lambda c: _edit(c, plan_sha256="0" * 64)),
    "other plan of the same size": (
        "SHA-256 differs",
        lambda c: _plan(c).write_bytes(PLAN[::-1]),
    ),
    "truncated plan": (
        "10,239 bytes, not 10,240",
        lambda c: os.truncate(_plan(c), len(PLAN) - 1),
    ),
    "longer plan": ("over 10,240", lambda c: _plan(c).write_bytes(PLAN + b"\0")),
    "empty plan": ("0 bytes, not 10,240", lambda c: os.truncate(_plan(c), 0)),
    "empty sidecar": ("not JSON", lambda c: os.truncate(_sidecar(c), 0)),
    "truncated sidecar": ("not JSON", lambda c: os.truncate(_sidecar(c), 300)),
    "huge sidecar": ("over 65,536", lambda c: os.truncate(_sidecar(c), 1 << 40)),
    "plan writable by the group": ("may be written by others", lambda c: _plan(c).chmod(0o620)),
    "plan writable by everybody": ("may be written by others", lambda c: _plan(c).chmod(0o602)),
    "sidecar writable by everybody": (
        "may be written by others",
        lambda c: _sidecar(c).chmod(0o666),
    ),
    "plan behind a link": ("is a symbolic link", lambda c: _link(_plan(c))),
    "sidecar behind a link": ("is a symbolic link", lambda c: _link(_sidecar(c))),
    "FIFO for the plan": ("not a regular file", lambda c: _replace(_plan(c), os.mkfifo)),
    "FIFO for the sidecar": ("not a regular file", lambda c: _replace(_sidecar(c), os.mkfifo)),
    "folder for the plan": ("Is a directory", lambda c: _replace(_plan(c), Path.mkdir)),
    "sidecar alone": ("No such file", lambda c: _plan(c).unlink()),
    "newer format": ("made by a newer sbtk", lambda c: _edit(c, format=2, colour="blue")),
    "other version": (
        "it was built by tensorrt 10.16.1.12; this is tensorrt 10.16.1.11",
        lambda c: _edit(c, version="10.16.1.12"),
    ),
    "other device": ("it was built on NVIDIA A100", lambda c: _edit(c, device="NVIDIA A100")),
    "other compute capability": (
        "it was built on NVIDIA H100 80GB HBM3 (8.0)",
        lambda c: _edit(c, compute_capability="8.0"),
    ),
}


def _edit(cache: PlanCache, **changes: object) -> None:
    path = _sidecar(cache)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_plan_that_does_not_match_is_never_returned(cache: PlanCache, name: str) -> None:
    cache.store(_record(), PLAN)
    assert cache.find(WANTED).found is not None
    says, attack = ATTACKS[name]
    attack(cache)
    search = cache.find(WANTED)
    assert search.found is None
    (reason,) = search.passed_over
    assert says in reason
    # It is listed with a reason unless only the machine does not fit; a new plan replaces it.
    (entry, *others) = cache.entries()
    assert entry.reason or name.startswith("other ")
    assert all(other.reason for other in others)
    if name != "folder for the plan":
        cache.store(_record(), PLAN)
        assert cache.find(WANTED).found is not None


@needs_root
@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_files_of_other_users_are_never_read(cache: PlanCache, suffix: str) -> None:
    cache.store(_record(), PLAN)
    (path,) = cache.folder.glob(f"*{suffix}")
    os.chown(path, 12345, 12345)
    search = cache.find(WANTED)
    assert search.found is None
    assert "belongs to user 12345, not to you (0)" in search.passed_over[0]
    os.chown(path, 0, 12345)
    assert cache.find(WANTED).found is not None


def _every_method(cache: PlanCache) -> list[Callable[[], object]]:
    return [
        lambda: cache.find(WANTED),
        lambda: cache.store(_record(), PLAN),
        cache.entries,
        cache.clear,
        lambda: cache.timing_cache("tensorrt", "10.16.1.11", "9.0"),
        lambda: cache.store_timing_cache("tensorrt", "10.16.1.11", "9.0", b"times"),
    ]


def _refused(cache: PlanCache, why: str) -> None:
    for method in _every_method(cache):
        with pytest.raises(PlanCacheUnusable, match=why):
            method()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused(cache: PlanCache, mode: int) -> None:
    cache.store(_record(), PLAN)
    cache.folder.chmod(mode)
    _refused(cache, "may be written by others")
    assert len(list(cache.folder.iterdir())) == 2


@needs_root
def test_a_folder_of_another_user_is_refused(cache: PlanCache) -> None:
    cache.store(_record(), PLAN)
    os.chown(cache.folder, 12345, 12345)
    _refused(cache, "belongs to user 12345")


def test_a_linked_folder_is_refused(cache: PlanCache, tmp_path: Path) -> None:
    cache.store(_record(), PLAN)
    link = tmp_path / "link"
    link.symlink_to(cache.folder)
    _refused(PlanCache(link), "is a symbolic link")
    assert cache.find(WANTED).found is not None


def test_a_missing_folder_and_a_file_in_its_place_are_refused(tmp_path: Path) -> None:
    _refused(PlanCache(tmp_path / "none"), "cannot be opened")
    (tmp_path / "file").write_bytes(b"")
    _refused(PlanCache(tmp_path / "file"), "cannot be opened")


@pytest.mark.parametrize("level", ["sbtk", "sbtk/plans"])
@pytest.mark.parametrize("kind", ["link", "open", "foreign", "file"])
def test_cache_folders_that_are_not_safe_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, kind: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = cache_folder().parents[1] / level
    if kind == "link":
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
    elif kind == "open":
        path.chmod(0o777)
    elif kind == "foreign":
        if os.geteuid() != 0:
            pytest.skip("only root may give folders away")
        os.chown(path, 12345, 12345)
    else:
        path.rename(tmp_path / "moved")
        path.write_bytes(b"")
    with pytest.raises(PlanCacheUnusable, match=str(path)):
        cache_folder()


def test_a_cache_that_cannot_be_made_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    with pytest.raises(PlanCacheUnusable, match="cannot be created"):
        cache_folder()


@pytest.mark.parametrize(
    "change",
    [
        {"onnx_sha256": "cd" * 32},
        {"precision": "fp32"},
        {"module": "tensorrt_rtx"},
        {"settings": BuildSettings(1, 8, 64)},
    ],
)
def test_plans_of_other_models_are_not_mentioned(cache: PlanCache, change: dict[str, Any]) -> None:
    cache.store(_record(), PLAN)
    search = cache.find(replace(WANTED, **change))
    assert (search.found, search.passed_over) == (None, ())


def test_a_plan_that_was_built_without_a_gpu_fits_any(cache: PlanCache) -> None:
    cache.store(_record(module="tensorrt_rtx", device=NO_DEVICE, compute_capability=""), PLAN)
    wanted = replace(WANTED, module="tensorrt_rtx")
    assert cache.find(wanted).found is not None
    assert cache.find(replace(wanted, device=NO_DEVICE, compute_capability="")).found is not None
    assert cache.find(replace(wanted, version="1.8")).found is None


def test_without_a_gpu_a_plan_for_one_is_not_used(cache: PlanCache) -> None:
    cache.store(_record(), PLAN)
    search = cache.find(replace(WANTED, device=NO_DEVICE, compute_capability=""))
    assert search.found is None
    assert "none is here" in search.passed_over[0]


@pytest.mark.parametrize(
    ("batch", "taken"), [(1, 8), (8, 8), (9, 64), (64, 64), (65, 256), (256, 256), (1000, 256)]
)
def test_the_smallest_profile_that_takes_the_batch_is_preferred(
    cache: PlanCache, batch: int, taken: int
) -> None:
    for largest in (64, 8, 256):
        plan = PLAN + bytes([largest - 1])
        cache.store(_record(plan, settings=BuildSettings(1, 4, largest)), plan)
    found = cache.find(replace(WANTED, batch=batch)).found
    assert found is not None
    assert found.record.batch_max == taken
    assert found.plan == PLAN + bytes([taken - 1])
    # One with a damaged plan is passed over for the next best.
    found.path.write_bytes(b"x" * len(found.plan))
    other = cache.find(replace(WANTED, batch=batch))
    assert other.found is not None
    assert other.found.record.batch_max != taken
    assert "SHA-256" in other.passed_over[0]


def test_requested_settings_must_match_the_plan(cache: PlanCache) -> None:
    cache.store(_record(), PLAN)
    assert cache.find(replace(WANTED, settings=BuildSettings())).found is not None
    assert cache.find(replace(WANTED, settings=BuildSettings(workspace_bytes=1))).found is None


def test_a_new_plan_replaces_the_old_one(cache: PlanCache) -> None:
    first = cache.store(_record(), PLAN)
    newer = PLAN + b"newer"
    second = cache.store(_record(newer), newer)
    assert first != second
    assert not first.exists()
    found = cache.find(WANTED).found
    assert found is not None
    assert found.plan == newer
    assert len(cache.entries()) == 1


def test_the_plan_of_a_newer_sbtk_is_kept(cache: PlanCache) -> None:
    newer = cache.store(_record(), PLAN)
    _edit(cache, format=2)
    cache.store(_record(precision="int8"), PLAN)
    assert newer.exists()
    assert sorted(entry.reason for entry in cache.entries())[-1].endswith("made by a newer sbtk")
    assert len(cache.entries()) == 2


def test_entries_list_plans_and_whether_they_are_intact(cache: PlanCache) -> None:
    assert cache.entries() == []
    cache.store(_record(), PLAN)
    other = _record(model_id="other@ba9876543210", onnx_sha256="cd" * 32)
    damaged = cache.store(other, PLAN)
    damaged.write_bytes(b"y" * len(PLAN))
    (cache.folder / "killed.0123456789ab.plan").write_bytes(b"half")
    (cache.folder / "odd.json").write_bytes(b"[]")
    odd, damaged_entry, sound, killed = cache.entries()
    assert (odd.path.name, odd.record, odd.size_bytes) == ("odd.json", None, 2)
    assert "not a JSON object" in odd.reason
    assert (damaged_entry.path, damaged_entry.record) == (damaged, other)
    assert "damaged" in damaged_entry.reason
    assert (sound.record, sound.size_bytes, sound.reason) == (_record(), len(PLAN), "")
    assert (killed.path.name, killed.size_bytes) == ("killed.0123456789ab.plan", 4)
    assert "no sidecar" in killed.reason


@pytest.mark.parametrize("model", ["tiny", "tiny@0123456789ab"])
def test_one_models_plans_are_cleared(cache: PlanCache, model: str) -> None:
    cache.store(_record(), PLAN)
    cache.store(_record(precision="int8"), PLAN)
    other = cache.store(_record(model_id="tiny2@ba9876543210", onnx_sha256="cd" * 32), PLAN)
    cleared = cache.clear(model)
    assert cleared.plans == 2
    assert cleared.size_bytes > 2 * len(PLAN)
    assert [entry.path for entry in cache.entries()] == [other]
    assert cache.clear("none").plans == 0


def test_everything_is_cleared_and_links_are_not_followed(cache: PlanCache, tmp_path: Path) -> None:
    cache.store(_record(), PLAN)
    cache.store_timing_cache("tensorrt", "10", "9.0", b"times")
    (cache.folder / "odd.json").write_bytes(b"[]")
    (tmp_path / "precious").write_bytes(b"mine")
    (cache.folder / "link.plan").symlink_to(tmp_path / "precious")
    cleared = cache.clear()
    assert cleared.plans == 2
    assert list(cache.folder.iterdir()) == []
    assert (tmp_path / "precious").read_bytes() == b"mine"


def test_timing_caches_are_read_back_or_empty(cache: PlanCache) -> None:
    key = ("tensorrt", "10.16.1.11", "9.0")
    assert cache.timing_cache(*key) == b""
    cache.store_timing_cache(*key, b"times")
    assert cache.timing_cache(*key) == b"times"
    assert cache.timing_cache("tensorrt", "10.16.1.11", "8.9") == b""
    assert cache.timing_cache("tensorrt", "10.16.1.12", "9.0") == b""
    (path,) = cache.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"z")
    assert cache.timing_cache(*key) == b""
    path.write_bytes(b"")
    assert cache.timing_cache(*key) == b""
    path.unlink()
    os.mkfifo(path, 0o600)
    assert cache.timing_cache(*key) == b""


# Stores a plan again and again, each time killed one system call later, until it goes through;
# after each attempt prints its exit status and what is found then. Forks, because a start takes
# a second.
_KILLED_STORES = """
import os, signal, sys
from pathlib import Path
from tests.runtime.engines.tensorrt.test_cache import PLAN, WANTED, _record
from sbtk_runtime.engines.tensorrt.cache import PlanCache

cache, plan = PlanCache(Path(sys.argv[1])), PLAN + b"new"
record = _record(plan)

def store(calls):
    def count(event, arguments):
        nonlocal calls
        if event in ("open", "os.rename", "os.remove", "os.listdir"):
            calls -= 1
            if calls < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    cache.store(record, plan)
    os._exit(0)

for calls in range(100):
    child = os.fork()
    if child == 0:
        store(calls)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = cache.find(WANTED).found
    print(status, found.plan[len(PLAN):].decode() if found else "none")
    if status == 0:
        break
"""


@pytest.mark.parametrize("is_replacing", [False, True])
def test_a_killed_store_leaves_the_old_plan_or_none(cache: PlanCache, is_replacing: bool) -> None:
    before = "none"
    if is_replacing:
        before = "old"
        cache.store(_record(PLAN + b"old"), PLAN + b"old")
    root = Path(__file__).parents[4]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_STORES, str(cache.folder)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    *killed, last = done.stdout.split("\n")[:-1]
    # The new plan is there from one moment on, and until then the old one, or none.
    seen = [line.removeprefix("-9 ") for line in killed]
    first_new = seen.index("new")
    assert first_new > 5
    assert set(seen[:first_new]) == {before}
    assert set(seen[first_new:]) == {"new"}
    assert last == "0 new"
    # What the killed ones left is gone.
    assert {path.suffix for path in cache.folder.iterdir()} == {".plan", ".json"}
    assert len(cache.entries()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"format": 0},
        {"format": True},
        {"format": "1"},
        {"plan_sha256": "xyz"},
        {"plan_sha256": "../" * 10 + "0" * 34},
        {"onnx_sha256": 5},
        {"precision": "fp8"},
        {"plan_bytes": 0},
        {"plan_bytes": -1},
        {"plan_bytes": 1 << 70},
        {"plan_bytes": 1.5},
        {"build_s": None},
        {"build_s": float("nan")},
        {"device": "x" * 1000},
        {"device": "a\nb"},
        {"settings": []},
        {"settings": {"batch_max": 4}},
        {"settings": {**BuildSettings().__dict__, "batch_min": 0}},
        {"settings": {**BuildSettings().__dict__, "batch_min": True}},
        {"unknown": 1},
    ],
)
def test_odd_sidecars_are_refused(change: dict[str, object]) -> None:
    good = _record().to_json()
    assert PlanRecord.from_json(good) == _record()
    with pytest.raises(BadModel, match="its sidecar"):
        PlanRecord.from_json(json.dumps({**json.loads(good), **change}).encode())


@pytest.mark.parametrize("missing", sorted(json.loads(_record().to_json())))
def test_every_field_of_a_sidecar_is_required(missing: str) -> None:
    value = json.loads(_record().to_json())
    del value[missing]
    with pytest.raises(BadModel, match="its sidecar"):
        PlanRecord.from_json(json.dumps(value).encode())


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b"[" * 60_000, b'{"format": ' + b"9" * 9999]
)
def test_sidecars_that_are_not_json_objects_are_refused(content: bytes) -> None:
    with pytest.raises(BadModel, match="its sidecar"):
        PlanRecord.from_json(content)


@pytest.mark.parametrize("name", ["../../evil", ".hidden", "", "a/b", "x" * 150, "naïve name"])
def test_any_model_name_gives_a_plan_inside_the_folder(cache: PlanCache, name: str) -> None:
    path = cache.store(_record(model_id=f"{name}@0123456789ab"), PLAN)
    assert path.parent == cache.folder
    assert cache.find(WANTED).found is not None
    assert len(list(cache.folder.iterdir())) == 2
    assert cache.clear(name).plans == 1
