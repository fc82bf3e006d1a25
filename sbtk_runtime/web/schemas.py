"""What the API answers, as its description at `/openapi.json` tells programs."""

from __future__ import annotations

import datetime
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, unquote_to_bytes

from fastapi import Depends, FastAPI, Path, Query, Request
from pydantic import BaseModel, BeforeValidator, Field

from sbtk_runtime.engines.base import EngineInfo
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.catalogue import Photo
from sbtk_runtime.gallery.folder import path_fields
from sbtk_runtime.gallery.hits import Hit, Match, PhotoCopies
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.rerank import Rerank
from sbtk_runtime.web.photos import SizePx
from sbtk_runtime.web.refusals import DATA_PATHS, Refusal, Refused

_PATH = "The path; left out when it is not UTF-8."
_PATH_BYTES = "The path in base64, when it is not UTF-8."


class CopyAnswer(BaseModel):
    """A photo of the same bytes as a hit."""

    id: int
    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)


class HitAnswer(BaseModel):
    """One photo that was found."""

    rank: int = Field(ge=1)
    score: float = Field(description="A cosine, at most 1.")
    id: int
    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)
    copies: list[CopyAnswer] | None = Field(
        None, description="Other photos of the same bytes; left out when there are none."
    )
    match: Match | None = Field(
        None,
        description="Whether the hit is close enough to show what was drawn; only for sketches.",
    )

    @classmethod
    def of(cls, hit: Hit) -> HitAnswer:
        """Returns the answer for a hit."""
        fields = hit.to_json()
        if "copies" in fields:
            fields["copies"] = [CopyAnswer.model_construct(**copy) for copy in fields["copies"]]
        return cls.model_construct(**fields)


class QueryAnswer(BaseModel):
    """The photos that were found, best first."""

    hits: list[HitAnswer]
    no_close_match: bool | None = Field(
        None,
        description="Whether all of the first hits are weak: the gallery may lack what was drawn.",
    )
    kind: Kind | None = Field(None, description="What the image was searched as.")
    generation: int = Field(description="The state of the gallery that all of this is of.")
    engine: str = Field(description="What ran the model.")
    took_ms: float = Field(description="From the whole request received to the answer made.")
    notices: list[str] = Field(description="Sentences for the user.")


class PhotoAnswer(BaseModel):
    """What is known of a photo, as of when it was indexed."""

    id: int
    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)
    name: str = Field(description="The file's name, for people.")
    folder: str = Field(description="The folder it lies in, for people.")
    size_bytes: int
    modified: str | None = Field(None, description="ISO 8601, in UTC.")
    sha256: str

    @classmethod
    def of(cls, photo: Photo) -> PhotoAnswer:
        """Returns the answer for a photo."""
        folder, _, name = photo.path.rpartition("/")
        return cls(
            id=photo.id,
            **path_fields(os.fsencode(photo.path)),
            name=printable_name(name),
            folder=printable_name(folder or "/"),
            size_bytes=photo.size_bytes,
            modified=_utc(photo.mtime_ns),
            sha256=photo.sha256,
        )


class ListedPhoto(BaseModel):
    """One photo of a list."""

    id: int
    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)
    modified: str | None = Field(None, description="ISO 8601, in UTC.")
    copies: list[CopyAnswer] | None = Field(
        None, description="Other photos of the same bytes; left out when there are none."
    )

    @classmethod
    def of(cls, listed: PhotoCopies) -> ListedPhoto:
        """Returns the answer for a photo and its copies."""
        photo = listed.photo
        copies = [
            CopyAnswer(id=copy.id, **path_fields(os.fsencode(copy.path))) for copy in listed.copies
        ]
        return cls(
            id=photo.id,
            **path_fields(os.fsencode(photo.path)),
            modified=_utc(photo.mtime_ns),
            copies=copies or None,
        )


class PhotosAnswer(BaseModel):
    """Photos of the gallery, newest first."""

    photos: list[ListedPhoto]
    generation: int = Field(description="The state of the gallery that all of this is of.")


class FolderAnswer(BaseModel):
    """A folder that photos lie in."""

    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)
    name: str = Field(description="Its own name, for people.")
    count: int = Field(description="Photos in the folder itself, not below it.")

    @classmethod
    def of(cls, path: bytes, count: int) -> FolderAnswer:
        """Returns the answer for the folder at `path`."""
        name = printable_name(path.rpartition(b"/")[2] or path)
        return cls(**path_fields(path), name=name, count=count)


class GalleryAnswer(BaseModel):
    """The gallery that is served."""

    name: str
    count: int = Field(description="Photos that can be found.")
    generation: int
    model_id: str
    precision: str = Field(description="Of the model that made the embeddings.")
    bits: int | None = Field(description="Length of its codes; null if it keeps embeddings.")
    folders: list[FolderAnswer] = Field(description="By path; of many those with most photos.")
    command: str = Field(description="The command that starts this server, without its token.")


class EngineAnswer(BaseModel):
    """The inference engine that is really in use."""

    name: str
    version: str
    device: str
    precision: str
    threads: int

    @classmethod
    def of(cls, info: EngineInfo) -> EngineAnswer:
        """Returns the answer for an open engine."""
        return cls(
            name=info.name,
            version=info.version,
            device=info.device,
            precision=info.precision,
            threads=info.threads,
        )


class ProblemAnswer(BaseModel):
    """What went wrong."""

    code: str = Field(description="What programs tell problems apart by.")
    message: str = Field(description="One sentence for people.")
    next: str = Field(description="What to do about it; empty when there is nothing.")


