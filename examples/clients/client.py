"""A client of the HTTP API of `sbtk serve`, with the standard library only. Copy this file.

It is also a command that prints the hits of sketches:

    python client.py sketch.png more.png --limit 5 --under ~/photos/2024

`SBTK_TOKEN` is sent if it is set.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

Kind = Literal["sketch", "photo"]

#: A server that is busy says when to try again. Wait no longer than this.
_MOST_WAIT_S = 30.0


class ApiError(Exception):
    """The server refused a request, or could not be reached.

    Attributes:
        code: for programs, such as "empty_sketch"; "unreachable" if there was no response.
        message: one sentence for people.
        next_step: what to do about it; may be empty.
        retry_after_s: seconds after which to try again; `None` if that would not help.
    """

    def __init__(
        self, code: str, message: str, next_step: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(f"{message} Next: {next_step}" if next_step else message)
        self.code = code
        self.message = message
        self.next_step = next_step
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Hit:
    """A photo that was found.

    Attributes:
        rank: from 1.
        score: a cosine, at most 1.
        id: of the photo in the gallery.
        path: absolute, on the server's machine; bytes that are not UTF-8 are surrogates.
        match: whether the photo is close to the sketch; `None` if the model has no rule for it.
        region: x, y, width and height of the part that was found, as shares of the photo.
        copies: the paths of other photos with the same bytes.
    """

    rank: int
    score: float
    id: int
    path: str
    match: Literal["good", "weak"] | None = None
    region: tuple[float, float, float, float] | None = None
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The hits of a query, best first.

    Attributes:
        hits: from `offset` on.
        no_close_match: whether the gallery may lack what was drawn; `None` if that is unknown.
        kind: what the image was searched as; `None` without an image.
        notices: sentences for people, such as that a photo was given instead of a sketch.
    """

    hits: tuple[Hit, ...]
    no_close_match: bool | None
    kind: Kind | None
    notices: tuple[str, ...]


class Client:
    """A client of one server.

    >>> client = Client("http://127.0.0.1:8000", token=os.environ.get("SBTK_TOKEN"))
    >>> for hit in client.query(Path("sketch.png"), limit=5, under="/srv/photos/2024").hits:
    ...     print(hit.rank, hit.path)

    Args:
        address: of the page, such as the one that `sbtk serve` prints.
        token: of the server; `None` if it needs none.
        timeout_s: seconds to wait for each response.
        attempts: how often to send a request while the server is busy.
    """

    def __init__(
        self,
        address: str = "http://127.0.0.1:8000",
        token: str | None = None,
        *,
        timeout_s: float = 20.0,
        attempts: int = 3,
    ) -> None:
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"{address} is not an address that starts with http:// or https://")
        self._address = address.rstrip("/")
        self._token = token
        self._timeout_s = timeout_s
        self._attempts = attempts

    def query(self, image: Path | bytes, kind: Kind | None = None, **options: Any) -> Answer:
        """Return the photos that look like an image (PNG, JPEG or WebP).

        Args:
            image: a file, or the bytes of one.
            kind: what the image is; `None` to let the server detect it.
            options: parameters of `/v1/query`: `limit` and `offset`, `under` (a folder),
                `taken_from` and `taken_to` (days), `fold`,
                `rerank`, `regions`, `like` and `unlike` (sequences of ids).

        Raises:
            ApiError: the server refused the image or an option, or cannot be reached.
        """
        path = _path("/v1/query", {"as": kind} | options)
        return _answer(self._json(path, _form([image])))

    def query_many(
        self, images: Sequence[Path | bytes], kind: Kind | None = None, **options: Any
    ) -> list[Answer | ApiError]:
        """Return the answer of each of up to 32 images, or the error of an image.

        Raises:
            ApiError: the server refused the whole request, or cannot be reached.
        """
        found = self._json(_path("/v1/queries", {"as": kind} | options), _form(images))
        return [
            _error(result["error"]) if "error" in result else _answer(result)
            for result in found["results"]
        ]

    def similar(self, photo_id: int, **options: Any) -> Answer:
        """Return the photos that look like one of the gallery."""
        return _answer(self._json(_path(f"/v1/photos/{photo_id}/similar", options)))

    def details(self, photo_id: int) -> dict[str, Any]:
        """Return what a photo's file says about itself, such as `taken` and `camera`."""
        return dict(self._json(f"/v1/photos/{photo_id}/details"))

    def photo_file(self, photo_id: int) -> bytes:
        """Return the bytes of a photo's file."""
        return self._send(f"/v1/photos/{photo_id}/file")

    def all_hits(
        self, image: Path | bytes, kind: Kind | None = None, **options: Any
    ) -> Iterator[Hit]:
        """Yield all photos of the gallery, best first, page by page."""
        limit = int(options.pop("limit", 100))
        offset = int(options.pop("offset", 0))
        while hits := self.query(image, kind, limit=limit, offset=offset, **options).hits:
            yield from hits
            offset += len(hits)

    def _json(self, path: str, form: tuple[str, bytes] | None = None) -> Any:
        return json.loads(self._send(path, form))

    def _send(self, path: str, form: tuple[str, bytes] | None = None) -> bytes:
        for attempt in range(1, self._attempts + 1):
            try:
                return self._send_once(path, form)
            except ApiError as problem:
                wait_s = problem.retry_after_s
                if wait_s is None or wait_s > _MOST_WAIT_S or attempt == self._attempts:
                    raise
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _send_once(self, path: str, form: tuple[str, bytes] | None) -> bytes:
        request = Request(self._address + path)
        if self._token is not None:
            request.add_header("Authorization", f"Bearer {self._token}")
        if form is not None:
            request.add_header("Content-Type", form[0])
            request.data = form[1]
        try:
            with urlopen(request, timeout=self._timeout_s) as response:
                return bytes(response.read())
        except HTTPError as problem:
            with problem:
                raise _http_error(problem) from None
        except (URLError, OSError) as problem:
            reason = getattr(problem, "reason", problem)
            text = f"{self._address} cannot be reached: {reason}."
            raise ApiError("unreachable", text, "start it with 'sbtk serve'") from problem


