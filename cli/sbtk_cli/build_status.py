"""Tells how far the build of a TensorRT plan is: in place on a terminal, else once a minute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from sbtk_cli import output
from sbtk_runtime.engines.engine_request import Said, said_nothing
from sbtk_runtime.engines.plan_progress import BuildProgress, Progress, no_progress

#: Seconds between two lines where nobody watches; a build takes a few minutes.
LINE_EVERY_S = 60.0


class BuildStatus(NamedTuple):
    """Whom to tell how far a build is, and what else the user may want to know meanwhile."""

    progress: Progress
    said: Said


@contextlib.contextmanager
def build_status(*, quiet: bool = False) -> Iterator[BuildStatus]:
    """Yields what tells the user how long a build has taken, and what is waited for."""
    if quiet:
        yield BuildStatus(no_progress, said_nothing)
    elif output.is_progress_wanted(quiet):
        from rich.console import Console

        console = Console(stderr=True)  # heeds NO_COLOR

        def said(text: str) -> None:
            # Through the console, which moves the line in place out of the way.
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        with console.status("waiting for TensorRT") as status:
            yield BuildStatus(lambda progress: status.update(progress.sentence()), said)
    else:
        yield BuildStatus(_line_now_and_then(), output.notice)


def _line_now_and_then() -> Progress:
    next_s = LINE_EVERY_S

    def tell(progress: BuildProgress) -> None:
        nonlocal next_s
        if progress.elapsed_s >= next_s:
            next_s = progress.elapsed_s + LINE_EVERY_S
            output.notice(progress.sentence())

    return tell
