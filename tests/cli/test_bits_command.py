"""`--bits` as users type it: a binary gallery from index to query, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sbtk_cli.main import main
from sbtk_runtime.bundle import Bundle
from tests.tiny_gallery import tiny_code_bundle

INDEX = ["index", "photos", "--model", "coded", "--threads", "1"]


@pytest.fixture
def coded(workplace: Path) -> Path:
    """A workplace that also holds `bundles/coded`, the tiny model with codes of 8 and 16 bits."""
    tiny_code_bundle(workplace / "bundles" / "coded", 8, 16)
    return workplace


@pytest.fixture
def binary(coded: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Its photos as 16-bit codes in `gallery.sbtk`."""
    assert main([*INDEX, "--bits", "16"]) == 0
    capsys.readouterr()
    return coded


def test_a_binary_gallery_is_indexed_queried_updated_verified_and_exported(
    binary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (binary / "gallery.sbtk" / "vectors" / "000000.bits").stat().st_size == 8 * 2
    query = ["query", "photos/photo-0003.png", "--as", "photo", "--threads", "1", "-q"]
    assert main([*query, "--json", "-k", "3", "--html", "sheet.html"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert hits[0]["score"] == 1.0
    assert hits[0]["path"] == str(binary / "photos" / "photo-0003.png")
    assert all(hit["score"] == round(hit["score"] * 8) / 8 for hit in hits)
    assert (binary / "sheet.html").stat().st_size > 1000
    # The gallery knows what it keeps, and which model that takes.
    (binary / "photos" / "photo-0000.jpg").unlink()
    assert main(["index", "photos", "--threads", "1"]) == 0
    assert "7 photos searchable (1 missing)" in capsys.readouterr().out
    assert main(["index", "--verify"]) == 0
    assert "7 of 7 sampled ones find themselves by their codes" in capsys.readouterr().out
    assert main(["index", "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits"] == 16
    assert main(["index", "--export", "out"]) == 0
    assert "codes.npy" in capsys.readouterr().out
    assert np.load("out/codes.npy").shape == (7, 2)


def test_a_binary_gallery_refuses_a_graph(binary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", "sketch.png", "--search", "hnsw", "--threads", "1"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "16-bit codes has no HNSW graph" in shown.err
    assert "searched exactly" in shown.err
    assert main(["query", "sketch.png", "--search", "exact", "--threads", "1"]) == 0


def test_a_gallery_of_embeddings_does_not_become_binary(
    gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", "photos", "--bits", "64"]) == 1
    shown = capsys.readouterr().err
    assert "gallery.sbtk keeps embeddings, not 64-bit codes" in shown
    assert "next: sbtk index PHOTOS --bits 64 --gallery gallery-64bit.sbtk" in shown
    assert "onnxruntime" not in shown  # told before an engine was made ready


def test_a_model_without_codes_says_how_to_export_them(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed = ["embed", "sketch.png", "--as", "sketch", "-o", "out.npz"]
    for command in (["index", "photos"], embed):
        assert main([*command, "--model", "tiny", "--bits", "64"]) == 1
        shown = capsys.readouterr().err
        assert "has no 64-bit codes" in shown
        assert "sbtk export RUN --bits 64" in shown
    assert not (workplace / "gallery.sbtk").exists()
    assert not (workplace / "out.npz").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["index", "photos", "--bits", "12"], "12 is not a multiple of 8"),
        (["index", "photos", "--bits", "0"], "0 is not in the range"),
        (["index", "--verify", "--bits", "16"], "--bits requires"),
    ],
)
def test_invalid_code_lengths_are_usage_errors(
    coded: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_embed_writes_codes_with_the_embeddings(coded: Path) -> None:
    embed = ["embed", "--model", "coded", "--threads", "1", "-o", "out.npz", "--as", "photo", "-q"]
    assert main([*embed, "--bits", "16", "photos/photo-0001.png", "photos/photo-0002.jpg"]) == 0
    with np.load(coded / "out.npz", allow_pickle=False) as file:
        assert set(file.files) == {"paths", "embeddings", "codes"}
        codes, embeddings = file["codes"], file["embeddings"]
    assert (codes.shape, codes.dtype) == ((2, 2), np.uint8)
    itq = Bundle.open(coded / "bundles" / "coded").itq(16)
    np.testing.assert_array_equal(
        np.unpackbits(codes, axis=1), (embeddings - itq.mean) @ itq.projection > 0
    )


def test_models_doctor_and_bench_show_codes(
    binary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "bundles/coded" in line]
    assert "16, 8 bits, 16 bits" in line
    assert main(["models", "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    bits = {Path(entry["folder"]).name: entry["bits"] for entry in listed}
    assert (bits["coded"], bits["tiny"]) == ([8, 16], [])
    main(["doctor", "--model", "coded"])
    assert "8 photos searchable as 16-bit codes" in capsys.readouterr().out
    assert main(["bench", "search", "-k", "2", "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)["search"]
    assert "16-bit codes" in report["vectors"]
    assert [(point["name"], point["recall"]) for point in report["points"]] == [("exact", 1.0)]