class HealthAnswer(BaseModel):
    """Whether queries are answered, and by what."""

    status: Literal["ok", "loading", "stuck", "failed"]
    stuck_s: float | None = Field(
        default=None, description="For how long queries have not moved on."
    )
    engine: EngineAnswer | None = None
    generation: int | None = None
    photos: int | None = None
    problem: ProblemAnswer | None = None


class ErrorAnswer(BaseModel):
    """Why there is no other answer."""

    error: ProblemAnswer


def _utc(time_ns: int) -> str | None:
    """Returns a file's time as ISO 8601; `None` where no calendar has it."""
    try:
        moment = datetime.datetime.fromtimestamp(time_ns // 10**9, datetime.UTC)
    except (OverflowError, OSError, ValueError):
        return None
    return moment.isoformat().replace("+00:00", "Z")


MAX_HITS = 200

# What fits 64 bits, as the catalogue's ids do.
_DIGITS = re.compile(r"[0-9]{1,18}")
_SHOWN_CHARACTERS = 40


def _plain_digits(given: Any) -> Any:
    """Returns a number as it was given; Python's own `int` takes signs, blanks and any script."""
    if isinstance(given, str) and not _DIGITS.fullmatch(given):
        raise ValueError("a number is written in the digits 0 to 9")
    return given


def _plain_truth(given: Any) -> Any:
    """Returns a truth value as it was given; pydantic's own also takes "on", "1" and others."""
    if isinstance(given, str) and given not in ("true", "false"):
        raise ValueError("a truth value is written true or false")
    return given


_Digits = BeforeValidator(_plain_digits)

# The check of digits stands last: then the description keeps what stands before it.
Id = Annotated[int, Path(ge=1, description="The id of a hit."), _Digits]
Hits = Annotated[int, Query(ge=1, le=MAX_HITS, description="How many photos to find."), _Digits]
Limit = Annotated[
    int | None, Query(ge=1, le=MAX_HITS, description="Photos on a page; replaces `k`."), _Digits
]
PageSize = Annotated[int, Query(ge=1, le=MAX_HITS, description="Photos on a page."), _Digits]
Offset = Annotated[
    int, Query(ge=0, description="The number of first photos to leave out, to page on."), _Digits
]
Fold = Annotated[
    bool,
    Query(description="Photos of the same bytes are one hit, with its copies; else each is one."),
    BeforeValidator(_plain_truth),
]
RerankBy = Annotated[
    Rerank | None,
    Query(
        description="Reorder the hits: by a query that the first hits are added to (expand), or "
        "by spreading scores over photos that look alike (diffusion). By default as the server's "
        "option --rerank says."
    ),
]
Size = Annotated[SizePx, Query(description="Pixels that the longer side has at most."), _Digits]


def _folder(
    request: Request,
    under: Annotated[
        str | None,
        Query(
            pattern=r"^/[^\x00]*$",
            description="Only photos in this folder, at any depth: an absolute path, whose bytes "
            "need not be UTF-8.",
            examples=["/home/me/photos/2024"],
        ),
    ] = None,
) -> str | None:
    """Returns the folder with every byte that it was given with, or `None`."""
    if under is None:
        return None
    return os.fsdecode(_raw_parameter(request.scope["query_string"], b"under"))


Folder = Annotated[str | None, Depends(_folder)]


def only_known_parameters(app: FastAPI) -> Callable[[Request], None]:
    """Returns a dependency for all of `app`: it refuses parameters that its description lacks.

    A misspelt parameter that is ignored gives a wrong answer, and of one that is given twice,
    programs in front of this one may read another than it does. Pages and their files take
    whatever a link to them carries.

    Raises (when a request comes):
        Refused: `bad_parameter` (422).
    """

    def check(request: Request) -> None:
        if not request.url.path.startswith(DATA_PATHS):
            return
        given = Counter(
            name
            for name, _ in parse_qsl(
                request.scope["query_string"].decode("latin-1"),
                keep_blank_values=True,
                errors="surrogateescape",
            )
        )
        if not given:
            return
        known = _known_parameters(app, request)
        for name, times in given.items():
            shown = printable_name(name)[:_SHOWN_CHARACTERS]
            if name not in known:
                raise Refused(_refusal(f"There is no parameter {shown!r} here", known))
            if times > 1:
                raise Refused(_refusal(f"The parameter {shown} is given {times:,} times", known))

    return check


def _known_parameters(app: FastAPI, request: Request) -> list[str]:
    """Returns the names of the query parameters that the API's description gives a route."""
    operations = app.openapi()["paths"].get(getattr(request.scope.get("route"), "path", ""), {})
    # HEAD is described by GET.
    method = "get" if request.method == "HEAD" else request.method.lower()
    described = operations.get(method, {}).get("parameters", [])
    return [entry["name"] for entry in described if entry["in"] == "query"]


def _refusal(found: str, known: list[str]) -> Refusal:
    expected = f"each once at most: {', '.join(known)}" if known else "none"
    # The body is not read.
    return Refusal(
        422, "bad_parameter", f"{found}; expected: {expected}.", "see /docs", closes=True
    )


def _raw_parameter(query_string: bytes, name: bytes) -> bytes:
    """Returns the bytes of a query parameter, the last one of that name."""
    parts: Sequence[bytes] = query_string.split(b"&")
    for part in reversed(parts):
        key, _, value = part.replace(b"+", b" ").partition(b"=")
        if unquote_to_bytes(key) == name:
            return unquote_to_bytes(value)
    return b""
