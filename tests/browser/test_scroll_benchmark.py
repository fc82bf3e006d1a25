"""The benchmark that scrolls a large gallery reaches its last photo."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.commands import run
from tests.tiny import write_photos


def test_the_page_is_scrolled_to_the_last_photo(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 60)
    command = ["-m", "benchmarks.page_scroll", "--photos", f"{tmp_path / 'photos'}", "--json"]
    found = json.loads(run([sys.executable, *command, "--count", "60"]))["figures"]
    assert found["scroll"][-1]["photo"] == 60
    assert found["blank"] == 0
