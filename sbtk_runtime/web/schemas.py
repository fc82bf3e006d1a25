"""Parameters and responses of the API, as `/openapi.json` describes them."""

from __future__ import annotations

import datetime
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, unquote_to_bytes

from fastapi import Depends, FastAPI, Path, Query, Request
from pydantic import BaseModel, BeforeValidator, Field

from sbtk_runtime.exif import PhotoDetails
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.catalogue import Photo
from sbtk_runtime.gallery.folder import FolderCount, path_fields
from sbtk_runtime.gallery.photo_filter import Period
from sbtk_runtime.gallery.queries import Box, Match, PhotoCopies
from sbtk_runtime.gallery.update import IndexReport
from sbtk_runtime.gallery.walk import left_out_sentences
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.regions import GRIDS
from sbtk_runtime.rerank import Rerank
from sbtk_runtime.web.indexing import Phase
from sbtk_runtime.web.photos import SizePx
from sbtk_runtime.web.refusals import DATA_PATHS, Refusal, Refused

_PATH = "The path; absent if it is not UTF-8."
_PATH_BYTES = "The path in base64, if it is not UTF-8."


class ProblemAnswer(BaseModel):
    """An error."""

    code: str = Field(description="Identifies the error for programs.")
    message: str = Field(description="One sentence for users.")
    next: str = Field(description="What to do about it; may be empty.")


class ErrorAnswer(BaseModel):
    """The response to a request that failed."""

    error: ProblemAnswer


class CopyAnswer(BaseModel):
    """A photo that is identical to a hit."""

    id: int
    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)


class HitAnswer(BaseModel):
    """A photo that was found."""

    rank: int = Field(ge=1)
    score: float = Field(
        description="A cosine, at most 1; of a region, less what all regions have in common."
    )
    id: int
    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)
    copies: list[CopyAnswer] | None = Field(
        None, description="Identical photos; absent if there are none."
    )
    match: Match | None = Field(
        None,
        description="Whether the hit is close enough to show what was drawn; only for sketches.",
    )
    region: list[float] | None = Field(
        None,
        description="The part of the photo that was found: x, y, width and height, 0 to 1 of the "
        "upright photo. Absent if it is the whole frame.",
    )


class QueryAnswer(BaseModel):
    """The photos that were found, best first."""

    hits: list[HitAnswer]
    no_close_match: bool | None = Field(
        None,
        description="Whether all of the first hits are weak: the gallery may lack what was drawn.",
    )
    kind: Kind | None = Field(None, description="What the image was searched as.")
    generation: int = Field(description="The gallery's generation that was searched.")
    engine: str = Field(description="The engine that ran the model.")
    took_ms: float = Field(description="Milliseconds from the complete request to the response.")
    notices: list[str] = Field(description="Sentences for the user.")


class BatchAnswer(BaseModel):
    """The results of several queries, in their order."""

    results: list[QueryAnswer | ErrorAnswer] = Field(
        description="For an image that cannot be used, its error."
    )


class PhotoAnswer(BaseModel):
    """Details of a photo from when it was indexed."""

    id: int
    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)
    name: str = Field(description="The name of the file, for display.")
    folder: str = Field(description="The folder of the file, for display.")
    size_bytes: int
    modified: str | None = Field(None, description="ISO 8601, in UTC.")
    sha256: str

    @classmethod
    def of(cls, photo: Photo) -> PhotoAnswer:
        """Return the JSON model of a photo."""
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


class DetailsAnswer(BaseModel):
    """What a photo's file says about itself; what is missing or implausible is absent."""

    width_px: int | None = Field(None, description="Upright, as the photo is shown.")
    height_px: int | None = None
    taken: str | None = Field(None, description="ISO 8601, local time without a zone.")
    camera: str | None = None
    lens: str | None = None
    exposure: str | None = Field(None, description="Such as 1/250 s, f/2.8, ISO 400, 35 mm.")
    latitude: float | None = Field(None, description="Degrees, positive to the north.")
    longitude: float | None = Field(None, description="Degrees, positive to the east.")
    is_changed: bool = Field(
        False,
        description="Whether the file has changed since it was indexed: hits may no longer fit it, "
        "and regions may be elsewhere.",
    )

    @classmethod
    def of(cls, details: PhotoDetails, *, is_changed: bool) -> DetailsAnswer:
        """Return the JSON model of a photo's metadata."""
        taken = None if details.taken is None else details.taken.isoformat()
        return cls(**asdict(details) | {"taken": taken}, is_changed=is_changed)


