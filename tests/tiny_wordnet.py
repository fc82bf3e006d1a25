"""WordNet's database files with a handful of nouns, at the byte offsets that they are known by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Offsets above all of ImageNet's synsets, and far enough apart for a line each.
FREE = range(15_200_000, 15_300_000, 400)


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
