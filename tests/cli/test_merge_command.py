"""`sbtk index --shard` and `sbtk merge`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sbtk_cli.main import main
from tests.tiny import tiny_bundle, write_photos


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_bundle(tmp_path / "bundles" / "tiny")
    write_photos(tmp_path / "photos", 9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SBTK_GALLERY", raising=False)
    return tmp_path


def shard(number: int, count: int, *options: str) -> int:
    asked = f"{number}/{count}"
    words = ["index", "photos", "--model", "tiny", "--threads", "1", "--shard", asked]
    return main([*words, "--gallery", f"{number}-of-{count}.sbtk", *options])


def test_shards_are_indexed_and_merged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = 0
    for number in (1, 2, 3):
        assert shard(number, 3, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["live"] + report["other_shards"] == 9
        live += report["live"]
    assert live == 9
    names = [f"{number}-of-3.sbtk" for number in (1, 2, 3)]
    assert main(["merge", *names, "--gallery", "all.sbtk"]) == 0
    assert capsys.readouterr().out.startswith("9 photos searchable (9 copied) in ")
    assert main(["merge", *names, "--gallery", "all.sbtk", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["copied"], report["live"], report["gallery"]) == (0, 9, "all.sbtk")
    assert main(["merge", names[0], "--gallery", "part.sbtk"]) == 3
    error = capsys.readouterr().err
    assert f"no gallery holds shards 2/3 of {place}/photos, 3/3 of {place}/photos: " in error
    assert "different paths" not in error
    write_photos(place / "others", 9, seed=1)
    words = ["--model", "tiny", "--threads", "1", "--shard", "2/3", "--gallery", "other.sbtk"]
    assert main(["index", "others", *words]) == 0
    assert main(["merge", *names, "other.sbtk", "--gallery", "all.sbtk"]) == 3
    error = capsys.readouterr().err
    assert f"1/3 of {place}/others, 3/3 of {place}/others: " in error
    assert main(["merge", names[0], "other.sbtk", "--gallery", "all.sbtk"]) == 3
    assert "A folder that machines index by different paths counts as several" in (
        capsys.readouterr().err
    )


def test_usage_errors_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, text in (
        (["index", "photos", "--shard", "4/3"], 2, "such as 1/4 for the first of four"),
        (["index", "--list-folders", "--shard", "1/3"], 2, "--shard requires the folders"),
        (["merge", "--gallery", "all.sbtk"], 2, "Missing argument 'GALLERIES...'"),
        (["merge", "none.sbtk", "--gallery", "all.sbtk"], 1, "there is no gallery none.sbtk"),
    ):
        assert main(words) == code
        assert text in capsys.readouterr().err
    assert shard(1, 2) == shard(1, 3) == 0
    capsys.readouterr()
    assert main(["merge", "1-of-2.sbtk", "1-of-3.sbtk", "--gallery", "all.sbtk"]) == 1
    error = capsys.readouterr().err
    assert "1-of-2.sbtk is shard 1/2, 1-of-3.sbtk is shard 1/3" in error
    assert "next: index again with --shard I/2" in error
    assert not (place / "all.sbtk").exists()