class ListedPhoto(BaseModel):
    """A photo of a list."""

    id: int
    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)
    modified: str | None = Field(None, description="ISO 8601, in UTC.")
    copies: list[CopyAnswer] | None = Field(
        None, description="Identical photos; absent if there are none."
    )

    @classmethod
    def of(cls, listed: PhotoCopies) -> ListedPhoto:
        """Return the JSON model of a photo and its copies."""
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
    generation: int = Field(description="The gallery's generation that was searched.")


class FolderAnswer(BaseModel):
    """A folder with photos."""

    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)
    name: str = Field(description="The folder's own name, for display.")
    count: int = Field(description="The number of photos in the folder itself, without subfolders.")

    @classmethod
    def of(cls, path: bytes, count: int) -> FolderAnswer:
        """Return the JSON model of the folder at `path`."""
        name = printable_name(path.rpartition(b"/")[2] or path)
        return cls(**path_fields(path), name=name, count=count)


class GalleryLink(BaseModel):
    """A gallery of the server; `/g/{name}/` is its page, and the base of its API."""

    name: str
    is_current: bool = Field(description="Whether it is the one of this request.")


class GalleryAnswer(BaseModel):
    """The gallery that is served."""

    name: str
    count: int = Field(description="The number of searchable photos.")
    generation: int
    model_id: str
    precision: str = Field(description="Precision of the model that made the embeddings.")
    bits: int | None = Field(description="Length of the codes; null with embeddings.")
    regions: int | None = Field(
        description="Regions that are kept of a photo; null if only the whole frame is."
    )
    has_dates: bool = Field(
        description="Whether photos can be searched by the days of their dates."
    )
    folders: list[FolderAnswer] = Field(
        description="Sorted by path; the fullest ones if there are many."
    )
    command: str = Field(description="The command that starts this server, without its token.")
    index_command: str | None = Field(
        description="The command that indexes photos into the gallery; null in a database."
    )
    galleries: list[GalleryLink] = Field(
        description="All galleries of the server; none if it has only this one."
    )


class EngineAnswer(BaseModel):
    """The inference engine in use."""

    name: str
    version: str
    device: str
    precision: str
    threads: int


class HealthAnswer(BaseModel):
    """The health of the server, and its engine."""

    status: Literal["ok", "loading", "stuck", "failed"]
    stuck_s: float | None = Field(
        default=None, description="Seconds for which queries have made no progress."
    )
    engine: EngineAnswer | None = None
    generation: int | None = None
    photos: int | None = None
    is_indexing: bool | None = Field(
        default=None, description="Whether the gallery is being updated."
    )
    problem: ProblemAnswer | None = None


class IndexedFolder(BaseModel):
    """A folder or file that was indexed, with the photos below it."""

    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)
    name: str = Field(description="The path, for display.")
    photos: int = Field(description="The number of searchable photos.")
    missing: int = Field(description="The number of photos that were not found on disk.")
    exists: bool = Field(description="Whether the folder is there now.")

    @classmethod
    def of(cls, count: FolderCount) -> IndexedFolder:
        """Return the JSON model of a folder."""
        return cls(
            **path_fields(count.path),
            name=printable_name(count.path),
            photos=count.photos,
            missing=count.missing,
            exists=count.exists,
        )


class IndexedFolders(BaseModel):
    """The folders of the gallery, by path."""

    folders: list[IndexedFolder]
    can_change: bool = Field(description="Whether this client may index and remove folders.")
    can_show: bool = Field(description="Whether the server may open folders for this client.")


class FolderShown(BaseModel):
    """A folder that the file manager of the server's machine is opening."""

    folder: str = Field(description="For display.")


class FileFailure(BaseModel):
    """A file that could not be read, or only partly."""

    path: str | None = Field(None, description=_PATH)
    path_bytes: str | None = Field(None, description=_PATH_BYTES)
    reason: str
    is_searchable: bool = Field(description="Whether the part that could be read is searchable.")


class FailuresAnswer(BaseModel):
    """Files that could not be read, or only partly."""

    failures: list[FileFailure]
    count: int = Field(description="The number of all of them.")


