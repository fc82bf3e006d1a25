"""`sbtk engine`: builds, lists and removes TensorRT plans."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from sbtk_cli import options, output
from sbtk_runtime.engines.base import Notify, no_notify
from sbtk_runtime.engines.tensorrt.build import Progress, no_progress, notify_every
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable, MissingExtra, SbtkError
from sbtk_runtime.files import count_text

if TYPE_CHECKING:
    from sbtk_runtime.engines.cuda import CudaDevice
    from sbtk_runtime.engines.tensorrt.build import BuildSettings
    from sbtk_runtime.engines.tensorrt.cache import CacheEntry, PlanRecord
    from sbtk_runtime.engines.tensorrt.check import PlanCheck
    from sbtk_runtime.engines.tensorrt.engine import ReadyPlan
    from sbtk_runtime.engines.tensorrt.library import TensorRt
    from sbtk_runtime.manifest import Precision

_BUILD_HELP = """Build the plan of a model and keep it for the other commands.

BUNDLE is a folder or a name; by default the included model. Does nothing if the plan exists.
On a machine with a GPU, then compares the plan with ONNX Runtime on the CPU. TensorRT builds for
the GPU of this machine; TensorRT-RTX needs no GPU to build.

\b
sbtk engine build
sbtk engine build bundles/mine --precision int8 --batch 1,8,64
sbtk engine build bundles/mine --regions
"""

_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@click.group(invoke_without_command=True)
@options.json
@click.pass_context
def command(context: click.Context, as_json: bool) -> int:
    """Build, list or remove TensorRT plans.

    A plan is a model's ONNX file compiled for one GPU and one version of TensorRT. Plans are kept
    in $XDG_CACHE_HOME/sbtk (or ~/.cache/sbtk). Without a subcommand, lists them.
    """
    return 0 if context.invoked_subcommand else print_plans(as_json)


@command.command(help=_BUILD_HELP)
@click.argument("bundle", required=False)
@click.option(
    "--precision",
    type=click.Choice(["fp16", "int8", "fp32"]),
    default="fp16",
    show_default=True,
    help="Precision of the ONNX file to build from.",
)
@click.option(
    "--batch",
    "batches",
    default="1,32,256",
    show_default=True,
    metavar="MIN,OPT,MAX",
    help="Smallest batch size, the one to optimise for, and the largest; N means 1,N,N.",
)
@click.option(
    "--module",
    metavar="NAME",
    help="tensorrt or tensorrt_rtx.  [default: the first that is installed]",
)
@click.option(
    "--workspace",
    default="4GiB",
    show_default=True,
    metavar="SIZE",
    help="Limit for scratch memory on the GPU, such as 512MiB.",
)
@click.option("--device", metavar="NAME", help="cuda or cuda:N.  [default: the first GPU]")
@options.regions(
    "Build the plan that embeds N regions of a photo (9 or 16, by default 16), for 'sbtk index "
    "--regions'. Give it after BUNDLE."
)
@options.json
@options.quiet
def build(
    bundle: str | None,
    precision: Precision,
    batches: str,
    module: str | None,
    workspace: str,
    device: str | None,
    regions: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run `sbtk engine build`."""
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.engines.tensorrt.check import require_sound
    from sbtk_runtime.engines.tensorrt.engine import ready_plan
    from sbtk_runtime.engines.tensorrt.library import find_tensorrt
    from sbtk_runtime.regions import grid_of

    grid = None if regions is None else grid_of(regions)
    settings = _settings(batches, workspace)
    opened = Bundle.open(bundle)
    opened.onnx_path(precision, "tensorrt")
    trt = find_tensorrt(module)
    gpu = _gpu(trt, device, quiet)
    _require_cache()

    with build_status(quiet=quiet) as status:
        ready = ready_plan(
            *(opened, precision, trt, gpu, settings),
            notify=status.notify,
            progress=status.progress,
            regions=grid,
        )
    if ready.kept_in is None:
        raise EngineUnavailable(
            "the plan was built but could not be saved",
            "a writable cache with enough space",
            "fix the problem above, then build again",
        )
    check = None
    if gpu is not None:
        output.notice("comparing the plan with ONNX Runtime on the CPU", quiet=quiet)
        check = require_sound(
            *(ready, opened, trt, gpu),
            lambda text: output.notice(text, quiet=quiet),
            grid,
        )
    _print_plan(ready, check, as_json)
    return 0


@command.command("list")
@options.json
def list_plans(as_json: bool) -> int:
    """List the plans, and whether this machine can use them.

    Checks the hash of every plan. A plan that is damaged, or that other users may write, is never
    used.
    """
    return print_plans(as_json)


