"""The semantic matrix of classes, from WordNet and from nouns made up for the tests."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.errors import BadData, MissingExtra
from sbtk_train.data.class_names import read_imagenet_synsets
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet, select_classes
from sbtk_train.data.splits import open_split
from sbtk_train.objectives import semantic
from sbtk_train.objectives.semantic import (
    Lineage,
    WordNet,
    build_matrix,
    build_semantic_matrix,
    find_class_lineages,
    find_photo_synsets,
    measure_nearness,
    open_wordnet,
)

#: Offsets above all of ImageNet's synsets, and far enough apart for a line each.
FREE = range(15_200_000, 15_300_000, 400)
TENCH, GOLDFISH, SHARK = 1440764, 1443537, 1484850

#: Where the tests' own nouns stand, above all of ImageNet's.
ENTITY, FISH, CARP, PAN = FREE[0], FREE[1], FREE[2], FREE[3]


@dataclass(frozen=True)
class Noun:
    """One synset.

    Attributes:
        offset: its number.
        lemmas: its words, as WordNet writes them.
        above: its hypernyms.
        instance_of: what it is a single instance of.
    """

    offset: int
    lemmas: tuple[str, ...]
    above: tuple[int, ...] = ()
    instance_of: tuple[int, ...] = ()


def write_nouns(folder: Path, nouns: Sequence[Noun], irregular: str = "") -> Path:
    """Return `folder` with `data.noun`, `index.noun` and `noun.exc` of these nouns.

    A lemma's senses are ranked in the order of the nouns (format: manual page wndb(5WN)).
    """
    folder.mkdir(parents=True)
    data = bytearray(b"\n" * (max(noun.offset for noun in nouns) + 400))
    for noun in nouns:
        pointers = [f"@ {above:08d} n 0000" for above in noun.above]
        pointers += [f"@i {above:08d} n 0000" for above in noun.instance_of]
        pointers += [
            f"~ {other.offset:08d} n 0000" for other in nouns if noun.offset in other.above
        ]
        words = " ".join(f"{lemma} 0" for lemma in noun.lemmas)
        line = (
            f"{noun.offset:08d} 03 n {len(noun.lemmas):02x} {words} {len(pointers):03d} "
            f"{' '.join(pointers)} | test  \n"
        ).encode()
        place = slice(noun.offset, noun.offset + len(line))
        assert not data[place].strip(b"\n"), f"{noun} stands where another does"
        data[place] = line
    (folder / "data.noun").write_bytes(data)
    senses: dict[str, list[int]] = {}
    for noun in nouns:
        for lemma in noun.lemmas:
            senses.setdefault(lemma.lower(), []).append(noun.offset)
    lines = [
        f"{lemma} n {len(offsets)} 1 @ {len(offsets)} 0 "
        f"{' '.join(f'{offset:08d}' for offset in offsets)}  \n"
        for lemma, offsets in sorted(senses.items())
    ]
    (folder / "index.noun").write_text("  1 This file is of sbtk's tests.  \n" + "".join(lines))
    (folder / "noun.exc").write_text(irregular)
    return folder


def lineage(offset: int, *above: int, instance: bool = False) -> Lineage:
    """A synset with one line of ancestors, nearest first."""
    steps = {synset: count for count, synset in enumerate((offset, *above))}
    return Lineage(offset, steps, frozenset([offset] if instance else steps))


def test_hyponyms_have_similarity_one_and_others_by_path_length() -> None:
    # 1 is above 2 is above 3; 4 to 7 go down on the other side.
    root, one, two, three = 1, 2, 3, 4
    deep = lineage(three, two, one, root)
    assert measure_nearness(deep, deep) == 1
    assert measure_nearness(deep, lineage(one, root)) == 1
    assert measure_nearness(lineage(one, root), deep) == 1
    assert measure_nearness(lineage(8, root), lineage(9, root)) == pytest.approx(1 / 3)
    assert measure_nearness(lineage(8, root), lineage(9, 10, root)) == pytest.approx(1 / 4)
    # Four steps are a similarity of 0.2, which is not above 0.2.
    assert measure_nearness(lineage(8, 11, root), lineage(9, 10, root)) == 0
    assert measure_nearness(lineage(8, 11), lineage(9, 10)) == 0
    tower = lineage(7, root)
    assert measure_nearness(lineage(6, 7, root, instance=True), tower) == pytest.approx(1 / 2)


def test_later_synsets_of_a_class_overwrite_earlier_ones() -> None:
    first, second = lineage(8, 1), lineage(9, 1)
    imagenet = [first, second, lineage(5, 4, 3)]
    found = build_matrix([[first], [first, second], [second, first], []], imagenet)
    third = pytest.approx(1 / 3)
    assert found.tolist() == [[1, third, 0], [third, 1, 0], [1, third, 0], [0, 0, 0]]


def imagenet_offsets() -> list[int]:
    return [int(wnid[1:]) for wnid in read_imagenet_synsets()]


def test_there_are_a_thousand_imagenet_synsets_in_order() -> None:
    synsets = read_imagenet_synsets()
    assert len(set(synsets)) == 1000
    assert list(synsets) == sorted(synsets)
    # tench, goldfish, great white shark; the crane of class 134 is the bird; toilet tissue.
    assert synsets[:3] == [f"n{offset:08d}" for offset in (TENCH, GOLDFISH, SHARK)]
    assert synsets[134] == "n02012849"
    assert synsets[999] == "n15075141"


def photos(**names: list[str]) -> ImageSet:
    paths = tuple(Path(kind) / name for kind, files in names.items() for name in files)
    labels = [label for label, files in enumerate(names.values()) for _ in files]
    return ImageSet(
        tuple(names), (), np.zeros(0, dtype=np.int64), paths, np.array(labels, dtype=np.int64)
    )


def test_synsets_are_read_from_the_photos_names_in_order() -> None:
    data = photos(
        fish=["n01440764_10.jpg", "n01443537_7.jpg", "n01440764_2.jpg", "ext_1.jpg"],
        pan=["ext_1.jpg", "xn01440764_1.jpg", "n0144076_1.jpg", "n01440764.jpg"],
    )
    assert find_photo_synsets(data) == [(TENCH, GOLDFISH), ()]


@pytest.fixture
def excerpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A WordNet that has ImageNet's synsets where they are, all but three fishes alone."""
    above = {TENCH: CARP, GOLDFISH: CARP, SHARK: FISH}
    nouns = [
        Noun(offset, (f"class{number}",), (above[offset],) if offset in above else ())
        for number, offset in enumerate(imagenet_offsets())
    ]
    nouns += [
        Noun(ENTITY, ("entity",)),
        Noun(FISH, ("fish",), (ENTITY,)),
        Noun(CARP, ("carp",), (FISH,)),
        Noun(PAN, ("frying_pan",)),
    ]
    monkeypatch.setattr(semantic, "DEBIANS", write_nouns(tmp_path / "wordnet", nouns))
    return tmp_path


