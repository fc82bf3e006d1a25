"""A campaign of random damage to every file of a gallery: no wrong answer without a notice.

An answer is right if it is what the undamaged gallery answers. With a notice, hits may be missing,
but those that are shown must have the right path and score. Errors are those that users are told.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.gallery import gallery as reading
from sbtk_runtime.gallery import hnsw
from sbtk_runtime.gallery.gallery import Answer, Gallery
from tests.tiny_gallery import code_gallery_of, gallery_of, tiny_itq, unit_rows

pytestmark = pytest.mark.slow

COUNT, DIM, BITS = 100, 64, 64
SEED = 11
#: Damages for each file of each kind of gallery.
ROUNDS = 40
K = 7

Damage = Callable[[bytearray, random.Random, int], None]
#: What was asked, and what came back.
Answers = dict[str, Answer]

QUERIES = unit_rows(2, DIM, seed=9)


def flip_bits(data: bytearray, dice: random.Random, width: int) -> None:
    for _ in range(dice.choice((1, 1, 2, 8))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def replace_bytes(data: bytearray, dice: random.Random, width: int) -> None:
    start = dice.randrange(len(data))
    end = min(len(data), start + dice.randrange(1, 200))
    data[start:end] = dice.randbytes(end - start)


def cut(data: bytearray, dice: random.Random, width: int) -> None:
    del data[dice.choice((0, len(data) // 2, dice.randrange(len(data)))) :]


def append(data: bytearray, dice: random.Random, width: int) -> None:
    data += dice.randbytes(dice.randrange(1, 100))


def put_zeros(data: bytearray, dice: random.Random, width: int) -> None:
    start = dice.choice((0, dice.randrange(len(data))))
    data[start:] = bytes(len(data) - start)


def put_nans(data: bytearray, dice: random.Random, width: int) -> None:
    start = dice.choice((0, dice.randrange(len(data)) // 2 * 2))
    nans = b"\x00\x7e" * ((len(data) - start) // 2)
    data[start : start + len(nans)] = nans


def swap_rows(data: bytearray, dice: random.Random, width: int) -> None:
    width = min(width, len(data) // 2)  # small files have no two rows
    one, other = (width * row for row in dice.sample(range(len(data) // width), 2))
    first, second = data[one : one + width], data[other : other + width]
    data[one : one + width], data[other : other + width] = second, first


def permute_rows(data: bytearray, dice: random.Random, width: int) -> None:
    rows = [data[start : start + width] for start in range(0, len(data) // width * width, width)]
    dice.shuffle(rows)
    data[: len(rows) * width] = b"".join(rows)


DAMAGES: tuple[Damage, ...] = (
    *(flip_bits, flip_bits, replace_bytes, cut, append),
    *(put_zeros, put_nans, swap_rows, permute_rows),
)


def ask(folder: Path) -> Answers:
    """Return the answers to some questions; each has the notices of opening the gallery too."""
    answers: Answers = {}
    with Gallery.open(folder) as gallery:
        for number, query in enumerate(QUERIES):
            answers[f"query {number}"] = gallery.answer(query, K)
            answers[f"exact {number}"] = gallery.answer(query, K, "exact")
        answers["under"] = gallery.answer(QUERIES[0], K, under="/photos/0003")
        for photo_id in (1, COUNT // 2):
            with suppress(SbtkError):
                answers[f"similar {photo_id}"] = gallery.similar(photo_id, K)
        for hit in answers["query 0"].hits:
            photo = gallery.photo(hit.id)
            assert photo is not None
            assert photo.path == hit.path
        return {
            question: Answer(answer.hits, (*answer.notices, *gallery.notices))
            for question, answer in answers.items()
        }


def truth_of(folder: Path) -> dict[str, dict[int, tuple[str, float]]]:
    """Return path and score of every photo, for every question."""
    with Gallery.open(folder) as gallery:
        hits = {
            f"{way} {number}": gallery.search(query, COUNT, "exact")
            for number, query in enumerate(QUERIES)
            for way in ("query", "exact")
        }
        hits["under"] = gallery.search(QUERIES[0], COUNT, under="/photos/0003")
        for photo_id in (1, COUNT // 2):
            hits[f"similar {photo_id}"] = gallery.similar(photo_id, COUNT).hits
        return {
            question: {hit.id: (hit.path, round(hit.score, 3)) for hit in found}
            for question, found in hits.items()
        }


def verdict(folder: Path, right: Answers, truth: dict[str, dict[int, tuple[str, float]]]) -> str:
    """Return what became of the questions to a damaged gallery."""
    try:
        answers = ask(folder)
    except SbtkError as problem:
        assert problem.found
        assert problem.next_step or problem.expected
        return "error"
    is_same = True
    for question, answer in answers.items():
        expected = [(hit.id, hit.path) for hit in right[question].hits]
        if [(hit.id, hit.path) for hit in answer.hits] != expected:
            is_same = False
            if not answer.notices:
                return f"wrong without a notice: {question}"
        for hit in answer.hits:
            if truth[question].get(hit.id) != (hit.path, round(hit.score, 3)):
                return f"a hit with a wrong path or score: {question}"
    return "right" if is_same else "fewer hits, with a notice"


@pytest.fixture(
    params=[
        "embeddings",
        "embeddings with sign codes",
        "embeddings with a graph",
        "codes",
        "an older gallery",
    ]
)
def gallery(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    folder = tmp_path / "g.sbtk"
    if "with" in request.param:
        monkeypatch.setattr(reading, "EXACT_BELOW", 10)
        monkeypatch.setattr(hnsw, "GRAPH_FROM", 10 if "graph" in request.param else COUNT + 1)
    if request.param == "codes":
        itq = tiny_itq(DIM, BITS)
        code_gallery_of(folder, itq.codes(unit_rows(COUNT, DIM)), itq)
    else:
        gallery_of(folder, unit_rows(COUNT, DIM), is_old="older" in request.param)
    return folder


@pytest.mark.parametrize(
    "replace",
    [Path.exists, Path.touch, os.mkfifo, Path.mkdir, lambda path: path.symlink_to("nothing")],
)
@pytest.mark.parametrize(
    "pattern",
    [
        "catalogue-*",
        "graph-*",
        "vectors/*",
        "vectors",
        "codes-*",
        "codes-*/*.bits",
        "codes-*/*.npz",
    ],
)
def test_special_files_neither_block_nor_give_answers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
    replace: Callable[[Path], object],
) -> None:
    folder = tmp_path / "g.sbtk"
    monkeypatch.setattr(reading, "EXACT_BELOW", 10)
    monkeypatch.setattr(hnsw, "GRAPH_FROM", 10 if "graph" in pattern else COUNT + 1)
    gallery_of(folder, unit_rows(COUNT, DIM))
    right, truth = ask(folder), truth_of(folder)
    (path,) = folder.glob(pattern)
    path.rename(tmp_path / "moved")
    replace(path)
    assert verdict(folder, right, truth) in ("right", "error")
    with suppress(SbtkError):
        assert all(answer.notices for answer in ask(folder).values())


def test_damage_never_gives_wrong_answers_silently(gallery: Path) -> None:
    right, truth = ask(gallery), truth_of(gallery)
    assert not any(answer.notices for answer in right.values())
    is_old = not list(gallery.glob("catalogue-*.sqlite"))
    width = BITS // 8 if list(gallery.glob("vectors/*.bits")) else 2 * DIM
    dice = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    for path in sorted(gallery.rglob("*")):
        # The catalogue of an older gallery, and its manifest, have no checksums.
        if not path.is_file() or path.name == ".lock" or (is_old and path.suffix != ".f16"):
            continue
        whole = path.read_bytes()
        for number in range(ROUNDS):
            damage = DAMAGES[number % len(DAMAGES)]
            data = bytearray(whole)
            damage(data, dice, width)
            path.write_bytes(data)
            outcome = verdict(gallery, right, truth)
            outcomes[outcome] += 1
            assert outcome in ("right", "error", "fewer hits, with a notice"), (
                f"{outcome} after {damage.__name__} ({number}) of {path.name}"
            )
        path.write_bytes(whole)
    assert verdict(gallery, right, truth) == "right"
    # The campaign would show nothing if all damage were refused, or none were met.
    assert outcomes["error"] > 0
    assert outcomes["fewer hits, with a notice"] > 0
