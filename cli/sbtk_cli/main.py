"""The command `sbtk`: run a subcommand and turn exceptions into messages and exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some files were skipped, 130 interrupted,
143 terminated.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NamedTuple, NoReturn

import click

from sbtk_cli.options import Terminated, ending_signals
from sbtk_runtime.errors import MissingExtra, SbtkError
from sbtk_runtime.files import printable_name

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class LazyCommand(NamedTuple):
    """A command's module and its line in `sbtk --help`, known without importing it."""

    module: str
    help: str


COMMANDS = {
    "open": LazyCommand("sbtk_cli.open", "Index photos and search them in the browser."),
    "index": LazyCommand("sbtk_cli.index", "Create or update a gallery from folders of photos."),
    "merge": LazyCommand("sbtk_cli.merge", "Merge galleries of one model into one."),
    "push": LazyCommand("sbtk_cli.push", "Push a gallery to PostgreSQL or Milvus."),
    "query": LazyCommand("sbtk_cli.query", "Find the photos that look like a sketch."),
    "serve": LazyCommand("sbtk_cli.serve", "Draw in the browser and find photos."),
    "embed": LazyCommand("sbtk_cli.embed", "Write the embeddings of image files to an .npz file."),
    "bench": LazyCommand("sbtk_cli.bench", "Measure latency, retrieval quality or search."),
    "report": LazyCommand("sbtk_cli.report", "Compare results with published ones; draw figures."),
    "doctor": LazyCommand(
        "sbtk_cli.doctor", "Check what this machine can run, and what is missing."
    ),
    "models": LazyCommand("sbtk_cli.models", "List the model bundles, or check one."),
    "data": LazyCommand("sbtk_cli.data", "Check a data set before training on it."),
    "train": LazyCommand("sbtk_cli.train", "Train a model on sketches and photos."),
    "average": LazyCommand("sbtk_cli.average", "Average the students of several runs."),
    "export": LazyCommand("sbtk_cli.export", "Turn a training run into a model bundle."),
    "engine": LazyCommand("sbtk_cli.engine", "Build, list or remove TensorRT plans."),
}

#: The extras of modules whose names differ from those of their distributions.
_EXTRAS_OF_MODULES = {"cuda": "tensorrt", "skimage": "train", "starlette": "serve"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sbtk` and return the exit code; `arguments` are the process's if `None`."""
    if os.environ.get("_SBTK_COMPLETE"):
        sbtk.main(prog_name="sbtk")  # a shell completion: click prints it and exits
    _open_closed_outputs()
    _print_any_character()
    _let_blas_threads_sleep()
    try:
        with _raise_on_termination():
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe, as in `sbtk query ... | head -1`.
        _discard_output()
        return 0
    except Terminated:
        click.echo("Terminated.", err=True)
        return TERMINATED
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    return code


class LazyGroup(click.Group):
    """A group that imports a command when it is called, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of use, not alphabetically."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command; `None` for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name].module).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments name; suggest a similar one if there is none."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean 'sbtk {near[0]}'?" if near else "see 'sbtk --help'."
            ctx.fail(f"There is no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def _print_version(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if not is_asked or context.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"sbtk {version('sbtk')}")
    except PackageNotFoundError:
        click.echo("sbtk, not installed (running from a source tree)")
    context.exit()


_HELP = """Find photos from a sketch.

\b
sbtk open photos/        index your photos and search them in the browser
sbtk index photos/       create a gallery of your photos, once
sbtk query sketch.png    find the photos that look like the sketch

Nothing leaves this machine, unless --at names a database.
"""


@click.group(
    cls=LazyGroup,
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some files were skipped, "
    "130 interrupted, 143 terminated. Results go to standard output, everything else to standard "
    "error.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def sbtk() -> None:
    """Find photos from a sketch."""


def _run(arguments: list[str]) -> int:
    try:
        with sbtk.make_context("sbtk", arguments) as context:
            outcome = sbtk.invoke(context)
        return outcome if isinstance(outcome, int) else 0
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except click.ClickException as problem:
        problem.show()
        return problem.exit_code
    except click.Abort as problem:
        raise KeyboardInterrupt from problem
    except BrokenPipeError:
        raise
    except Exception as problem:
        if os.environ.get("SBTK_DEBUG"):
            import traceback

            traceback.print_exc()
        error = _user_error(problem)
        click.echo(f"Error: {error}", err=True)
        return error.exit_code


def _user_error(problem: Exception) -> SbtkError:
    """Return `problem`, or an error for users that describes it."""
    if isinstance(problem, SbtkError):
        return problem
    if isinstance(problem, ModuleNotFoundError):
        module = (problem.name or "").partition(".")[0]
        if extra := _extra_of(module):
            return MissingExtra(
                f"this command needs {module}, which is not installed",
                f"the extra {extra!r}",
                f'pip install "sbtk[{extra}]"',
            )
    if isinstance(problem, MemoryError) or _is_out_of_memory(problem):
        return SbtkError(
            "not enough memory",
            "",
            "try a smaller --batch, close other programs, or raise the limit: ulimit -v unlimited",
        )
    if isinstance(problem, OSError) and problem.strerror:
        # For calls on an open file, `filename` is its descriptor.
        is_named = isinstance(problem.filename, str | bytes)
        where = f"{printable_name(problem.filename)}: " if is_named else ""
        return SbtkError(f"{where}{problem.strerror}")
    return SbtkError(
        f"internal error ({type(problem).__name__}: {problem})",
        "",
        "please report it with the output of the same command under SBTK_DEBUG=1",
    )


def _extra_of(module: str) -> str | None:
    """Return the extra that installs a module; `None` if it is not an optional dependency."""
    from sbtk_runtime.machine import extras

    if module in _EXTRAS_OF_MODULES:
        return _EXTRAS_OF_MODULES[module]
    name = module.replace("_", "-")
    named = [(extra, distribution) for extra, names in extras().items() for distribution in names]
    # Such as `tensorrt_rtx`, which is in the distribution `tensorrt-rtx-cu13`.
    exact = [extra for extra, distribution in named if distribution == name]
    similar = [extra for extra, distribution in named if distribution.startswith(f"{name}-")]
    return next(iter([*exact, *similar]), None)


def _is_out_of_memory(problem: Exception) -> bool:
    """Whether the message is one of a thread or library that could not allocate memory."""
    text = str(problem).lower()
    return isinstance(problem, RuntimeError | ImportError | OSError) and any(
        words in text
        for words in ("can't start new thread", "failed to map segment", "cannot allocate memory")
    )


@contextlib.contextmanager
def _raise_on_termination() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise an exception in the block, as SIGINT does."""

    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    numbers = [number for number in ending_signals() if number != signal.SIGINT]
    try:
        before = {number: signal.signal(number, terminate) for number in numbers}
    except ValueError:  # not the main thread, which handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _let_blas_threads_sleep() -> None:
    # The threads of NumPy's OpenBLAS spin for some 25 ms after an exact search, on the cores that
    # the engine needs next: a run then took 28 ms instead of 15. OpenBLAS reads this on import.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def _open_closed_outputs() -> None:
    """Open the null device as stdout or stderr where the process was started without them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115


def _print_any_character() -> None:
    """Print characters that the terminal's encoding lacks as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Redirect stdout to the null device, so that Python does not fail on the pipe again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
