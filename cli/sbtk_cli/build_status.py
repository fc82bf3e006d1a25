"""Tells how far the build of a TensorRT plan is: in place on a terminal, else once a minute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sbtk_cli import output
from sbtk_runtime.plan_progress import BuildProgress, Progress, no_progress

#: Seconds between two lines where nobody watches; a build takes a few minutes.
LINE_EVERY_S = 60.0


@contextlib.contextmanager
def build_status(*, quiet: bool = False) -> Iterator[Progress]:
    """Yields what tells the user how long a build has taken, and what is waited for."""
    if quiet:
        yield no_progress
    elif output.is_progress_wanted(quiet):
        from rich.console import Console

        console = Console(stderr=True)  # heeds NO_COLOR
        with console.status("building the plan") as status:
            yield lambda progress: status.update(progress.sentence())
    else:
        yield _line_now_and_then()


def _line_now_and_then() -> Progress:
    next_s = LINE_EVERY_S

    def tell(progress: BuildProgress) -> None:
        nonlocal next_s
        if progress.elapsed_s >= next_s:
            next_s = progress.elapsed_s + LINE_EVERY_S
            output.notice(progress.sentence())

    return tell
