"""What a request's parameters may be: known, given once, numbers of plain digits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import FastAPI, Path, Query, Request
from pydantic import BeforeValidator

from sbtk_runtime.names import printable_name
from sbtk_runtime.web.refusals import Refusal, Refused
from sbtk_runtime.web.security_headers import DATA_PATHS
from sbtk_runtime.web.thumbnails import SizePx

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
Fold = Annotated[
    bool,
    Query(description="Photos of the same bytes are one hit, with its copies; else each is one."),
    BeforeValidator(_plain_truth),
]
Size = Annotated[SizePx, Query(description="Pixels that the longer side has at most."), _Digits]


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