def test_the_matrix_is_made_from_photos_names_and_class_names(excerpt: Path) -> None:
    data = photos(
        shark=["n01484850_1.jpg"], fish=["a.jpg"], **{"frying-pan": ["b.jpg"], "unknown": ["c.jpg"]}
    )
    messages: list[str] = []
    matrix, _ = build_semantic_matrix(data, messages.append)
    assert matrix.shape == (4, 1000)
    # The shark is a fish, as both carps are; from it to a carp are three steps.
    assert matrix[:, :3].tolist() == [[1 / 4, 1 / 4, 1], [1] * 3, [0] * 3, [0] * 3]
    assert not matrix[:, 3:].any()
    assert messages[-1].endswith("frying-pan, unknown")


def test_the_matrix_is_cached_with_its_hash_and_rebuilt_if_damaged(excerpt: Path) -> None:
    data = photos(carp=["1.jpg"], shark=["n01484850_1.jpg"])
    first, digest = build_semantic_matrix(data, lambda text: None)
    (path,) = (excerpt / "cache" / "sbtk" / "semantic-matrix").glob("*.npy")
    messages: list[str] = []
    # Neither NLTK nor WordNet is needed once it is there.
    (excerpt / "wordnet").rename(excerpt / "gone")
    again, same = build_semantic_matrix(data, messages.append)
    assert messages == []
    assert same == digest
    np.testing.assert_array_equal(again, first)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(MissingExtra, match="WordNet"):
        build_semantic_matrix(data, messages.append)
    (excerpt / "gone").rename(excerpt / "wordnet")
    mended, same = build_semantic_matrix(data, messages.append)
    assert same == digest
    np.testing.assert_array_equal(mended, first)
    _, other = build_semantic_matrix(photos(carp=["n01484850_1.jpg"]), messages.append)
    assert other != digest


def test_another_version_of_wordnet_is_refused(excerpt: Path) -> None:
    path = excerpt / "wordnet" / "data.noun"
    path.write_bytes(b"\n" + path.read_bytes())
    with pytest.raises(BadData, match=r"no synset n01440764(.|\n)*WordNet 3\.0"):
        build_semantic_matrix(photos(carp=["1.jpg"]), lambda text: None)


@pytest.fixture(scope="module")
def installed() -> Iterator[WordNet]:
    try:
        with open_wordnet() as found:
            yield found
    except MissingExtra as problem:
        pytest.skip(f"{problem.found}; {problem.next_step}")


def test_similarity_equals_nltks_closure_and_path_similarity(installed: WordNet) -> None:
    rng = np.random.default_rng(0)
    classes = [installed.meant_by(name) for name in ("bear", "owl", "teapot", "car", "fish")]
    columns = [*rng.choice(1000, 60, replace=False).tolist(), 0, 294, 295, 849, 817]
    found = set()
    for offset in classes:
        assert offset is not None
        mine = installed.lineage(offset)
        one = installed._reader.synset_from_pos_and_offset("n", offset)
        below = set(one.closure(lambda synset: synset.hyponyms()))
        for column in columns:
            theirs = installed.lineage(imagenet_offsets()[column])
            other = installed._reader.synset_from_pos_and_offset("n", imagenet_offsets()[column])
            above = set(other.closure(lambda synset: synset.hyponyms()))
            similarity = one.path_similarity(other)
            is_kind = one == other or other in below or one in above
            expected = 1.0 if is_kind else similarity if similarity > 0.2 else 0.0
            assert mine is not None
            assert theirs is not None
            assert measure_nearness(mine, theirs) == pytest.approx(expected)
            found.add(round(expected, 2))
    assert {0.0, 1.0} < found