class IndexReportAnswer(BaseModel):
    """The result of an update of the gallery; see `sbtk index`."""

    new: int
    changed: int
    moved: int
    found_again: int
    missing: int
    unreadable: int
    photos: int = Field(description="The number of searchable photos.")
    seconds: float
    notices: list[str] = Field(description="Sentences for the user.")
    warnings: list[str] = Field(description="Folders whose photos were not found.")
    left_out: list[str] = Field(description="What was left out by rules, and how many files.")

    @classmethod
    def of(cls, report: IndexReport) -> IndexReportAnswer:
        """Return the JSON model of a report."""
        return cls(
            new=report.new,
            changed=report.changed,
            moved=report.moved,
            found_again=report.revived,
            missing=report.missing,
            unreadable=report.unreadable,
            photos=report.live,
            seconds=round(report.seconds, 2),
            notices=list(report.notices),
            warnings=list(report.warnings),
            left_out=list(left_out_sentences(report.left_out)),
        )


class IndexingAnswer(BaseModel):
    """The progress of indexing."""

    phase: Phase = Field(description="What is being done.")
    done: int = Field(description="Photos done, or files found.")
    total: int | None = Field(None, description="Photos to embed; only while embedding.")
    rate: float = Field(description="Photos per second; 0 unless embedding.")
    jobs: int = Field(description="The number of updates and removals that have ended.")
    generation: int | None = Field(None, description="The gallery's generation that is served.")
    photos: int | None = Field(None, description="The number of searchable photos.")
    report: IndexReportAnswer | None = Field(
        default=None, description="The last update's result; none after a removal."
    )
    problem: ProblemAnswer | None = Field(default=None, description="Why the last update failed.")