@command.command()
@click.argument("bundle", required=False)
@click.option("--all", "is_all", is_flag=True, help="Remove all plans, and the timings of builds.")
@options.json
@options.quiet
def clear(bundle: str | None, is_all: bool, as_json: bool, quiet: bool) -> int:
    """Remove the plans of a model, or all of them.

    BUNDLE is a folder, a name, or a MODEL of 'sbtk engine list', whose bundle may have been
    deleted. Removed plans can be built again.
    """
    from sbtk_runtime.engines.tensorrt.cache import PlanCache, cache_folder

    if is_all == (bundle is not None):
        raise BadConfig(
            "both a BUNDLE and --all" if is_all else "nothing to remove was named",
            "a BUNDLE or --all",
            "sbtk engine list shows the plans",
        )
    cache = PlanCache(cache_folder())
    cleared = cache.clear(None if bundle is None else _model_in_cache(cache.entries(), bundle))
    if as_json:
        output.answer_json(asdict(cleared))
    elif not quiet:
        output.answer(
            f"removed {count_text(cleared.plans, 'plan')}, {output.size_text(cleared.size_bytes)}"
        )
    return 0


def _settings(batches: str, workspace: str) -> BuildSettings:
    from sbtk_runtime.engines.tensorrt.build import BuildSettings

    parts = batches.split(",")
    numbers = [int(part) for part in parts if re.fullmatch(r"\s*\d{1,9}\s*", part, re.ASCII)]
    if len(numbers) != len(parts) or len(numbers) not in (1, 3):
        raise BadConfig(
            f"--batch {batches!r}",
            "three whole numbers, such as 1,32,256, or one",
            "--batch 1,8,64",
        )
    smallest, usual, largest = numbers if len(numbers) == 3 else (1, *numbers, *numbers)
    return BuildSettings(smallest, usual, largest, workspace_bytes=_parse_size(workspace))


def _parse_size(size: str) -> int:
    """Return the bytes of a size such as `4GiB`, `1.5 GB`, `512m` or `1048576`."""
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise BadConfig(f"--workspace {size!r}", "a size such as 512MiB or 4GiB")
    number, prefix, binary = match.groups()
    exponent = " KMGT".index(prefix.upper() or " ")
    # Bare letters are binary, as in TensorRT's own tool.
    is_decimal = not binary and size.strip()[-1:] in "bB"
    return int(float(number) * (1000 if is_decimal else 1024) ** exponent)


def _gpu(trt: TensorRt, device: str | None, quiet: bool) -> CudaDevice | None:
    """Return the GPU to build for; `None` if there is none and the library can build without."""
    from sbtk_runtime.engines.cuda import find_device

    try:
        return find_device(device or "cuda")
    except (EngineUnavailable, MissingExtra) as problem:
        if trt.needs_a_driver_to_build or device is not None:
            raise
        output.notice(
            f"the plan will be built but not run: {problem.found}. It is for every GPU that "
            f"{trt.title} supports",
            quiet=quiet,
        )
        return None


def _require_cache() -> None:
    """Check that plans can be saved, before minutes of building.

    Raises:
        EngineUnavailable: the cache cannot be created, written or trusted.
    """
    from sbtk_runtime.engines.tensorrt.cache import cache_folder

    folder = cache_folder()
    if not os.access(folder, os.W_OK | os.X_OK):
        raise EngineUnavailable(
            f"the cache of plans cannot be written: {folder}",
            "a folder that you may write",
            "chmod 700 it, or set XDG_CACHE_HOME to another folder",
        )


def _print_plan(ready: ReadyPlan, check: PlanCheck | None, as_json: bool) -> None:
    if as_json:
        outcome = {"plan": str(ready.kept_in), "is_new": ready.is_new}
        checked = {"check": None if check is None else asdict(check)}
        output.answer_json(outcome | asdict(ready.record) | checked)
        return
    record = ready.record
    took = f"built in {output.duration_text(record.build_s)}"
    done = took if ready.is_new else "already built"
    output.answer(
        f"{record.model_id} {record.precision} for {record.module} {record.version} on "
        f"{where_text(record)}, batches {batches_text(record)}: "
        f"{output.size_text(record.plan_bytes)}, {done}"
    )
    if check is not None and check.cosine_min is not None:
        output.answer(
            f"runs on this machine; smallest cosine with {check.compared_with} on {check.images} "
            f"generated images: {check.cosine_min:.6f}"
        )
    elif check is not None:
        output.answer(f"runs on this machine; {check.compared_with}")
    assert ready.kept_in is not None
    output.answer(f"saved in {output.shown_relative(ready.kept_in)}")