def test_imagenets_synsets_exist_in_wordnet(installed: WordNet) -> None:
    for offset, lemma in ((TENCH, "tench"), (2012849, "crane"), (15075141, "toilet_tissue")):
        synset = installed._reader.synset_from_pos_and_offset("n", offset)
        assert lemma in synset.lemma_names()
    assert all(installed.lineage(offset) is not None for offset in imagenet_offsets())


@pytest.mark.data
def test_the_matrix_of_sketchy_is_like_the_published_one(installed: WordNet) -> None:
    """SAKE's has 1.35 ones and 7.4 nonzeros a row, 1 empty row, 496 columns without an entry.

    It is of all photos; a class that only the first 25 stand for has fewer synsets, of which the
    later write over fewer ones.
    """
    root = os.environ.get("SBTK_DATA")
    if not root:
        pytest.skip("SBTK_DATA names no data set")
    data = read_dataset(Path(root))
    seen = select_classes(data, open_split("SK-SH").seen_among(data.classes))
    classes = [
        find_class_lineages(name, synsets, installed)
        for name, synsets in zip(seen.classes, find_photo_synsets(seen), strict=True)
    ]
    imagenet = [installed.lineage(offset) for offset in imagenet_offsets()]
    matrix = build_matrix(classes, [one for one in imagenet if one is not None])
    assert matrix.shape == (100, 1000)
    assert sorted(set(matrix.ravel().tolist())) == pytest.approx([0, 1 / 4, 1 / 3, 1])
    assert 1.3 < (matrix == 1).sum() / 100 < 2.1
    assert 6.4 < (matrix > 0).sum() / 100 < 7.5
    assert (~matrix.any(axis=1)).sum() == 1
    assert 490 < (~matrix.any(axis=0)).sum() < 560


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
def nothing_installed(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "installed" in request.fixturenames:
        return  # NLTK reads files only below the folders of `nltk.data.path`
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NLTK_DATA", raising=False)
    monkeypatch.setattr("nltk.data.path", [])
    monkeypatch.setattr(semantic, "DEBIANS", tmp_path / "debian")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[WordNet]:
    write_nouns(tmp_path / "debian", NOUNS, irregular="geese goose\ndoocks duck\n")
    with open_wordnet() as found:
        yield found


def test_hypernym_distances_are_the_shortest(opened: WordNet) -> None:
    owl = opened.lineage(OWL)
    assert owl is not None
    assert owl.steps == {OWL: 0, BIRD: 1, ANIMAL: 2, THING: 3}
    assert owl.kinds == {OWL, BIRD, ANIMAL, THING}
    wader = opened.lineage(WADER)
    assert wader is not None
    assert wader.steps == {WADER: 0, BIRD: 1, THING: 1, ANIMAL: 2}


def test_an_instance_is_not_a_hyponym_of_its_class(opened: WordNet) -> None:
    eiffel = opened.lineage(EIFFEL)
    assert eiffel is not None
    assert eiffel.steps == {EIFFEL: 0, TOWER: 1, THING: 2}
    assert eiffel.kinds == {EIFFEL}


def test_unknown_synsets_have_no_hypernyms(opened: WordNet) -> None:
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
def test_a_class_name_means_its_first_sense_in_wordnet(
    opened: WordNet, name: str, synset: int | None
) -> None:
    assert opened.meant_by(name) == synset


def test_every_folder_is_searched_and_the_users_comes_first(
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
    monkeypatch.setattr("nltk.data.path", [str(corpora.parent)])
    assert has("zipped")
    write_nouns(tmp_path / "own" / "corpora" / "wordnet", [Noun(1000, ("own",))])
    monkeypatch.setenv("NLTK_DATA", os.pathsep.join(["", str(tmp_path / "own")]))
    assert has("own")
    assert sys.modules["nltk"].data.path == [str(corpora.parent)]
    assert list((tmp_path / "cache" / "sbtk").iterdir()) == []


def test_files_writable_by_others_are_read_too(tmp_path: Path) -> None:
    for file in write_nouns(tmp_path / "debian", NOUNS).iterdir():
        file.chmod(0o666)
    with open_wordnet() as found:
        assert found.meant_by("owl") == OWL


def test_the_error_for_a_missing_wordnet_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    with pytest.raises(BadData, match=r"not a complete WordNet(.|\n)*index\.noun"), open_wordnet():
        pass


def test_the_table_of_lexicographer_files_has_its_45_lines() -> None:
    lines = semantic._lexnames().splitlines()
    assert len(lines) == 45
    assert [lines[number] for number in (0, 3, 28, 29, 44)] == [
        "00\tadj.all\t3",
        "03\tnoun.Tops\t1",
        "28\tnoun.time\t1",
        "29\tverb.body\t2",
        "44\tadj.ppl\t3",
    ]
