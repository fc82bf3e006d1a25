"""`sbtk embed`: writes the embeddings of image files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sbtk_cli import options, output
from sbtk_runtime.errors import BadData
from sbtk_runtime.files import count_text, printable_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.preprocess import Kind

_HELP = """Write the embeddings of image files to an .npz file.

The file has 'paths', as given and in input order, and 'embeddings', a row of length 1 for each
(float32); with --bits B also 'codes', B packed bits for each (uint8). Files that cannot be read are
listed and left out, and the exit code is 3. Files that are partly readable are listed, too.

\b
sbtk embed a.jpg b.jpg --as photo -o photos.npz
find photos -name '*.jpg' -print0 | sbtk embed --from-file - --as photo -o photos.npz
"""


@click.command(help=_HELP)
@click.argument("files", nargs=-1, type=options.NonEmptyPath())
@options.as_required
@click.option(
    "--from-file",
    "lists",
    multiple=True,
    type=options.NonEmptyPath(path_type=Path, allow_dash=True),
    metavar="LIST",
    help="Read more paths from a file, or from standard input as -; one on each line, or "
    "separated by NUL bytes.",
)
@click.option(
    "-o",
    "--output",
    "target",
    type=options.PATH,
    required=True,
    metavar="OUT.npz",
    help="The file to write.",
)
@click.option(
    "--bits",
    type=options.Bits(),
    metavar="B",
    help="Add binary codes of B bits. Needs a model that was exported with --bits B.",
)
@options.model
@options.engine_options
@options.json
@options.quiet
def command(
    files: tuple[str, ...],
    kind: Kind,
    lists: tuple[Path, ...],
    target: Path,
    bits: int | None,
    model: str | None,
    engine_options: EngineOptions,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run `sbtk embed`."""
    if not files and not lists:
        raise click.UsageError("Name image files, or a list with --from-file.")
    options.check_output_file(target)
    paths = [*files, *_read_lists(lists)]
    if not paths:
        raise BadData("the list is empty", "at least one path")
    import numpy as np

    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.embedding.embedder import Embedder
    from sbtk_runtime.embedding.stream import Failed
    from sbtk_runtime.files import atomic_path
    from sbtk_runtime.gallery.folder import path_fields

    kept: list[str] = []
    rows: list[NDArray[np.float32]] = []
    failures: list[Failed] = []
    notices: list[tuple[str, str]] = []
    bundle = Bundle.open(model)
    itq = None if bits is None else bundle.itq(bits)
    with (
        Embedder(
            bundle,
            engine_options,
            notify=lambda text: output.notice(text, quiet=quiet),
        ) as embedder,
        output.progress("files", quiet=quiet) as advance,
    ):
        output.notice(output.engine_text(embedder.model_id, embedder.engine.info), quiet=quiet)
        for item in embedder.stream(map(Path, paths), kind):
            if isinstance(item, Failed):
                failures.append(item)
            else:
                kept.append(paths[item.index])
                rows.append(item.row)
                notices += [(kept[-1], notice) for notice in item.notices]
            advance(item.index + 1, len(paths))
        model_id = embedder.model_id
    for path, notice in notices:
        output.notice(f"{printable_name(path)}: {notice}", quiet=quiet)
    for failure in failures:
        output.notice(f"{printable_name(paths[failure.index])}: {failure.reason}", quiet=quiet)
    if not rows:
        raise BadData(f"0 of {count_text(len(paths), 'file')} could be read", "an image")
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {"paths": np.array(kept), "embeddings": np.stack(rows)}
        if itq is not None:
            arrays["codes"] = itq.codes(arrays["embeddings"])
        np.savez(file, **arrays)
    if as_json:
        output.answer_json(
            {
                "file": printable_name(target),
                "model_id": model_id,
                "embedded": len(rows),
                "failed": [
                    path_fields(os.fsencode(paths[failure.index])) | {"reason": failure.reason}
                    for failure in failures
                ],
                "notices": [
                    path_fields(os.fsencode(path)) | {"notice": notice} for path, notice in notices
                ],
            }
        )
    else:
        skipped = f", {len(failures):,} skipped" if failures else ""
        output.notice(
            f"{printable_name(target)}: {count_text(len(rows), 'embedding')} of "
            f"{rows[0].size} dimensions by {model_id}{skipped}",
            quiet=quiet,
        )
    return 3 if failures else 0


def _read_lists(lists: Sequence[Path]) -> Iterator[str]:
    """Yield the paths in list files: separated by NUL bytes if there is one, else by lines."""
    for source in lists:
        data = sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()
        separator = b"\0" if b"\0" in data else b"\n"
        for line in data.split(separator):
            path = line if separator == b"\0" else line.removesuffix(b"\r")
            if path:
                yield os.fsdecode(path)
