"""What a gallery answers, as programs and people get it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sbtk_runtime.gallery.folder import path_fields


@dataclass(frozen=True)
class Copy:
    """A photo of the same bytes as a hit."""

    id: int
    path: str


@dataclass(frozen=True)
class Hit:
    """One photo that was found.

    `path` is absolute; bytes that are not UTF-8 are in it as surrogates.
    `score` is at most 1: a cosine, or of binary codes the share of equal bits less the share of
    others, which is the cosine of the codes taken as rows of 1 and -1.
    `copies` are the other photos of the same bytes, by id, where they were folded.
    """

    rank: int
    score: float
    id: int
    path: str
    copies: tuple[Copy, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the hit as a JSON object; a path that is not UTF-8 comes as `path_bytes`."""
        known: dict[str, Any] = {"rank": self.rank, "score": round(self.score, 6), "id": self.id}
        known |= path_fields(os.fsencode(self.path))
        if self.copies:
            known["copies"] = [
                {"id": copy.id, **path_fields(os.fsencode(copy.path))} for copy in self.copies
            ]
        return known


@dataclass(frozen=True)
class Answer:
    """The hits of one question, best first, and sentences about them for the user."""

    hits: list[Hit]
    notices: tuple[str, ...] = ()
