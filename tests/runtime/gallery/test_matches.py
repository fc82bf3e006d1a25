"""Hits of sketches carry whether they are close, by the rule of the model that embedded them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtk_cli.main import main
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.gallery import Gallery, Hit
from sbtk_runtime.gallery.queries import Answer
from sbtk_runtime.manifest import MatchRule, read_bundle_manifest
from tests.tiny import tiny_bundle, write_photos, write_sketch
from tests.tiny_gallery import gallery_of, index, tiny_code_bundle, unit_rows

#: Among 300 photos, close from a cosine of 0.3.
RULE = MatchRule(0.3 - 0.1 * float(np.log10(300)), 0.1)


def set_rule(bundle: Path, rule: MatchRule) -> None:
    replace(read_bundle_manifest(bundle), match_rule=rule).write(bundle)


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=20),
    st.floats(0, 0.5),
    st.floats(0, 0.2),
    st.integers(1, 10**9),
)
def test_a_hit_is_close_from_the_lowest_close_cosine(
    scores: list[float], intercept: float, per_decade: float, photos: int
) -> None:
    rule = MatchRule(intercept, per_decade)
    hits = [Hit(rank, score, rank, "/p") for rank, score in enumerate(scores, start=1)]
    answer = Answer(hits, ("a notice",)).judged(max(scores), rule, photos)
    lowest = rule.lowest_close(photos)
    assert [hit.match == "good" for hit in answer.hits] == [score >= lowest for score in scores]
    assert answer.no_close_match == (max(scores) < lowest)
    assert answer.notices == ("a notice",)
    # More photos never make a hit closer.
    among_more = Answer(hits).judged(None, rule, photos * 10)
    assert among_more.no_close_match is None
    for hit, later in zip(answer.hits, among_more.hits, strict=True):
        assert (hit.match, later.match) != ("weak", "good")


def test_hits_are_marked_by_the_number_of_photos_that_were_searched(tmp_path: Path) -> None:
    gallery_of(tmp_path / "g.sbtk", unit_rows(300, 16))
    query = unit_rows(1, 16, seed=5)[0]
    with Gallery.open(tmp_path / "g.sbtk") as gallery:
        plain = gallery.search(query, 300)
        assert {hit.match for hit in plain} == {None}
        assert gallery.answer(query, 300).no_close_match is None
        marked = gallery.search(query, 300, match_rule=RULE)
        assert [replace(hit, match=None) for hit in marked] == plain
        assert [hit.match == "good" for hit in marked] == [hit.score >= 0.3 for hit in plain]
        assert {hit.match for hit in marked} == {"good", "weak"}
        # Ten photos are in a folder: there, a cosine is close from less.
        few = gallery.search(query, 10, under="/photos/0003", match_rule=RULE)
        lowest = RULE.lowest_close(10)
        assert [hit.match == "good" for hit in few] == [hit.score >= lowest for hit in few]


@pytest.mark.parametrize(("intercept", "is_close"), [(-1.0, True), (1.1, False)])
def test_hits_of_sketches_are_marked_and_those_of_photos_are_not(
    tmp_path: Path, intercept: float, is_close: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 6)
    write_sketch(tmp_path / "sketch.png")
    bundle = tmp_path / "bundle"
    tiny_bundle(bundle)
    set_rule(bundle, MatchRule(intercept, 0.0))
    gallery = tmp_path / "g.sbtk"
    index(gallery, photos, bundle)
    expected = "good" if is_close else "weak"
    with Gallery.open(gallery) as opened, Embedder(bundle, engine="onnxruntime") as embedder:
        hits = opened.query(tmp_path / "sketch.png", embedder, 3)
        assert [hit.match for hit in hits] == [expected] * 3
        photo = next(photos.iterdir())
        assert {hit.match for hit in opened.query(photo, embedder, 3, "photo")} == {None}
    command = ["query", str(tmp_path / "sketch.png"), "--gallery", str(gallery)]
    command += ["--model", str(bundle), "--threads", "1", "-k", "3"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert ("no close match" in shown.err) is not is_close
    assert len(shown.out.splitlines()) == 3
    assert main([*command, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["match"] for line in lines] == [expected] * 3


def test_binary_galleries_have_no_marks(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 4)
    write_sketch(tmp_path / "sketch.png")
    bundle = tmp_path / "bundle"
    tiny_code_bundle(bundle, 8)
    set_rule(bundle, RULE)
    gallery = tmp_path / "g.sbtk"
    command = ["index", str(photos), "--gallery", str(gallery), "--model", str(bundle)]
    assert main([*command, "--bits", "8"]) == 0
    with Gallery.open(gallery) as opened, Embedder(bundle, engine="onnxruntime") as embedder:
        assert {hit.match for hit in opened.query(tmp_path / "sketch.png", embedder, 2)} == {None}
