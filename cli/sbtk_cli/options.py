"""Options that several commands share."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

from sbtk_cli import output
from sbtk_runtime.errors import BadConfig, BadGallery, ModelMismatch
from sbtk_runtime.files import printable_name
from sbtk_runtime.manifest import MANIFEST_NAME, PRECISIONS, PhotoShard

if TYPE_CHECKING:
    from datetime import date

    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.gallery.remote_gallery import RemoteGallery

DEFAULT_GALLERY = Path("gallery.sbtk")

#: A command.
Function = TypeVar("Function", bound=Callable[..., Any])


#: A file or folder; whether it exists is checked where it is opened.
class NonEmptyPath(click.Path):
    """A path; an unset variable of a script must not name the working folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; refuse an empty one."""
        if not os.fspath(value):
            self.fail("an empty path.", param, ctx)
        return super().convert(value, param, ctx)


class IntRange(click.IntRange):
    """Integers of a range, with a name that fits into click's errors."""

    name = "integer"


class FloatRange(click.FloatRange):
    """Numbers of a range, with a name that fits into click's errors."""

    name = "number"


PATH = NonEmptyPath(path_type=Path)


class Bits(IntRange):
    """The length of a binary code: a multiple of 8."""

    def __init__(self) -> None:
        super().__init__(min=8, max=65_536)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the length."""
        bits = int(super().convert(value, param, ctx))
        if bits % 8:
            self.fail(f"{bits} is not a multiple of 8.", param, ctx)
        return bits


def parse_shard(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> PhotoShard | None:
    """Return the shard that a text such as 2/8 names."""
    try:
        return None if value is None else PhotoShard.parse(value)
    except BadConfig as problem:
        text = f"{problem.found}; expected {problem.expected}."
        raise click.BadParameter(text, context, parameter) from problem


class Regions(click.types.IntParamType):
    """The number of regions of a photo; the option may come without one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        from sbtk_runtime.regions import DEFAULT_REGIONS, GRIDS

        if value == REGIONS_UNNAMED:
            return DEFAULT_REGIONS
        text = str(value)
        if not text.isascii() or not text.isdecimal() or int(text) not in GRIDS:
            numbers = " or ".join(map(str, GRIDS))
            self.fail(f"{text!r} is not {numbers}. Give folders before it: PHOTOS --regions", param)
        return int(text)


#: What `--regions` without a number is read as.
REGIONS_UNNAMED = "default"


def regions(help_text: str) -> Callable[[Function], Function]:
    """Return the option `--regions [N]` with that help."""
    return click.option(
        "--regions",
        type=Regions(),
        is_flag=False,
        flag_value=REGIONS_UNNAMED,
        metavar="[N]",
        help=help_text,
    )


_AS_HELP = "Kind of the images; decides how they are prepared."

model = click.option(
    "--model",
    metavar="BUNDLE",
    help="Model bundle: a folder, or a name in 'sbtk models'.",
)
engine = click.option(
    "--engine",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Inference engine: tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino or onnxruntime. "
    "auto is the first of them that works; 'sbtk doctor' shows which.",
)
precision = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Precision of the model.  [default: int8 on a CPU, fp16 on a GPU]",
)
threads = click.option(
    "--threads",
    type=IntRange(min=1),
    metavar="N",
    help="CPU threads to use.  [default: all available]",
)
device = click.option(
    "--device",
    metavar="NAME",
    help="cpu, cuda or cuda:N.  [default: the engine's]",
)
batch = click.option(
    "--batch",
    type=IntRange(min=1, max=4096),
    default=32,
    show_default=True,
    metavar="N",
    help="Images per run of the engine.",
)
gallery = click.option(
    "--gallery",
    type=PATH,
    envvar="SBTK_GALLERY",
    show_envvar=True,
    default=DEFAULT_GALLERY,
    show_default=True,
    metavar="FOLDER",
    help="The gallery's folder.",
)


