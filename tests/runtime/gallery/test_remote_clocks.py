"""Pushes from machines whose clocks are hours ahead or behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sbtk_runtime.gallery.push import push_gallery
from sbtk_runtime.gallery.remote import open_store
from tests.skewed_clock import skewed_by
from tests.tiny_gallery import gallery_of, unit_rows
from tests.tiny_remote import push

COUNT, DIM = 60, 16
_PUSH = """
import os, sys, time
from pathlib import Path
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.gallery.push import push_gallery
from sbtk_runtime.gallery.remote import open_store

def progress(done, total):
    if done >= int(sys.argv[3]):
        os.kill(os.getpid(), 9)

print(time.time())
try:
    store = open_store(sys.argv[2], patience_s=1)
    print(push_gallery(Path(sys.argv[1]), store, "nas", progress=progress, batch=20).unchanged)
except SbtkError as problem:
    print(problem.found)
"""


@pytest.mark.kill
@pytest.mark.parametrize("shift_h", [-7, 7])
def test_a_claim_holds_whatever_the_clocks_say(url: str, tmp_path: Path, shift_h: int) -> None:
    gallery = tmp_path / "g.sbtk"
    gallery_of(gallery, unit_rows(COUNT, DIM))
    environment = os.environ | skewed_by(tmp_path, 3600 * shift_h)

    def push_there(kill_at: int) -> tuple[int, str]:
        command = [sys.executable, "-c", _PUSH, str(gallery), url, str(kill_at)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        clock, *answer = done.stdout.splitlines() or ["0"]
        if not done.returncode:
            assert abs(float(clock) - time.time() - 3600 * shift_h) < 300
        return done.returncode, "".join(answer)

    begun, go_on = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        begun.set()
        assert go_on.wait(120)

    thread = threading.Thread(
        target=lambda: push_gallery(gallery, open_store(url), "nas", progress=wait, batch=20)
    )
    thread.start()
    try:
        assert begun.wait(60)
        # Its claim is not taken for one that has ended long ago.
        code, answer = push_there(COUNT + 1)
        assert code == 0 and answer.startswith("another push of these photos to")
    finally:
        go_on.set()
        thread.join()
    assert push_there(COUNT + 1) == (0, str(COUNT))
    # What a killed push claimed is not held until the clock here has caught up.
    gallery_of(gallery.with_name("more.sbtk"), unit_rows(2 * COUNT, DIM))
    gallery = gallery.with_name("more.sbtk")
    assert push_there(COUNT + 20)[0] == -9
    report = push(gallery, url, patience_s=20)
    assert (report.pushed + report.unchanged, report.deleted) == (2 * COUNT, 0)
    assert report.pushed == COUNT - 20
