"""The options that commands share, so that a word means the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sbtk_runtime.errors import BadGallery
from sbtk_runtime.manifest import MANIFEST_NAME, PRECISIONS
from sbtk_runtime.names import printable_name

if TYPE_CHECKING:
    from sbtk_runtime.preprocess import Kind

DEFAULT_GALLERY = Path("gallery.sbtk")

#: A file or folder of the user's; whether it is there is judged where it is opened.
PATH = click.Path(path_type=Path)

model = click.option(
    "--model",
    metavar="BUNDLE",
    help="Model bundle: a folder, or a name that 'sbtk models' lists.",
)
engine = click.option(
    "--engine",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Inference engine; auto takes the first that works ('sbtk doctor' says which).",
)
precision = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Which ONNX file of the bundle to run.  [default on a CPU: int8]",
)
threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads to use.  [default: all that this process may use]",
)
batch = click.option(
    "--batch",
    type=click.IntRange(min=1, max=4096),
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
search = click.option(
    "--search",
    type=click.Choice(["auto", "hnsw", "exact"]),
    default="auto",
    show_default=True,
    help="How to search: by the HNSW graph, exactly, or whichever suits the gallery's size.",
)
json = click.option("--json", "as_json", is_flag=True, help="Print JSON lines, for programs.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Print no progress and no notices.")


def kind(default: Kind | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns the option `--as sketch|photo`; required if there is no default."""
    return click.option(
        "--as",
        "kind",
        type=click.Choice(["sketch", "photo"]),
        default=default,
        show_default=default is not None,
        required=default is None,
        help="What the images are; it decides how they are prepared.",
    )


def existing_gallery(folder: Path) -> Path:
    """Returns `folder` if there is a gallery in it.

    Raises:
        BadGallery: there is none; says how to make one.
    """
    if (folder / MANIFEST_NAME).is_file():
        return folder
    shown = printable_name(folder)
    option = "" if folder == DEFAULT_GALLERY else f" --gallery {shown}"
    is_begun = (folder / "catalogue.sqlite").is_file()
    raise BadGallery(
        f"the gallery in {shown} is not finished" if is_begun else f"there is no gallery: {shown}",
        "one that 'sbtk index' has made",
        f"sbtk index PHOTOS{option}",
    )
