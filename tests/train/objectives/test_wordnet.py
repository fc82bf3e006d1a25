from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbtk_runtime.errors import BadData, MissingExtra
from sbtk_train.objectives import wordnet
from sbtk_train.objectives.wordnet import WordNet, open_wordnet
from tests.tiny_wordnet import Noun, write_nouns

nltk = pytest.importorskip("nltk")

THING, ANIMAL, BIRD, OWL, DUCK, TOWER, EIFFEL, WADER, DUCK_CLOTH = range(1000, 10_000, 1000)
NOUNS = (
    Noun(THING, ("thing",)),
    Noun(ANIMAL, ("animal",), (THING,)),
    Noun(BIRD, ("bird",), (ANIMAL,)),
    Noun(OWL, ("owl", "bird_of_Minerva"), (BIRD,)),
    Noun(DUCK, ("duck",), (BIRD,)),
    Noun(TOWER, ("tower",), (THING,)),
    Noun(EIFFEL, ("Eiffel_Tower",), (), (TOWER,)),
    # Two ways up, one of them longer.
    Noun(WADER, ("hot-air_balloon",), (BIRD, THING)),
    Noun(DUCK_CLOTH, ("duck", "jack-o'-lantern", "teddy"), (THING,)),
)


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NLTK_DATA", raising=False)
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(wordnet, "DEBIANS", tmp_path / "debian")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[WordNet]:
    write_nouns(tmp_path / "debian", NOUNS, irregular="geese goose\ndoocks duck\n")
    with open_wordnet() as found:
        yield found


def test_a_lineage_has_the_fewest_steps_to_all_above(opened: WordNet) -> None:
    owl = opened.lineage(OWL)
    assert owl is not None
    assert owl.steps == {OWL: 0, BIRD: 1, ANIMAL: 2, THING: 3}
    assert owl.kinds == {OWL, BIRD, ANIMAL, THING}
    wader = opened.lineage(WADER)
    assert wader is not None
    assert wader.steps == {WADER: 0, BIRD: 1, THING: 1, ANIMAL: 2}


def test_an_instance_is_near_to_a_kind_and_not_one(opened: WordNet) -> None:
    eiffel = opened.lineage(EIFFEL)
    assert eiffel is not None
    assert eiffel.steps == {EIFFEL: 0, TOWER: 1, THING: 2}
    assert eiffel.kinds == {EIFFEL}


def test_a_number_that_is_no_synset_has_no_lineage(opened: WordNet) -> None:
    assert opened.lineage(OWL + 7) is None
    assert opened.lineage(99_999_999) is None


@pytest.mark.parametrize(
    ("name", "synset"),
    [
        ("owl", OWL),
        ("Owl", OWL),
        ("duck", DUCK),
        ("owls", OWL),
        ("doocks", DUCK),
        ("bird of Minerva", OWL),
        ("bird-of-minerva", OWL),
        ("hot air balloon", WADER),
        ("hot-air_balloon", WADER),
        ("eiffel tower", EIFFEL),
        ("owl_(animal)", OWL),
        ("jack_o_lantern", DUCK_CLOTH),
        ("teddy-bear", DUCK_CLOTH),
        ("unicorn", None),
        ("---", None),
        ("one two three four five six", None),
        # Fixed to a sense that these few nouns lack.
        ("present", None),
    ],
)
def test_a_class_name_means_its_first_sense(opened: WordNet, name: str, synset: int | None) -> None:
    assert opened.meant_by(name) == synset


def test_every_place_is_looked_in_and_the_users_own_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has(lemma: str) -> bool:
        with open_wordnet() as found:
            return found.meant_by(lemma) is not None

    write_nouns(tmp_path / "debian", [Noun(1000, ("debian",))])
    assert has("debian")
    source = write_nouns(tmp_path / "source", [Noun(1000, ("zipped",))])
    corpora = tmp_path / "zipped" / "corpora"
    corpora.mkdir(parents=True)
    with zipfile.ZipFile(corpora / "wordnet.zip", "w") as archive:
        for file in source.iterdir():
            archive.write(file, f"wordnet/{file.name}")
    monkeypatch.setattr(nltk.data, "path", [str(corpora.parent)])
    assert has("zipped")
    write_nouns(tmp_path / "own" / "corpora" / "wordnet", [Noun(1000, ("own",))])
    monkeypatch.setenv("NLTK_DATA", os.pathsep.join(["", str(tmp_path / "own")]))
    assert has("own")
    assert nltk.data.path == [str(corpora.parent)]
    assert list((tmp_path / "cache" / "sbtk").iterdir()) == []


def test_files_that_others_may_write_to_are_read_too(tmp_path: Path) -> None:
    for file in write_nouns(tmp_path / "debian", NOUNS).iterdir():
        file.chmod(0o666)
    with open_wordnet() as found:
        assert found.meant_by("owl") == OWL


def test_without_wordnet_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtra, match=r"wordnet-base, or --semantic none"), open_wordnet():
        pass
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(MissingExtra, match=r"sbtk\[train\]"), open_wordnet():
        pass


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write_nouns(tmp_path / "debian", NOUNS)
    index = (folder / "index.noun").read_bytes()
    (folder / "index.noun").write_bytes(index.replace(b"owl n 1", b"owl n x"))
    with pytest.raises(BadData, match="cannot be read"), open_wordnet():
        pass
    (folder / "index.noun").unlink()
    with pytest.raises(BadData, match=r"not a whole WordNet(.|\n)*index\.noun"), open_wordnet():
        pass


def test_the_table_of_lexicographer_files_has_its_45_lines() -> None:
    lines = wordnet._lexnames().splitlines()
    assert len(lines) == 45
    assert [lines[number] for number in (0, 3, 28, 29, 44)] == [
        "00\tadj.all\t3",
        "03\tnoun.Tops\t1",
        "28\tnoun.time\t1",
        "29\tverb.body\t2",
        "44\tadj.ppl\t3",
    ]