def _model_in_cache(entries: list[CacheEntry], bundle: str) -> str:
    """Return the model to clear: a name or id in the cache, or the id of a bundle.

    Raises:
        BadModel: `bundle` is neither.
    """
    from sbtk_runtime.bundle import Bundle

    ids = {entry.record.model_id for entry in entries if entry.record is not None}
    if bundle in ids or bundle in {model_id.partition("@")[0] for model_id in ids}:
        return bundle
    try:
        return Bundle.open(bundle).manifest.model_id
    except BadModel as problem:
        raise BadModel(
            f"there is no plan of {bundle!r}, and {problem.found}",
            problem.expected,
            "sbtk engine list shows the plans",
        ) from problem


def print_plans(as_json: bool) -> int:
    """Print all plans in the cache; with `as_json`, a JSON line for each."""
    from sbtk_runtime.engines.tensorrt.cache import PlanCache, cache_folder

    entries = PlanCache(cache_folder()).entries()
    state = _StateHere()
    if as_json:
        for entry in entries:
            reason = state.of(entry)
            described: dict[str, Any] = {
                "plan": str(entry.path),
                "is_usable": not reason,
                "reason": reason,
                "size_bytes": entry.size_bytes,
            }
            if entry.record is not None:
                described |= asdict(entry.record)
            output.answer_json(described)
        return 0
    if not entries:
        output.notice("There are no plans yet. 'sbtk engine build' builds one.")
        return 0
    rows = [("MODEL", "PRECISION", "TENSORRT", "GPU", "BATCHES", "SIZE", "BUILT", "STATE")]
    for entry in entries:
        size = output.size_text(entry.size_bytes)
        text = f"not used: {reason}" if (reason := state.of(entry)) else "usable"
        if entry.record is None:
            rows.append((entry.path.name, "?", "?", "?", "?", size, "?", text))
            continue
        record = entry.record
        library = f"{record.module} {record.version}"
        rows.append(
            (
                record.model_id,
                record.precision,
                library,
                where_text(record),
                batches_text(record),
                size,
                record.created[:10],
                text,
            )
        )
    output.answer(output.plain_table(rows))
    return 0


def where_text(record: PlanRecord) -> str:
    """Return the GPU that a plan is for."""
    return "any GPU" if record.device == "none" else record.device


def batches_text(record: PlanRecord) -> str:
    """Return smallest, usual and largest batch."""
    settings = record.settings
    return f"{settings.batch_min},{settings.batch_opt},{settings.batch_max}"


class _StateHere:
    """Whether plans can be used on this machine; each library is loaded once."""

    def __init__(self) -> None:
        self._versions: dict[str, str] = {}

    def of(self, entry: CacheEntry) -> str:
        """Return why a plan cannot be used; empty if it can."""
        record = entry.record
        if entry.reason or record is None:
            return entry.reason
        version = self._version(record.module)
        if not version:
            return f"{record.module} cannot be loaded"
        gpu = self._gpu
        name, capability = ("none", "") if gpu is None else (gpu.name, gpu.compute_capability)
        misfit = record.misfit(record.module, version, name, capability)
        return misfit or ("this machine has no GPU" if gpu is None else "")

    def _version(self, module: str) -> str:
        if module not in self._versions:
            from sbtk_runtime.engines.tensorrt.library import find_tensorrt

            try:
                self._versions[module] = find_tensorrt(module).version
            except SbtkError:
                self._versions[module] = ""
        return self._versions[module]

    @functools.cached_property
    def _gpu(self) -> CudaDevice | None:
        from sbtk_runtime.engines.cuda import find_device

        try:
            return find_device("cuda")
        except SbtkError:
            return None


#: Seconds between two lines where stderr is not a terminal; a build takes a few minutes.
LINE_EVERY_S = 60.0


class BuildStatus(NamedTuple):
    """Callbacks for the progress of a build and for notices."""

    progress: Progress
    notify: Notify


@contextlib.contextmanager
def build_status(*, quiet: bool = False) -> Iterator[BuildStatus]:
    """Yield callbacks that show the progress of a build, and notices, on stderr."""
    if quiet:
        yield BuildStatus(no_progress, no_notify)
    elif output.is_progress_wanted(quiet):
        from rich.console import Console

        console = Console(stderr=True)  # respects NO_COLOR

        def notify(text: str) -> None:
            # Through the console, so that the status line moves out of the way.
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        with console.status("waiting for TensorRT") as status:
            yield BuildStatus(lambda progress: status.update(progress.sentence()), notify)
    else:
        yield BuildStatus(notify_every(LINE_EVERY_S, output.notice), output.notice)