def _utc(time_ns: int) -> str | None:
    """Return a file's time as ISO 8601; `None` if it is out of range."""
    try:
        moment = datetime.datetime.fromtimestamp(time_ns // 10**9, datetime.UTC)
    except (OverflowError, OSError, ValueError):
        return None
    return moment.isoformat().replace("+00:00", "Z")


MAX_HITS = 200

# Of numbers that fit into 64 bits, like ids.
_DIGITS = re.compile(r"[0-9]{1,19}")
_SHOWN_CHARACTERS = 40


def _plain_digits(given: Any) -> Any:
    """Return a number unchanged; Python's `int` also accepts signs, blanks and other digits."""
    if isinstance(given, str) and not _DIGITS.fullmatch(given):
        raise ValueError("numbers consist of 1 to 19 digits, 0 to 9")
    return given


def _plain_truth(given: Any) -> Any:
    """Return a boolean unchanged; pydantic also accepts "on", "1" and others."""
    if isinstance(given, str) and given not in ("true", "false"):
        raise ValueError("booleans are true or false")
    return given


_Digits = BeforeValidator(_plain_digits)

# The check of digits comes last, so that the description keeps the constraints before it.
Id = Annotated[int, Path(ge=1, lt=1 << 63, description="The id of a hit."), _Digits]
Hits = Annotated[int, Query(ge=1, le=MAX_HITS, description="Number of photos to find."), _Digits]
Limit = Annotated[
    int | None,
    Query(ge=1, le=MAX_HITS, description="Photos on a page; replaces `k`."),
    _Digits,
]
PageSize = Annotated[int, Query(ge=1, le=MAX_HITS, description="Photos on a page."), _Digits]
Offset = Annotated[
    int, Query(ge=0, lt=10**18, description="The number of photos to skip."), _Digits
]
Fold = Annotated[
    bool,
    Query(description="Combine identical photos into one hit with copies."),
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
ByRegions = Annotated[
    bool,
    Query(description="Also find photos by their regions, if the gallery keeps them."),
    BeforeValidator(_plain_truth),
]
_COUNTS: dict[str, Any] = {"enum": sorted(GRIDS)}
_OF_REGIONS = Query(
    description="The number of regions to keep of each photo.", json_schema_extra=_COUNTS
)
RegionCount = Annotated[int | None, _OF_REGIONS, _Digits]
_SHARE = r"[01](\.[0-9]{1,9})?"
Part = Annotated[
    str | None,
    Query(
        pattern=rf"^{_SHARE}(,{_SHARE}){{3}}$",
        description="Photos like this part of the photo: x, y, width and height as shares of the "
        "upright photo. Only in galleries with regions.",
        examples=["0.25,0.5,0.36,0.36"],
    ),
]
Size = Annotated[SizePx, Query(description="The most pixels of the longer side."), _Digits]


_IDS = r"^[0-9]{1,19}(,[0-9]{1,19}){0,31}$"
_LIKED = Query(
    pattern=_IDS,
    description="Ids of photos that are liked, separated by commas: hits become more like them.",
    examples=["17,4"],
)
Liked = Annotated[str | None, _LIKED]
SomeLiked = Annotated[str, _LIKED]
Disliked = Annotated[
    str | None,
    Query(
        pattern=_IDS,
        description="Ids of photos that are not liked, separated by commas: hits become less like "
        "them.",
        examples=["23"],
    ),
]


def box_of(given: str | None) -> Box | None:
    """Return the box in a checked parameter."""
    if given is None:
        return None
    x, y, width, height = map(float, given.split(","))
    return x, y, width, height


def ids_of(given: str | None) -> tuple[int, ...]:
    """Return the ids in a checked parameter, each once."""
    return () if given is None else tuple(dict.fromkeys(map(int, given.split(","))))


# FastAPI would run dependencies that are not `async` on other threads, one after the other.
async def _folder(
    request: Request,
    under: Annotated[
        str | None,
        Query(
            pattern=r"^(/|source:)[^\x00]*$",
            description="Search only this folder and its subfolders: an absolute path, whose bytes "
            "need not be UTF-8; or source:NAME/PATH of a collection that is not mounted.",
            examples=["/home/me/photos/2024"],
        ),
    ] = None,
) -> str | None:
    """Return the folder with its exact bytes, or `None`."""
    if under is None:
        return None
    return os.fsdecode(_raw_parameter(request.scope["query_string"], b"under"))


Folder = Annotated[str | None, Depends(_folder)]


def _plain_day(value: object) -> object:
    """Refuse what Pydantic takes for days, too: numbers of seconds."""
    if isinstance(value, str) and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", value, re.ASCII):
        raise ValueError("a day is written 2024-05-01")
    return value


_Day = Annotated[datetime.date, BeforeValidator(_plain_day)]


async def _period(
    taken_from: Annotated[
        _Day | None,
        Query(
            description="Search only photos that were taken on this day or later; if a file does "
            "not say when it was taken, the time of its last change counts.",
            examples=["2024-05-01"],
        ),
    ] = None,
    taken_to: Annotated[
        _Day | None,
        Query(
            description="Search only photos that were taken on this day or before.",
            examples=["2024-05-31"],
        ),
    ] = None,
) -> Period | None:
    """Return the days of the photos that are searched, or `None`."""
    if taken_from is None and taken_to is None:
        return None
    if taken_from is not None and taken_to is not None and taken_from > taken_to:
        raise Refused(_ENDS_BEFORE_IT_BEGINS)
    return taken_from, taken_to


_ENDS_BEFORE_IT_BEGINS = Refusal(
    422,
    "bad_parameter",
    "The parameter taken_from is a later day than taken_to.",
    "exchange the two",
    closes=True,
)
Taken = Annotated[Period | None, Depends(_period)]


def only_known_parameters(app: FastAPI) -> Callable[[Request], Awaitable[None]]:
    """Return a dependency for all routes of `app` that refuses unknown and repeated parameters.

    Ignoring a misspelt parameter would give wrong results, and of a repeated one, proxies may use
    another value than this server. Pages and their files accept any parameters.

    Raises (when a request comes):
        Refused: `bad_parameter` (422).
    """

    async def check(request: Request) -> None:
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
                raise Refused(_refusal(f"Unknown parameter {shown!r}", known))
            if times > 1:
                raise Refused(_refusal(f"The parameter {shown} is given {times:,} times", known))

    return check


def _known_parameters(app: FastAPI, request: Request) -> list[str]:
    """Return the names of the query parameters that the API's description gives a route."""
    operations = app.openapi()["paths"].get(getattr(request.scope.get("route"), "path", ""), {})
    # HEAD is described by GET.
    method = "get" if request.method == "HEAD" else request.method.lower()
    described = operations.get(method, {}).get("parameters", [])
    return [entry["name"] for entry in described if entry["in"] == "query"]


def _refusal(found: str, known: list[str]) -> Refusal:
    expected = f"at most one of each: {', '.join(known)}" if known else "none"
    # The body is not read.
    return Refusal(
        422, "bad_parameter", f"{found}; expected: {expected}.", "see /docs", closes=True
    )


def _raw_parameter(query_string: bytes, name: bytes) -> bytes:
    """Return the bytes of a query parameter, the last one of that name."""
    parts: Sequence[bytes] = query_string.split(b"&")
    for part in reversed(parts):
        key, _, value = part.replace(b"+", b" ").partition(b"=")
        if unquote_to_bytes(key) == name:
            return unquote_to_bytes(value)
    return b""
