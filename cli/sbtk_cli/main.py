"""The command `sbtk`: finds the subcommand, and turns every ending into a message and a code.

Exit codes: 0 done, 1 failed, 2 usage, 3 done with some files skipped, 130 interrupted, 143 ended.
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
    """Where a command lives and its line in `sbtk --help`, known without importing it."""

    module: str
    help: str


COMMANDS = {
    "index": LazyCommand("sbtk_cli.index", "Make or update a gallery from folders of photos."),
    "query": LazyCommand("sbtk_cli.query", "Find the photos that look like a sketch."),
    "serve": LazyCommand("sbtk_cli.serve", "Draw in the browser and find photos."),
    "embed": LazyCommand("sbtk_cli.embed", "Write the embeddings of image files to an .npz file."),
    "bench": LazyCommand("sbtk_cli.bench", "Measure latency, retrieval quality or search."),
    "report": LazyCommand("sbtk_cli.report", "Compare results with published ones; draw figures."),
    "doctor": LazyCommand("sbtk_cli.doctor", "Say what this machine can run, and what is missing."),
    "models": LazyCommand("sbtk_cli.models", "List the model bundles, or check one."),
    "data": LazyCommand("sbtk_cli.data", "Look through a data set before training on it."),
    "train": LazyCommand("sbtk_cli.train", "Train a model on sketches and photos."),
    "average": LazyCommand("sbtk_cli.average", "Average the students of several runs."),
    "export": LazyCommand("sbtk_cli.export", "Turn a training run into a model bundle."),
    "engine": LazyCommand("sbtk_cli.engine", "Build, list or remove TensorRT plans."),
}

#: The extra that brings a module which the base install does without.
EXTRA_OF_MODULE = {
    "hnswlib": "hnsw",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "cuda": "tensorrt",
    "torch": "train",
    "torchvision": "train",
    "safetensors": "train",
    "onnx": "export",
    "onnxscript": "export",
    "matplotlib": "plot",
    "pyarrow": "parquet",
    "pillow_heif": "photos",
    "rawpy": "photos",
    "textual_image": "show",
    "starlette": "serve",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `sbtk` with the given arguments (of the process if `None`) and returns the exit code."""
    if os.environ.get("_SBTK_COMPLETE"):
        sbtk.main(prog_name="sbtk")  # the shell asks for completions; click answers and exits
    _open_closed_outputs()
    _print_any_character()
    _let_blas_threads_sleep()
    try:
        with _termination_raised():
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the answers has seen enough, as in `sbtk query ... | head -1`.
        _discard_output()
        return 0
    except Terminated:
        click.echo("Ended by a signal.", err=True)
        return TERMINATED
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    return code


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names in the order of the work, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns the command, imported now; `None` for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name].module).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns the command that the arguments name; suggests one when they name none."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean 'sbtk {near[0]}'?" if near else "see 'sbtk --help'."
            ctx.fail(f"There is no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def _print_version(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if not is_asked or context.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"sbtk {version('sbtk')}")
    except PackageNotFoundError:
        click.echo("sbtk, run from a source tree that is not installed")
    context.exit()


_HELP = """Find photos from a sketch.

\b
sbtk index photos/       makes a gallery of your photos, once
sbtk query sketch.png    finds those that look like the sketch

Nothing leaves this machine: sbtk opens no network connection.
"""


@click.group(
    cls=LazyGroup,
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some files were skipped, "
    "130 interrupted, 143 terminated. Answers go to standard output, everything else to standard "
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
    """Finds photos from a sketch."""


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
        told = _told(problem)
        click.echo(f"Error: {told}", err=True)
        return told.exit_code


def _told(problem: Exception) -> SbtkError:
    """Returns what the user is told about `problem`: it, or what stands for it."""
    if isinstance(problem, SbtkError):
        return problem
    if isinstance(problem, ModuleNotFoundError):
        module = (problem.name or "").partition(".")[0]
        if extra := EXTRA_OF_MODULE.get(module):
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
        # A call on an open file has its number for a name.
        is_named = isinstance(problem.filename, str | bytes)
        where = f"{printable_name(problem.filename)}: " if is_named else ""
        return SbtkError(f"{where}{problem.strerror}")
    return SbtkError(
        f"sbtk met a fault of its own ({type(problem).__name__}: {problem})",
        "",
        "please report it, with what the same command prints under SBTK_DEBUG=1",
    )


def _is_out_of_memory(problem: Exception) -> bool:
    """Whether the system gave no memory to a thread or a library, in the words of those."""
    text = str(problem).lower()
    return isinstance(problem, RuntimeError | ImportError | OSError) and any(
        words in text
        for words in ("can't start new thread", "failed to map segment", "cannot allocate memory")
    )


@contextlib.contextmanager
def _termination_raised() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the block as SIGINT does, by an exception."""

    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    numbers = [number for number in ending_signals() if number != signal.SIGINT]
    try:
        before = {number: signal.signal(number, terminate) for number in numbers}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _let_blas_threads_sleep() -> None:
    # NumPy's OpenBLAS keeps its threads spinning for some 25 ms after an exact search, on the cores
    # that the engine needs next: a run of it then took 28 ms and not 15. It reads this on import.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def _open_closed_outputs() -> None:
    """Gives a process that was started without stdout or stderr the null device instead."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115


def _print_any_character() -> None:
    """Keeps a path that the terminal's encoding lacks from ending the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Points stdout at the null device, or Python complains about the closed pipe once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
