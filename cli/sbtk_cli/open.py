"""`sbtk open`: index folders of photos and open the page, in one command.

A gallery has one server: the command joins it instead of starting another one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import click

from sbtk_cli import options, output
from sbtk_cli.index import bundle_to_index, final_sentence
from sbtk_cli.serve import open_browser, page_address, restart_command
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.files import printable_name
from sbtk_runtime.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    import socket

    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.web.indexing import Progress

#: In the gallery's folder. The server holds a lock on it, which the kernel releases with the
#: process, and writes its address into it.
RECORD_NAME = ".server"
_STARTS_WITHIN_S = 10.0
_LOOK_EVERY_S = 0.1
_TIMEOUT_S = 10.0

_HELP = """Index photos and search them in the browser.

The page opens at once; photos can be found while others are still being indexed. The gallery is
stored in your data folder, one for each set of folders and model, and updated each time you open
it. If the gallery is already open, its page is shown. Only this machine can connect. Press Ctrl-C
to stop; the next run resumes.

\b
sbtk open ~/Pictures
sbtk open ~/Pictures /media/camera
sbtk open photos/ --regions
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
@options.regions(
    "Also embed N regions of each photo (9 or 16, by default 16), to find things in photos. Give "
    "it after PHOTOS. Stored in the gallery."
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
    regions: int | None,
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
    from sbtk_runtime.gallery.folder import (
        check_model,
        make_folder,
        roots_to_walk,
        translate_os_errors,
    )

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
                service.indexer.update(photos, regions)
                with service:
                    from sbtk_runtime.web.server import serve

                    record.write(address, bundle.manifest.model_id)
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
        if model is not None and other.model_id:
            # The gallery itself names no model while nothing is published.
            check_model(folder, other.model_id, bundle.manifest.preprocessing, bundle)
        output.notice(f"{other.found}, with the options given there: updating it", quiet=quiet)
        refusal = update_at(other.address, photos, regions)
        if refusal is not None:
            output.notice(f"the photos were not updated: {refusal}")
        output.answer(other.address)
        if not no_browser:
            open_browser(other.address, quiet=quiet)
        return 0 if refusal is None else 3
    except KeyboardInterrupt:
        output.notice("Stopped.", quiet=quiet)
    return 0


def default_gallery(photos: Sequence[Path], model_id: str) -> Path:
    """Return the folder of the gallery for a set of folders and a model, in the user's data folder.

    A new default model indexes the photos again; the earlier model's gallery is kept.
    """
    from platformdirs import user_data_path

    from sbtk_runtime.preprocess import PREPROCESSING

    roots = sorted({os.path.realpath(path) for path in photos})
    name = "".join(c if c.isalnum() else "-" for c in os.path.basename(roots[0]))  # noqa: PTH119
    stem = f"{name[:40] or 'photos'}-{_short_hash(*roots)}"
    folder = user_data_path("sbtk") / "galleries"
    return folder / f"{stem}-{_short_hash(model_id, PREPROCESSING)}.sbtk"


class AlreadyOpen(SbtkError):
    """Another server has the gallery open, at `address`, with the model `model_id`."""

    def __init__(self, folder: Path, address: str, model_id: str) -> None:
        super().__init__(f"{printable_name(folder)} is already open at {address}")
        self.address = address
        self.model_id = model_id


class ServerRecord:
    """The record of the server of a gallery, held by this process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, address: str, model_id: str) -> None:
        """Store the page's address and the model, for others that open the gallery."""
        record = {"address": address, "model_id": model_id, "pid": os.getpid()}
        content = json.dumps(record).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)


@contextlib.contextmanager
def claim_server(folder: Path) -> Iterator[ServerRecord]:
    """Yield the record of the gallery's server, unless another process holds it.

    Args:
        folder: the gallery's; it must exist.

    Raises:
        AlreadyOpen: another process serves the gallery.
        SbtkError: the folder cannot be written, or the other process did not start in time.
    """
    path = folder / RECORD_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as problem:
        raise SbtkError(
            f"{printable_name(path)} cannot be written: {problem.strerror}",
            "a folder that this user may write",
            "--gallery FOLDER",
        ) from problem
    try:
        end = time.monotonic() + _STARTS_WITHIN_S
        while not _is_locked_by_us(descriptor):
            if found := _server_in(descriptor):
                raise AlreadyOpen(folder, *found)
            if time.monotonic() > end:
                raise SbtkError(
                    f"another sbtk is starting to serve {printable_name(folder)}",
                    "its address",
                    "try again in a minute",
                )
            time.sleep(_LOOK_EVERY_S)
        os.ftruncate(descriptor, 0)
        yield ServerRecord(descriptor)
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def update_at(address: str, roots: Sequence[Path], regions: int | None) -> SbtkError | None:
    """Ask the server at `address` to index folders; all of its folders if there are none.

    Args:
        address: of the server.
        roots: the folders and files.
        regions: keep so many regions of each photo; by default what the gallery keeps.

    Returns:
        why it changes nothing, if it was started so.

    Raises:
        SbtkError: it refuses, or does not respond.
    """
    for root in roots or (None,):
        named = {} if root is None else {"under": os.fsencode(root.absolute())}
        wanted = named if regions is None else named | {"regions": regions}
        request = urllib.request.Request(  # noqa: S310 -- a loopback address of sbtk itself
            f"{address}v1/indexing?{urlencode(wanted)}", method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S):  # noqa: S310
                pass
        except urllib.error.HTTPError as problem:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                error = json.load(problem)["error"]
                refusal = SbtkError(error["message"].rstrip("."), "", error["next"])
                if error["code"] == "read_only":
                    return refusal
                raise refusal from problem
            raise SbtkError(f"{address} refused to index: {problem}") from problem
        except OSError as problem:
            raise SbtkError(f"{address} does not respond: {problem}") from problem
    return None


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


def _is_locked_by_us(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise SbtkError(
            f"the gallery's folder has no locks: {problem.strerror}",
            "a file system with locks",
            "--gallery FOLDER",
        ) from problem
    return True


def _server_in(descriptor: int) -> tuple[str, str] | None:
    """Return address and model of the holder of the lock; `None` if it has not written them yet.

    Earlier versions wrote no model.
    """
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        address, model_id = record["address"], record.get("model_id", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    is_ours = isinstance(address, str) and address.startswith("http://127.0.0.1:")
    return (address, str(model_id)) if is_ours else None
