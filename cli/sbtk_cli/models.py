"""`sbtk models`: lists and checks model bundles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from sbtk_cli import options, output
from sbtk_runtime.files import count_text

if TYPE_CHECKING:
    from sbtk_runtime.bundle import Bundle, Golden
    from sbtk_runtime.manifest import Precision


@click.group(invoke_without_command=True)
@options.json
@click.pass_context
def command(context: click.Context, as_json: bool) -> int:
    """List the model bundles, or check one.

    Lists the included ones and those in ./bundles. A star marks the default of --model. The
    included model is for research only; see its MODEL_CARD.md.
    """
    return 0 if context.invoked_subcommand else _print_bundles(as_json)


@command.command()
@click.argument("bundle", required=False)
@options.json
def check(bundle: str | None, as_json: bool) -> int:
    """Check the files of a bundle, and run each of its models.

    BUNDLE is a folder or a name; by default the included model. Compares every file with the size
    and SHA-256 in the manifest, then embeds a test image in each precision. If the bundle has
    golden images, prepares and embeds them, and compares the results with the golden ones.
    """
    from sbtk_runtime.bundle import Bundle, read_golden, require_golden_pixels

    opened = Bundle.open(bundle)
    opened.verify()
    golden = read_golden(opened)
    for each in golden:
        require_golden_pixels(each, opened.preprocessing)
    manifest = opened.manifest
    trials = {precision: _trial(opened, precision, golden) for precision in opened.precisions}
    if as_json:
        value = {"folder": str(opened.folder), "model_id": manifest.model_id, "trials": trials}
        output.answer_json(value)
        return 0
    total = sum(record.size_bytes for record in manifest.files.values())
    output.answer(
        f"{manifest.model_id}: {count_text(len(manifest.files), 'file')}, "
        f"{output.size_text(total)}, all as in the manifest"
    )
    for precision, trial in trials.items():
        output.answer(f"  {precision}  {trial}")
    return 0


def _print_bundles(as_json: bool) -> int:
    from sbtk_runtime.bundle import Bundle, bundle_folders
    from sbtk_runtime.errors import BadModel

    bundles: list[Bundle] = []
    for folder in bundle_folders():
        try:
            # An absolute path never names an included bundle.
            bundles.append(Bundle.open(folder.absolute()))
        except BadModel as problem:
            output.notice(f"skipped: {problem}")
    default = _default_folder()
    if as_json:
        for bundle in bundles:
            output.answer_json(_describe(bundle, str(bundle.folder) == default))
        return 0
    if not bundles:
        output.notice("There are no model bundles. 'sbtk train' and 'sbtk export' make one.")
        return 0
    rows = [("", "MODEL", "BACKBONE", "DIM", "PRECISIONS", "SIZE", "FOLDER")]
    for bundle in bundles:
        manifest = bundle.manifest
        size_bytes = sum(record.size_bytes for record in manifest.files.values())
        rows.append(
            (
                "*" if str(bundle.folder) == default else "",
                manifest.model_id,
                manifest.backbone,
                str(manifest.dim) + "".join(f", {bits} bits" for bits in bundle.bits),
                " ".join(bundle.precisions),
                output.size_text(size_bytes),
                output.shown_relative(bundle.folder),
            )
        )
    output.answer(output.plain_table(rows))
    return 0


def _default_folder() -> str | None:
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.errors import BadModel

    try:
        return str(Bundle.open().folder.absolute())
    except BadModel:
        return None


def _describe(bundle: Bundle, is_default: bool) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "model_id": manifest.model_id,
        "default": is_default,
        "folder": str(bundle.folder),
        "method": manifest.method,
        "backbone": manifest.backbone,
        "dim": manifest.dim,
        "domain_input": manifest.domain_input,
        "precisions": list(bundle.precisions),
        "bits": list(bundle.bits),
        "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
        "metrics": manifest.metrics,
        "parity": manifest.parity,
        "training": manifest.training,
        "created": manifest.created,
    }


def _trial(bundle: Bundle, precision: Precision, golden: Sequence[Golden]) -> str:
    """Return the result of embedding a test image, as a sketch and as a photo.

    Raises:
        BadModel: the embeddings are not of length 1, do not have the manifest's dimension, or are
            not the golden ones.
    """
    import numpy as np

    from sbtk_runtime.bundle import require_golden_embedding
    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.engines.registry import open_engine
    from sbtk_runtime.engines.session import validate_embeddings
    from sbtk_runtime.errors import BadModel, EngineUnavailable, MissingExtra
    from sbtk_runtime.preprocess import KINDS, SIZE_PX

    try:
        engine = open_engine(bundle, EngineOptions(precision=precision))
    except (EngineUnavailable, MissingExtra) as problem:
        return f"not run: {problem.found}" + (f" ({problem.next_step})" * bool(problem.next_step))
    try:
        image = np.random.default_rng(0).integers(0, 256, (1, SIZE_PX, SIZE_PX, 3), np.uint8)
        rows, is_bad = validate_embeddings(
            np.concatenate([engine.run(image, kind) for kind in KINDS])
        )
        goldens, are_bad = validate_embeddings(
            np.concatenate([engine.run(each.pixels[None], each.kind) for each in golden])
            if golden
            else rows
        )
    finally:
        engine.close()
    if is_bad.any() or are_bad.any() or rows.shape != (len(KINDS), bundle.manifest.dim):
        raise BadModel(
            f"the {precision} model of {bundle.folder} does not give embeddings for a test image",
            f"{bundle.manifest.dim} finite numbers of length 1",
            "export the run again",
        )
    cosines = [
        cosine
        for each, row in zip(golden, goldens, strict=False)
        if (cosine := require_golden_embedding(each, precision, row)) is not None
    ]
    closeness = f", golden images at cosine {min(cosines):.4f}" if cosines else ""
    return f"runs on {engine.info.name} {engine.info.version}{closeness}"