def _path(path: str, options: dict[str, Any]) -> str:
    """Return a path with the options that are not `None` as its parameters."""
    given = {name: _parameter(value) for name, value in options.items() if value is not None}
    return f"{path}?{urlencode(given, quote_via=quote)}" if given else path


def _parameter(value: Any) -> bytes:
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)).encode()
    # Paths may hold any bytes.
    return os.fsencode(value) if isinstance(value, str | Path) else str(value).encode()


def _form(images: Sequence[Path | bytes]) -> tuple[str, bytes]:
    """Return the media type and the body of a form with these images."""
    boundary = uuid.uuid4().hex
    head = 'Content-Disposition: form-data; name="image"; filename="image"'
    parts = [
        f"--{boundary}\r\n{head}\r\n\r\n".encode()
        + (image if isinstance(image, bytes) else image.read_bytes())
        + b"\r\n"
        for image in images
    ]
    body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
    return f"multipart/form-data; boundary={boundary}", body


def _answer(body: dict[str, Any]) -> Answer:
    return Answer(
        hits=tuple(map(_hit, body["hits"])),
        no_close_match=body.get("no_close_match"),
        kind=body.get("kind"),
        notices=tuple(body["notices"]),
    )


def _hit(body: dict[str, Any]) -> Hit:
    region = body.get("region")
    return Hit(
        rank=body["rank"],
        score=body["score"],
        id=body["id"],
        path=_file_path(body),
        match=body.get("match"),
        region=None if region is None else (region[0], region[1], region[2], region[3]),
        copies=tuple(map(_file_path, body.get("copies") or ())),
    )


def _file_path(body: dict[str, Any]) -> str:
    """Return a path; one that is not UTF-8 comes as its bytes in base64."""
    if body.get("path") is not None:
        return str(body["path"])
    return os.fsdecode(base64.b64decode(body["path_bytes"]))


def _http_error(problem: HTTPError) -> ApiError:
    retry_after = problem.headers.get("Retry-After", "")
    wait_s = float(retry_after) if retry_after.isdecimal() else None
    try:
        return _error(json.loads(problem.read())["error"], wait_s)
    # A proxy in between answers in its own way.
    except (ValueError, KeyError, TypeError):
        return ApiError("unreachable", f"The server returned status {problem.code}.", "", wait_s)


def _error(body: dict[str, Any], retry_after_s: float | None = None) -> ApiError:
    return ApiError(body["code"], body["message"], body.get("next", ""), retry_after_s)


def main() -> int:
    """Print the hits of sketches; return the exit code."""
    parser = argparse.ArgumentParser(description="Find photos by sketches.")
    parser.add_argument("sketches", nargs="+", type=Path, metavar="SKETCH")
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--under", help="search only this folder")
    given = parser.parse_args()
    try:
        client = Client(given.address, os.environ.get("SBTK_TOKEN"))
        answers = client.query_many(given.sketches, limit=given.limit, under=given.under)
    except (ApiError, OSError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 1
    for sketch, answer in zip(given.sketches, answers, strict=True):
        if isinstance(answer, ApiError):
            print(f"{sketch}: {answer}", file=sys.stderr)
            continue
        if answer.no_close_match:
            print(f"{sketch}: no close match; best guesses:", file=sys.stderr)
        for notice in answer.notices:
            print(f"{sketch}: {notice}", file=sys.stderr)
        for hit in answer.hits:
            print(f"{hit.rank}\t{hit.score:.4f}\t{hit.path}")
    return 1 if any(isinstance(answer, ApiError) for answer in answers) else 0


if __name__ == "__main__":
    sys.exit(main())
