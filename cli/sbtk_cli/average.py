"""`sbtk average`: average the weights of several training runs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from sbtk_cli import options, output
from sbtk_runtime.errors import BadConfig

_HELP = """Average the students of several runs.

The runs must start from the same weights and data; their seeds and recipes may differ. The mean
of their weights is often better than the best of them. Prints the new run folder, for 'sbtk
export', and compares it with its parts on the validation classes.

\b
sbtk train DATA --seed 0 --out runs/a
sbtk train DATA --seed 1 --out runs/b
sbtk average runs/a runs/b
"""


@click.command(help=_HELP)
@click.argument("runs", type=options.PATH, nargs=-1, required=True, metavar="RUN RUN...")
@click.option(
    "--out", type=options.PATH, metavar="RUN", help="Run folder.  [default: runs/<date>-average]"
)
@options.threads
@options.json
@options.quiet
def command(
    runs: tuple[Path, ...], out: Path | None, threads: int | None, as_json: bool, quiet: bool
) -> int:
    """Run `sbtk average`."""
    from sbtk_train.runs.average import average_runs
    from sbtk_train.runs.checkpoint import LOCK, locked
    from sbtk_train.runs.run import new_run_folder

    if out is not None and out.exists() and not out.is_dir():
        raise BadConfig(f"{out} is a file", "a new folder")
    folder = out if out is not None else new_run_folder(Path("runs"), "average")
    is_new = out is None or not out.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if any(path.name != LOCK for path in folder.iterdir()):
            raise BadConfig(f"{folder} exists and is not empty", "a new folder")
        try:
            record = average_runs(
                runs, folder, lambda text: output.notice(text, quiet=quiet), threads=threads or 0
            )
        except BaseException:
            # An incomplete folder is not a run, and would block the next attempt.
            for path in folder.iterdir():
                if path.name != LOCK or is_new:
                    path.unlink()
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    output.notice(f"next: sbtk export {folder}", quiet=quiet)
    if as_json:
        shown = {name: record[name] for name in ("best", "averaged", "student_sha256")}
        output.answer_json({"folder": str(folder)} | shown)
        return 0
    output.answer(str(folder))
    return 0
