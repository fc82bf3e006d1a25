"""The options that commands share, so that a word means the same everywhere."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from sbtk_runtime.errors import BadConfig, BadGallery
from sbtk_runtime.manifest import MANIFEST_NAME, PRECISIONS
from sbtk_runtime.names import printable_name

DEFAULT_GALLERY = Path("gallery.sbtk")

#: A file or folder of the user's; whether it is there is judged where it is opened.
PATH = click.Path(path_type=Path)


class Bits(click.IntRange):
    """The length of a binary code: a multiple of 8."""

    def __init__(self) -> None:
        super().__init__(min=8, max=65_536)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the length."""
        bits = int(super().convert(value, param, ctx))
        if bits % 8:
            self.fail(f"{bits} is not a multiple of 8.", param, ctx)
        return bits


_AS_HELP = "What the images are; it decides how they are prepared."

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
    help="Inference engine: tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino, onnxruntime, of "
    "which auto takes the first that works ('sbtk doctor' says which), or onnxruntime-tensorrt.",
)
precision = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Which ONNX file of the bundle to run.  [default: int8 on a CPU, fp16 on a GPU]",
)
threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads to use.  [default: all that this process may use]",
)
device = click.option(
    "--device",
    metavar="NAME",
    help="cpu, cuda or cuda:N.  [default: what the engine runs on]",
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
    help="How to search: by the HNSW graph (extra 'hnsw'), exactly, or whichever suits the "
    "gallery's size. Binary galleries are searched exactly.",
)
rerank = click.option(
    "--rerank",
    type=click.Choice(["none", "expand", "diffusion"]),
    default="none",
    show_default=True,
    help="Order the hits by a query that its first hits are added to, or by spreading scores over "
    "photos that are like each other.",
)
json = click.option("--json", "as_json", is_flag=True, help="Print JSON lines, for programs.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Print no progress and no notices.")


as_default_sketch = click.option(
    "--as",
    "kind",
    type=click.Choice(["sketch", "photo"]),
    default="sketch",
    show_default=True,
    help=_AS_HELP,
)
# Newer versions of click take `default=None` for an answer, so the required one is spelt out.
as_required = click.option(
    "--as", "kind", type=click.Choice(["sketch", "photo"]), required=True, help=_AS_HELP
)


def existing_gallery(folder: Path) -> Path:
    """Returns `folder` if there is a gallery in it.

    Raises:
        BadGallery: there is none, or only the beginning of one; says how to make it.
    """
    if (folder / MANIFEST_NAME).exists():
        return folder
    shown = printable_name(folder)
    option = "" if folder == DEFAULT_GALLERY else f" --gallery {shlex.quote(shown)}"
    is_begun = (folder / "catalogue.sqlite").exists()
    raise BadGallery(
        f"the gallery {shown} is not finished" if is_begun else f"there is no gallery {shown}",
        "one that 'sbtk index' has made",
        f"sbtk index PHOTOS{option}",
    )


def check_output_file(path: Path) -> None:
    """Checks, before any work is done, that a file can be written to `path`.

    Raises:
        BadConfig: its folder is missing or closed, or something else than a file lies there.
    """
    shown = printable_name(path)
    if not path.parent.is_dir():
        raise BadConfig(f"there is no folder for {shown}", "a path in a folder that exists")
    if path.exists() and not path.is_file():
        raise BadConfig(f"{shown} is not a file", "the name of a file to write")
    if not os.access(path.parent, os.W_OK):
        raise BadConfig(f"{shown} cannot be written: its folder is read-only")
