"""`sbtk serve`: serve a gallery with a page to draw on and an API."""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from sbtk_cli import options, output
from sbtk_cli.options import bundle_for_gallery
from sbtk_runtime.files import count_text

if TYPE_CHECKING:
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.gallery.queries import Search
    from sbtk_runtime.gallery.remote_gallery import RemoteGallery
    from sbtk_runtime.rerank import RerankChoice

_NOT_REPEATED = ("photos", "gallery", "at", "token", "is_opened", "no_browser", "quiet")

_HELP = """Draw in the browser and find photos.

Serves a page to draw on and an API for programs (see /docs). Only this machine can connect, unless
--host opens the server to others; then clients must send a token. Re-index at any time; the server
picks up the change. Prints the page's address. Press Ctrl-C to stop.

\b
sbtk serve --open
sbtk serve --gallery all.sbtk --port 8080
sbtk serve --gallery holidays.sbtk --gallery work.sbtk
sbtk serve --at postgresql://me@db.example/photos --photos archive=/mnt/archive
sbtk serve --host 0.0.0.0
"""


@click.command(help=_HELP)
@click.option(
    "--gallery",
    "gallery",
    type=options.PATH,
    multiple=True,
    envvar="SBTK_GALLERY",
    show_envvar=True,
    default=[options.DEFAULT_GALLERY],
    show_default=True,
    metavar="FOLDER",
    help="A gallery's folder. Repeatable: the page has a switch, and each gallery is also at "
    "/g/NAME/.",
)
@options.at
@options.mounts
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on; 0.0.0.0 for all addresses of this machine.",
)
@options.port("Port to listen on; 0 for a free one.")
@click.option("--open", "is_opened", is_flag=True, help="Open the page in the browser.")
@click.option(
    "--token",
    metavar="TEXT",
    envvar="SBTK_TOKEN",
    show_envvar=True,
    help="Token that clients must send.  [default: none on a loopback address, else a new one]",
)
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="Additional host name to accept, such as a reverse proxy's. Repeatable.",
)
@options.read_only
@options.search
@options.rerank
@options.model
@options.query_engine_options
@options.quiet
def command(
    gallery: tuple[Path, ...],
    at: str | None,
    mounts: tuple[str, ...],
    host: str,
    port: int,
    is_opened: bool,
    token: str | None,
    allow_hosts: tuple[str, ...],
    read_only: bool,
    search: Search,
    rerank: RerankChoice,
    model: str | None,
    engine_options: EngineOptions,
    quiet: bool,
) -> int:
    """Run `sbtk serve`."""
    from sbtk_runtime.web.app import gallery_names
    from sbtk_runtime.web.auth import access_rules, is_loopback, new_token
    from sbtk_runtime.web.server import listen

    opened, text = _open(gallery, at, mounts, model)
    is_local = is_loopback(host)
    made_token = None if is_local or token is not None else new_token()
    rules = access_rules(host, allow_hosts, made_token if token is None else token)
    listening = listen(host, port)
    port = listening.getsockname()[1]
    address = page_address(host, port)
    shown = address if made_token is None else f"{address}?token={made_token}"
    from sbtk_runtime.web.service import Service

    folders = [there for there, _ in opened if isinstance(there, Path)]
    names = gallery_names(folders) or [""]
    again = restart_command(
        "serve",
        galleries=folders,
        at=next((there.name for there, _ in opened if not isinstance(there, Path)), None),
        port=port,
    )
    services = [
        Service(
            there,
            bundle,
            engine_options,
            search=search,
            rerank=rerank,
            notify=lambda text: output.notice(text, quiet=quiet),
            command=again,
            name=name,
            galleries=names if len(names) > 1 else (),
        )
        for (there, bundle), name in zip(opened, names, strict=True)
    ]
    try:
        with listening, contextlib.ExitStack() as stack:
            for service in services:
                stack.enter_context(service)
            # The server's imports take as long as the engine, which loads in the background.
            from sbtk_runtime.web.server import serve

            output.notice(f"{text}; press Ctrl-C to stop", quiet=quiet)
            if not is_local:
                output.notice(_network_notice(host, is_any=rules.any_address), quiet=quiet)
            output.answer(shown)
            if is_opened:
                visited = address if rules.token is None else f"{address}?token={rules.token}"
                open_browser(visited, quiet=quiet)
            serve(services, listening, rules, may_change=is_local and not read_only)
    except KeyboardInterrupt:
        output.notice("Stopped.", quiet=quiet)
    return 0


def _open(
    galleries: tuple[Path, ...], at: str | None, mounts: tuple[str, ...], model: str | None
) -> tuple[list[tuple[Path | RemoteGallery, Bundle]], str]:
    """Return the galleries, each with the bundle that made it, and a description of them all."""
    if (at := options.chosen_collection(at, mounts)) is not None:
        there = options.open_collection(at, mounts)
        unmounted = options.unmounted_notice(there)
        text = f"{count_text(there.count, 'photo')} at {there.name}"
        opened = (there, options.bundle_for_collection(model, there))
        return [opened], text + f"; {unmounted}" * bool(unmounted)
    from sbtk_runtime.gallery.folder import published_manifest

    manifests = [published_manifest(options.existing_gallery(folder)) for folder in galleries]
    bundles = [
        bundle_for_gallery(model, folder, manifest.model_id)
        for folder, manifest in zip(galleries, manifests, strict=True)
    ]
    photos = count_text(sum(manifest.live for manifest in manifests), "photo")
    names = ", ".join(output.shown_relative(folder) for folder in galleries)
    return list(zip(galleries, bundles, strict=True)), f"{photos} of {names}"


def restart_command(
    name: str,
    *photos: Path,
    galleries: Sequence[Path] = (),
    at: str | None = None,
    port: int | None = None,
) -> str:
    """Return the command line that starts this server again, without its token.

    Args:
        name: of the command.
        photos: its arguments.
        galleries: those that must be named.
        at: the address of the collection that must be named, without a password.
        port: the port, if another one than the given was chosen.
    """
    from sbtk_runtime.files import printable_name

    context = click.get_current_context()
    words = ["sbtk", name, *(str(path.absolute()) for path in photos)]
    for folder in galleries:
        words += ["--gallery", str(folder.absolute())]
    words += [] if at is None else ["--at", at]
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if not given or name in _NOT_REPEATED:
            continue
        value = port if name == "port" and port is not None else context.params[name]
        for each in value if isinstance(value, tuple) else (value,):
            words += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    return printable_name(shlex.join(words))


def _network_notice(host: str, *, is_any: bool) -> str:
    """Return the notice about a server that other machines can reach."""
    where = (
        f", with this machine's address in place of {_choose_browser_host(host)}" if is_any else ""
    )
    return (
        f"other machines can connect{where}; the token is sent unencrypted, so put a reverse proxy "
        "with HTTPS in front of the server on networks that you do not trust"
    )


def page_address(host: str, port: int) -> str:
    """Return the page's address for a browser on this machine."""
    return f"http://{_choose_browser_host(host)}:{port}/"


def _choose_browser_host(host: str) -> str:
    """Return the host by which a browser on this machine reaches a server on `host`."""
    name = host.strip("[]")
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)  # noqa: S104 -- not bound here
    return f"[{name}]" if ":" in name else name


def open_browser(address: str, *, quiet: bool) -> None:
    """Open the browser on another thread: it may be slow, or use the terminal."""
    import webbrowser

    def visit() -> None:
        if not webbrowser.open(address):
            output.notice("no browser was found: open the address in one", quiet=quiet)

    threading.Thread(target=visit, daemon=True).start()
