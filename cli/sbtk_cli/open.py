"""`sbtk open`: index folders of photos and open the page, in one command."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sbtk_cli import options, output
from sbtk_cli.index import bundle_to_index, final_sentence
from sbtk_cli.serve import open_browser, page_address, restart_command
from sbtk_runtime.files import printable_name
from sbtk_runtime.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    import socket

    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.web.indexing import Progress

_HELP = """Index photos and search them in the browser.

The page opens at once; photos can be found while others are still being indexed. The gallery is
stored in your data folder, one for each set of folders and model, and updated each time you open
it. If the gallery is already open, its page is shown. Only this machine can connect. Press Ctrl-C
to stop; the next run resumes.

\b
sbtk open ~/Pictures
sbtk open ~/Pictures /media/camera
sbtk open --gallery all.sbtk
"""


@click.command(help=_HELP)
@click.argument("photos", nargs=-1, type=options.PATH)
@click.option(
    "--gallery",
    type=options.PATH,
    metavar="FOLDER",
    help="The gallery's folder.  [default: one in your data folder]",
)
@options.port("Port to listen on; if it is in use, another one is chosen.")
@click.option("--no-browser", is_flag=True, help="Print the page's address, but do not open it.")
@options.read_only
@options.model
@options.query_engine_options
@options.quiet
def command(
    photos: tuple[Path, ...],
    gallery: Path | None,
    port: int,
    no_browser: bool,
    read_only: bool,
    model: str | None,
    engine_options: EngineOptions,
    quiet: bool,
) -> int:
    """Run `sbtk open`."""
    if not photos and gallery is None:
        raise click.UsageError("Name the folders of your photos, as in: sbtk open ~/Pictures")
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.gallery.folder import make_folder, translate_os_errors
    from sbtk_runtime.gallery.update import roots_to_walk
    from sbtk_runtime.web.running import AlreadyOpen, claim_server, update_at

    if gallery is None:
        bundle = Bundle.open(model)
        folder = default_gallery(photos, bundle.manifest.model_id)
        roots_to_walk(folder, photos)
        if notice := _notice_of_earlier(folder):
            output.notice(notice, quiet=quiet)
    else:
        folder = gallery
        if photos:
            roots_to_walk(folder, photos)
        else:
            options.existing_gallery(folder)
        bundle = bundle_to_index(model, folder, None)
    with translate_os_errors(folder):
        make_folder(folder)
    try:
        with claim_server(folder) as record, contextlib.closing(_listen(port)) as listening:
            from sbtk_runtime.web.auth import access_rules
            from sbtk_runtime.web.service import Service

            address = page_address("127.0.0.1", listening.getsockname()[1])
            with _Watcher(folder, quiet=quiet) as watcher:
                service = Service(
                    folder,
                    bundle,
                    engine_options,
                    notify=lambda text: output.notice(text, quiet=quiet),
                    command=restart_command(
                        "open", *photos, galleries=() if gallery is None else (gallery,)
                    ),
                    listener=watcher.update,
                )
                assert service.indexer is not None
                service.indexer.update(photos)
                with service:
                    from sbtk_runtime.web.server import serve

                    record.write(address)
                    output.notice(
                        f"{output.shown_relative(folder)}; press Ctrl-C to stop", quiet=quiet
                    )
                    output.answer(address)
                    if not no_browser:
                        open_browser(address, quiet=quiet)
                    serve(
                        *([service], listening, access_rules("127.0.0.1")), may_change=not read_only
                    )
    except AlreadyOpen as other:
        output.notice(f"{other.found}: updating it", quiet=quiet)
        update_at(other.address, photos)
        output.answer(other.address)
        if not no_browser:
            open_browser(other.address, quiet=quiet)
    except KeyboardInterrupt:
        output.notice("Stopped.", quiet=quiet)
    return 0


def default_gallery(photos: Sequence[Path], model_id: str) -> Path:
    """Return the folder of the gallery for a set of folders and a model, in the user's data folder.

    A new default model indexes the photos again, beside the earlier model's gallery.
    """
    from platformdirs import user_data_path

    from sbtk_runtime.preprocess import PREPROCESSING

    roots = sorted({os.path.realpath(path) for path in photos})
    name = "".join(c if c.isalnum() else "-" for c in os.path.basename(roots[0]))  # noqa: PTH119
    stem = f"{name[:40] or 'photos'}-{_short_hash(*roots)}"
    folder = user_data_path("sbtk") / "galleries"
    return folder / f"{stem}-{_short_hash(model_id, PREPROCESSING)}.sbtk"


def _short_hash(*texts: str) -> str:
    return hashlib.sha256(b"\0".join(map(os.fsencode, texts))).hexdigest()[:8]


def _notice_of_earlier(folder: Path) -> str:
    """Return what a new default gallery replaces; empty if it is not new, or the first."""
    stem = folder.stem.rpartition("-")[0]
    earlier = [] if folder.exists() else sorted(folder.parent.glob(f"{stem}*.sbtk"))
    if not earlier:
        return ""
    kept = ", ".join(map(printable_name, earlier))
    return f"the model has changed: indexing the photos again (the earlier gallery is kept: {kept})"


def _listen(port: int) -> socket.socket:
    """Return a socket that listens on `port`, or on a free one if it is in use."""
    from sbtk_runtime.web.server import PortTaken, listen

    try:
        return listen("127.0.0.1", port)
    except PortTaken:
        return listen("127.0.0.1", 0)


class _Watcher(contextlib.ExitStack):
    """Shows the progress of indexing in the terminal; a `with` block ends the display."""

    def __init__(self, folder: Path, *, quiet: bool) -> None:
        super().__init__()
        self._folder = folder
        self._quiet = quiet
        self._advance: output.Advance | None = None
        self._jobs = 0

    def update(self, progress: Progress) -> None:
        """Show the progress; called on the indexing thread."""
        if not progress.is_idle and self._advance is None:
            self._advance = self.enter_context(output.progress("photos", quiet=self._quiet))
        if self._advance is not None:
            self._advance(progress.done, progress.total)
        if progress.jobs == self._jobs:
            return
        self._jobs = progress.jobs
        self.close()
        self._advance = None
        if progress.problem is not None:
            # Without a gallery, the command ends with this error.
            if (self._folder / MANIFEST_NAME).exists():
                output.notice(f"Error: {progress.problem}")
        elif progress.report is not None:
            for text in (*progress.report.warnings, *progress.report.notices):
                output.notice(text, quiet=self._quiet)
            output.notice(final_sentence(progress.report, self._folder), quiet=self._quiet)