def _at(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Check the URL, and keep its password out of what other users see of this process."""
    if value is None:
        return None
    from sbtk_runtime.gallery.remote_address import Address

    hide_in_command_line(value, Address.parse(value).secrets)
    return value


at = click.option(
    "--at",
    metavar="URL",
    envvar="SBTK_AT",
    show_envvar=True,
    callback=_at,
    help="A collection in a database instead of a gallery on disk, as 'sbtk push' fills it: "
    "postgresql://USER@HOST/DATABASE (extra 'postgres'), or milvus://HOST:PORT, https:// with TLS "
    "(extra 'milvus'); ?collection=NAME names another collection than 'sbtk'. Give the password in "
    "PGPASSWORD or ~/.pgpass, for Milvus in SBTK_TOKEN, rather than in the URL.",
)
mounts = click.option(
    "--photos",
    "mounts",
    multiple=True,
    metavar="SOURCE=FOLDER",
    help="With --at: where the photos of a source are mounted here. Repeatable.",
)
search = click.option(
    "--search",
    type=click.Choice(["auto", "hnsw", "codes", "exact"]),
    default="auto",
    show_default=True,
    help="How to search: by an HNSW graph (extra 'hnsw'), by sign codes with exact scores of the "
    "best candidates, exactly, or whichever suits the gallery's size. Binary galleries are "
    "searched exactly.",
)
rerank = click.option(
    "--rerank",
    type=click.Choice(["auto", "none", "expand", "diffusion"]),
    default="auto",
    show_default=True,
    help="Rerank the hits: expand the query by its first hits, or diffuse scores over similar "
    "photos. auto diffuses the hits of sketches in galleries of 500 to 200,000 photos, and leaves "
    "others by score.",
)
json = click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
read_only = click.option(
    "--read-only", is_flag=True, help="Do not let the page index or remove folders of photos."
)
quiet = click.option("-q", "--quiet", is_flag=True, help="Print no progress and no notices.")


def port(help_text: str) -> Callable[[Function], Function]:
    """Return the option `--port N` with that help."""
    return click.option(
        "--port",
        type=IntRange(0, 65_535),
        default=8000,
        show_default=True,
        metavar="N",
        help=help_text,
    )


def engine_options(function: Function) -> Function:
    """Add the options of an engine; the command takes them as one `engine_options`."""
    return query_engine_options(batch(function))


def query_engine_options(function: Function) -> Function:
    """Add the options of an engine for single queries, which have no `--batch`."""
    return collect_engine_options(engine(precision(threads(device(function)))))


def collect_engine_options(function: Function) -> Function:
    """Pass the values of all options of an engine to a command as one `engine_options`."""

    @functools.wraps(function)
    def command(*arguments: Any, **values: Any) -> Any:
        from sbtk_runtime.engines.base import EngineOptions

        names = [field.name for field in fields(EngineOptions) if field.name in values]
        chosen = EngineOptions(**{name: values.pop(name) for name in names})
        return function(*arguments, engine_options=chosen, **values)

    return cast(Function, command)


as_detected = click.option(
    "--as",
    "kind",
    type=click.Choice(["sketch", "photo"]),
    help=f"{_AS_HELP}  [default: detected; if unclear, a sketch]",
)
# `default=None` would count as a value in newer versions of click, so this is a separate option.
as_required = click.option(
    "--as", "kind", type=click.Choice(["sketch", "photo"]), required=True, help=_AS_HELP
)


def _day(context: click.Context, parameter: click.Parameter, value: str | None) -> date | None:
    from datetime import date

    try:
        return None if value is None else date.fromisoformat(value)
    except ValueError as problem:
        text = f"{value!r} is not a day: write it as year-month-day, such as 2024-05-01."
        raise click.BadParameter(text, context, parameter) from problem


taken_from = click.option(
    "--from",
    "taken_from",
    callback=_day,
    metavar="DAY",
    help="Only photos taken on this day (2024-05-01) or later. If a file does not say when it was "
    "taken, the time of its last change counts.",
)
taken_to = click.option(
    "--to",
    "taken_to",
    callback=_day,
    metavar="DAY",
    help="Only photos taken on this day or before.",
)


classes = click.option(
    "--classes",
    type=click.Choice(["unseen", "validation"]),
    default="unseen",
    show_default=True,
    help="Use the split's unseen classes, or seen classes held out from training.",
)


def existing_gallery(folder: Path) -> Path:
    """Return `folder` if it is a gallery.

    Raises:
        BadGallery: it is not, or indexing has not finished; says how to make one.
    """
    if (folder / MANIFEST_NAME).exists():
        return folder
    shown = printable_name(folder)
    option = "" if folder == DEFAULT_GALLERY else f" --gallery {shlex.quote(shown)}"
    is_begun = (folder / "catalogue.sqlite").exists()
    raise BadGallery(
        f"the gallery {shown} is not finished" if is_begun else f"there is no gallery {shown}",
        "a gallery made by 'sbtk index'",
        f"sbtk index PHOTOS{option}",
    )


def check_output_file(path: Path) -> None:
    """Check before any work that a file can be written to `path`.

    Raises:
        BadConfig: its folder is missing or not writable, or `path` is not a file.
    """
    shown = printable_name(path)
    if not path.parent.is_dir():
        raise BadConfig(f"the folder of {shown} does not exist", "a path in an existing folder")
    if path.exists() and not path.is_file():
        raise BadConfig(f"{shown} is not a file", "the name of a file to write")
    if not os.access(path.parent, os.W_OK):
        raise BadConfig(f"{shown} cannot be written: its folder is read-only")


def bundle_for_gallery(model: str | None, folder: Path, made_by: str) -> Bundle:
    """Return the bundle that `model` names, by default the listed bundle with the id `made_by`.

    A gallery may have been made by another model than today's default.

    Raises:
        BadModel: there is no bundle of that name.
        ModelMismatch: no bundle in `sbtk models` has that id.
    """
    return _bundle_of(
        model,
        made_by,
        printable_name(folder),
        "name its folder: --model FOLDER; or index the photos again with a listed model: "
        f"sbtk index PHOTOS --gallery {shlex.quote(_other_name(folder))} --model NAME",
    )


def bundle_for_collection(model: str | None, gallery: RemoteGallery) -> Bundle:
    """Return the bundle that `model` names, by default the listed one that made the collection.

    Raises:
        BadModel: there is no bundle of that name.
        ModelMismatch: it did not make the collection, or no listed bundle did.
    """
    made_by = gallery.manifest.model_id
    bundle = _bundle_of(model, made_by, gallery.name, "name its folder: --model FOLDER")
    gallery.require_bundle(bundle)
    return bundle


def _bundle_of(model: str | None, made_by: str, what: str, next_step: str) -> Bundle:
    from sbtk_runtime.bundle import Bundle, list_bundles

    if model is not None:
        return Bundle.open(model)
    bundles = list_bundles()
    for bundle in bundles:
        if bundle.manifest.model_id == made_by:
            return bundle
    here = ", ".join(bundle.manifest.model_id for bundle in bundles) or "none"
    raise ModelMismatch(
        f"{what} was made by {made_by}, which is not in 'sbtk models' ({here})",
        f"the bundle {made_by}",
        next_step,
    )


def chosen_collection(at: str | None, mounts: Sequence[str]) -> str | None:
    """Return the URL of the collection to search; `None` for the gallery on disk.

    Raises:
        click.UsageError: both were named on the command line, or photos of none are mounted.
    """
    context = click.get_current_context()
    is_gallery_named = context.get_parameter_source("gallery") == ParameterSource.COMMANDLINE
    if at is not None and is_gallery_named:
        if context.get_parameter_source("at") == ParameterSource.COMMANDLINE:
            raise click.UsageError("--at and --gallery cannot be combined.")
        at = None
    if mounts and at is None:
        raise click.UsageError("--photos requires --at.")
    return at


def open_collection(at: str, mounts: Sequence[str]) -> RemoteGallery:
    """Return the collection at a URL, with the folders that its sources have here.

    Raises:
        BadConfig: a mount is not SOURCE=FOLDER, of a source that has none yet, or its folder does
            not exist.
        RemoteError: the database does not answer, refuses, or has no such collection.
    """
    folders: dict[str, Path] = {}
    for mount in mounts:
        source, _, folder = mount.partition("=")
        found = f"--photos {mount}"
        if source in folders:
            found += " after another one for this source"
        elif folder and not Path(folder).is_dir():
            found = f"there is no folder {folder}"
        elif folder:
            folders[source] = Path(folder)
            continue
        raise BadConfig(printable_name(found), "--photos SOURCE=FOLDER, with a folder here")
    from sbtk_runtime.gallery.remote_gallery import RemoteGallery

    return RemoteGallery.open(at, folders)


def unmounted_notice(gallery: RemoteGallery) -> str:
    """Return the notice that photos cannot be shown here; empty if all can."""
    sources = gallery.unmounted()
    if not sources:
        return ""
    names = ", ".join(map(printable_name, sources[:5])) + (", ..." if len(sources) > 5 else "")
    return f"photos of {names} are not mounted here: --photos SOURCE=FOLDER shows them"


def _other_name(folder: Path) -> str:
    other = folder.with_name(f"{folder.name.removesuffix('.sbtk')}-2.sbtk")
    return printable_name(other)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: ends the command as Ctrl-C does, but with another exit code."""


def ending_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a command: SIGINT, SIGTERM, and SIGHUP unless it is ignored."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signals = (signal.SIGINT, signal.SIGTERM)
    return signals if ignores_hangup else (*signals, signal.SIGHUP)


def ending_of(number: int) -> KeyboardInterrupt:
    """Return the exception for a signal, which decides the exit code: 130 or 143."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


class Stopping:
    """Delays the end of the command until a photo is done; see `stops_between_photos`."""

    def __init__(self) -> None:
        self._is_held_back = False
        self._wanted: KeyboardInterrupt | None = None

    def between_photos(self, *, more_to_come: bool) -> None:
        """End the command here if a signal came; otherwise note whether more photos follow.

        Raises:
            KeyboardInterrupt: a signal came since the last call.
        """
        self._is_held_back = more_to_come
        if self._wanted is not None:
            raise self._wanted

    def want(self, number: int, _frame: FrameType | None) -> None:
        """Note a signal; raise at once between photos, and for a second signal."""
        ending = ending_of(number)
        if self._wanted is not None or not self._is_held_back:
            raise ending
        self._wanted = ending


@contextlib.contextmanager
def resumable_progress(*, quiet: bool) -> Iterator[Callable[..., None]]:
    """Yield a function that shows the progress, and ends the command there if a signal came.

    It takes the number of photos that are done and their total, `None` if unknown.
    """
    with stops_between_photos() as stopping, output.progress("photos", quiet=quiet) as advance:

        def progress(done: int, total: int | None, _rate: float = 0.0) -> None:
            advance(done, total)
            stopping.between_photos(more_to_come=total is None or done < total)

        try:
            yield progress
        except KeyboardInterrupt:
            output.notice("Stopped. Run the same command to resume.")
            raise


@contextlib.contextmanager
def stops_between_photos() -> Iterator[Stopping]:
    """Yield an object that delays ending signals until a photo is done."""
    stopping = Stopping()
    before = {number: signal.getsignal(number) for number in ending_signals()}
    try:
        for number in before:
            signal.signal(number, stopping.want)
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Fields of /proc/self/stat after the name of the program: see proc(5).
_FIRST_FIELD, _ARG_START, _ARG_END = 3, 48, 49


def hide_in_command_line(argument: str, secrets: Sequence[str]) -> None:
    """Overwrite the secrets of one argument in the arguments that `ps` shows, on Linux.

    Until then, some tenths of a second after the start, they can be seen.
    """
    import ctypes

    with contextlib.suppress(OSError, ValueError, IndexError):
        numbers = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = (int(numbers[field - _FIRST_FIELD]) for field in (_ARG_START, _ARG_END))
        words = ctypes.string_at(start, end - start)
        shown = argument.encode()
        place = words.find(shown)
        hidden = shown
        for secret in secrets:
            hidden = hidden.replace(secret.encode(), b"*" * len(secret.encode()))
        if place >= 0:
            ctypes.memmove(start + place, hidden, len(hidden))
