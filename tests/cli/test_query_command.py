"""`sbtk query` as users type it: files and pipes in, text, JSON, paths and pages out."""

from __future__ import annotations

import base64
import datetime
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sbtk_cli.main import main
from tests.processes import run_python
from tests.tiny import tiny_bundle

QUERY = ["query", "sketch.png", "--threads", "1"]


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_each_hit_is_printed_on_a_line(
    shared_gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUERY, "-k", "3"]) == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert [rank for rank, _, _ in lines] == ["1", "2", "3"]
    scores = [float(score) for _, score, _ in lines]
    assert scores == sorted(scores, reverse=True)
    assert all(Path(path).is_file() for _, _, path in lines)
    assert shown.err == ""


def test_json_lines_have_the_documented_fields(
    shared_gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUERY, "--json", "-k", "2"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(hit) for hit in hits] == [["rank", "score", "id", "path"]] * 2
    assert hits[0]["rank"] == 1
    assert os.path.isabs(hits[0]["path"])  # noqa: PTH117


def test_file_names_with_any_bytes_are_printed_unchanged(
    workplace: Path,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    name = b"not \xff utf-8\n\x1b[31m.png"
    photo = workplace / "photos" / os.fsdecode(name)
    (workplace / "photos" / "photo-0001.png").rename(photo)
    assert main(["index", os.fspath(photo), "--model", "tiny"]) == 0
    capfdbinary.readouterr()
    assert main([*QUERY, "--paths0"]) == 0
    assert capfdbinary.readouterr().out == os.fsencode(photo) + b"\0"
    assert main([*QUERY, "--json"]) == 0
    hit = json.loads(capfdbinary.readouterr().out)
    assert base64.b64decode(hit["path_bytes"]) == os.fsencode(photo)
    assert main(QUERY) == 0
    assert capfdbinary.readouterr().out.endswith(rb"not \xff utf-8\n\x1b[31m.png" + b"\n")


def test_a_sketch_from_a_pipe_gives_the_hits_of_its_file(
    shared_gallery: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(QUERY) == 0
    from_file = capsys.readouterr().out
    pipe_in(monkeypatch, Path("sketch.png").read_bytes())
    assert main(["query", "-", "--threads", "1"]) == 0
    assert capsys.readouterr().out == from_file


def test_a_photo_is_detected_and_the_option_as_overrules_it(
    shared_gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = str(shared_gallery.parent / "photos" / "photo-0005.png")
    query = ["query", photo, "--threads", "1", "-k", "3"]
    assert main([*query, "--as", "photo"]) == 0
    as_photo = capsys.readouterr()
    assert as_photo.err == ""
    assert main(query) == 0
    detected = capsys.readouterr()
    assert detected.out == as_photo.out
    assert detected.err == (
        f"{photo} looks like a photo and is searched as one; to search it as a sketch: "
        "--as sketch\n"
    )
    assert main([*query, "--as", "sketch"]) == 0
    as_sketch = capsys.readouterr()
    assert as_sketch.out != as_photo.out
    assert as_sketch.err == ""


def test_a_photo_finds_itself(shared_gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = shared_gallery.parent / "photos" / "photo-0005.png"
    for search in ("auto", "exact", "codes", "hnsw"):
        assert main(["query", str(photo), "--as", "photo", "-k", "1", "--search", search]) == 0
        rank, score, path = capsys.readouterr().out.split()
        assert (rank, path) == ("1", str(photo))
        assert float(score) > 0.999


def test_from_and_to_limit_the_days_of_photos(
    shared_gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    today = datetime.date.today()
    before, after = (str(today + datetime.timedelta(days=days)) for days in (-2, 2))
    assert main([*QUERY, "-k", "2", "--from", before, "--to", after]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert f"photos from {before} to {after} without a date" in shown.err
    assert main([*QUERY, "--to", before]) == 0
    assert capsys.readouterr().out == ""
    assert main([*QUERY, "--from", after, "--to", before]) == 2
    assert f"photos from {after} to {before}" in capsys.readouterr().err
    for wrong in ("yesterday", "2024-02-30", "05/01/2024", "2024-05-01T12:00", ""):
        assert main([*QUERY, "--from", wrong]) == 2
        assert f"{wrong!r} is not a day" in capsys.readouterr().err


def test_the_contact_sheet_is_written_in_addition_to_the_hits(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUERY, "-k", "2", "--html", "sheet.html", "--json"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert shown.err == "contact sheet: sheet.html\n"
    page = (workplace / "sheet.html").read_text()
    assert page.count('<li class="card" style') == 2
    assert "gallery.sbtk" in page


def test_the_contact_sheet_is_written_even_if_the_pipe_is_closed(
    gallery: Path, workplace: Path
) -> None:
    query = [sys.executable, "-m", "sbtk_cli", *QUERY, "-k", "8", "--html", "sheet.html"]
    reads, writes = os.pipe()
    os.close(reads)
    finished = subprocess.run(query, stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert (finished.returncode, finished.stderr) == (0, b"contact sheet: sheet.html\n")
    assert (workplace / "sheet.html").read_text().count('<li class="card" style') == 8


def test_images_in_the_terminal_check_their_extra_before_the_query(
    shared_gallery: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "textual_image", None)
    assert main([*QUERY, "--show"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert 'next: pip install "sbtk[show]"' in shown.err


def test_a_pipe_gets_the_list_and_why_there_are_no_images(
    shared_gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUERY, "-k", "2", "--show"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert shown.err == "no images: standard output is not a terminal\n"
    assert main([*QUERY, "-k", "2", "--show", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_notices_go_to_stderr_and_can_be_silenced(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sketch = Image.open(workplace / "sketch.png").convert("L").point(lambda value: 255 - value)
    sketch.save(workplace / "sketch.png")
    (workplace / "photos" / "photo-0000.jpg").unlink()
    assert main([*QUERY, "-k", "50"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 8
    assert "inverted" in shown.err
    assert "only 8 photos" in shown.err
    assert "1 of these 8 photos no longer exist" in shown.err
    assert main([*QUERY, "-k", "50", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_the_model_that_made_the_gallery_is_found(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bundle(workplace / "bundles" / "aaa", seed=5, name="aaa")
    assert main(QUERY) == 0
    capsys.readouterr()
    assert main([*QUERY, "--model", "aaa"]) == 1
    printed = capsys.readouterr().err
    assert "tiny@" in printed
    assert "aaa@" in printed
    assert "next: sbtk index" in printed


def test_the_error_names_the_missing_model_of_a_gallery(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "bundles").rename(workplace / "elsewhere")
    assert main(QUERY) == 1
    assert "tiny@" in capsys.readouterr().err
    assert main([*QUERY, "--model", "elsewhere/tiny"]) == 0


def test_a_closed_standard_input_gives_the_same_error_as_an_empty_pipe(
    shared_gallery: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Python has it after `sbtk query - <&-`.
    monkeypatch.setattr("sys.stdin", None)
    assert main(["query", "-"]) == 2
    assert "nothing is piped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["query", "absent.png"], 1, "absent.png: cannot be read: No such file"),
        (["query", "photos"], 1, "photos: cannot be read: Is a directory"),
        (["query", "TMP/text.png"], 1, "text.png: not an image"),
        (["query", "TMP/empty.png"], 1, "empty.png: the sketch is empty"),
        (["query", "https://example.org/cat.png"], 1, "is a URL"),
        (["query", "-"], 1, "standard input: "),
        (["query", "sketch.png", "--gallery", "none.sbtk"], 1, "sbtk index PHOTOS --gallery none"),
        (["query", "sketch.png", "--gallery", ""], 2, "an empty path"),
        (["query", ""], 2, "an empty path"),
        (["query", "sketch.png", "-k", "0"], 2, "-k"),
        (["query", "sketch.png", "-k", "1e3"], 2, "'1e3' is not a valid integer."),
        (["query", "sketch.png", "--as", "poem"], 2, "--as"),
        (["query", "sketch.png", "--json", "--paths0"], 2, "--paths0"),
        (["query", "sketch.png", "--show", "--json"], 2, "--show cannot be combined"),
        (["query", "sketch.png", "--show-as", "kitty", "--paths0"], 2, "--show cannot be combined"),
        (["query", "sketch.png", "--show-as", "oil"], 2, "oil"),
        (["query", "sketch.png", "--html", "no/where.html"], 2, "no/where.html"),
        (["query", "sketch.png", "--html", "photos"], 2, "photos is not a file"),
        (["query", "sketch.png", "--engine", "warp"], 2, "warp"),
        (["query", "sketch.png", "--precision", "fp16"], 1, "fp16"),
        (["query"], 2, "SKETCH"),
    ],
)
def test_queries_that_cannot_be_answered_say_why(
    shared_gallery: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (64, 64), 255).save(tmp_path / "empty.png")
    arguments = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    pipe_in(monkeypatch, b"")
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert "Traceback" not in shown.err


def test_a_query_imports_only_what_it_needs(shared_gallery: Path) -> None:
    code = (
        "import json, sys\n"
        # As on a machine without the extras for GPUs, which auto would have to look at.
        "sys.modules.update(tensorrt=None, tensorrt_rtx=None)\n"
        "from sbtk_cli.main import main\n"
        "code = main(['query', 'sketch.png', '-q', '--threads', '1'])\n"
        "print(json.dumps([code, sorted(sys.modules)]))\n"
    )
    exit_code, modules = json.loads(run_python(code).splitlines()[-1])
    assert exit_code == 0
    assert not set(modules) & {
        "torch",
        "onnx",
        "rich",
        "importlib.metadata",
        "sbtk_runtime.contact_sheet",
    }


@pytest.mark.parametrize("rerank", ["expand", "diffusion"])
def test_an_indexed_gallery_can_be_reranked(
    shared_gallery: Path, capsys: pytest.CaptureFixture[str], rerank: str
) -> None:
    assert main([*QUERY, "--json"]) == 0
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main([*QUERY, "--json", "--rerank", rerank]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {hit["id"] for hit in plain} == {hit["id"] for hit in again}
    scores = {hit["id"]: hit["score"] for hit in plain}
    assert all(hit["score"] == pytest.approx(scores[hit["id"]], abs=1e-5) for hit in again)
