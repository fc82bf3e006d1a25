"""What the API answers, as its description at `/openapi.json` tells programs."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import BaseModel, Field

from sbtk_runtime.engines.engine_info import EngineInfo
from sbtk_runtime.gallery.catalogue import Photo
from sbtk_runtime.gallery.folder import path_fields
from sbtk_runtime.gallery.hit import Hit
from sbtk_runtime.names import printable_name

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
        folder, _, name = photo.path.rpartition(b"/")
        return cls(
            id=photo.id,
            **path_fields(photo.path),
            name=printable_name(name),
            folder=printable_name(folder or b"/"),
            size_bytes=photo.size_bytes,
            modified=_utc(photo.mtime_ns),
            sha256=photo.sha256,
        )


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
