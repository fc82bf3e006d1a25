"""The command group: fast help, exit codes, error messages, and no traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from sbtk_cli import main as main_module
from sbtk_cli.main import COMMANDS, _extra_of, main, sbtk
from sbtk_cli.options import ending_signals
from sbtk_runtime.engines.registry import ENGINE_NAMES
from sbtk_runtime.errors import BadConfig, BadGallery
from tests.processes import run_python

HEAVY = (
    *("numpy", "PIL", "hnswlib", "rich", "torch", "matplotlib", "sqlite3", "importlib.metadata"),
    *("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "starlette", "uvicorn"),
)


@pytest.mark.parametrize(
    "command", [[], ["query"], ["index"], ["serve"], ["report"], ["report", "map"]]
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import json, sys\n"
        "from sbtk_cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "print(json.dumps([code, sorted(sys.modules)]))\n"
    )
    exit_code, modules = json.loads(run_python(code, *command, "--help").splitlines()[-1])
    assert exit_code == 0
    assert not set(modules) & set(HEAVY)


def test_help_names_every_engine_in_the_order_of_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "--help"]) == 0
    shown = capsys.readouterr().out
    described = " ".join(shown[shown.index("--engine") :].split()).replace("- ", "-")
    named = re.findall(r"(?:tensorrt|onnxruntime|openvino)[a-z-]*", described)
    assert tuple(dict.fromkeys(named)) == ENGINE_NAMES


def test_help_lists_every_command_without_importing_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert name in shown
        assert entry.help in " ".join(shown.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_shows_each_commands_first_line(name: str) -> None:
    context = click.Context(sbtk)
    command = sbtk.get_command(context, name)
    assert command is not None
    assert (command.help or "").splitlines()[0] == COMMANDS[name].help


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sbtk")


def test_a_misspelt_command_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qurey", "x.png"]) == 2
    assert "did you mean 'sbtk query'?" in capsys.readouterr().err


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nonsense"]) == 2
    assert "--nonsense" in capsys.readouterr().err


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Return a function that adds a command `broken`, which raises what it is given."""

    def add(problem: BaseException) -> None:
        @click.command()
        def command() -> None:
            raise problem

        module = type(main_module)("broken_command")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "broken_command", module)
        monkeypatch.setitem(
            COMMANDS, "broken", main_module.LazyCommand("broken_command", "Breaks.")
        )

    return add


@pytest.mark.parametrize(
    ("problem", "code", "message"),
    [
        (
            BadGallery("it is torn", "a whole one", "sbtk index"),
            1,
            "it is torn\n  expected: a whole",
        ),
        (BadConfig("k is 0"), 2, "Error: k is 0\n"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "Error: /x/y: Permission denied\n"),
        (MemoryError(), 1, "--batch"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
        (ModuleNotFoundError("No", name="torch.nn"), 1, 'pip install "sbtk[train]"'),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (click.Abort(), 130, "Interrupted."),
        (BrokenPipeError(), 0, ""),
        (click.exceptions.Exit(3), 3, ""),
    ],
)
def test_every_exit_has_its_code_and_no_traceback(
    broken: Callable[[BaseException], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    problem: BaseException,
    code: int,
    message: str,
) -> None:
    monkeypatch.delenv("SBTK_DEBUG", raising=False)
    # The real stdout would be pointed at the null device for the tests that follow.
    monkeypatch.setattr(main_module, "_discard_output", lambda: None)
    broken(problem)
    assert main(["broken"]) == code
    shown = capfd.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_debug_shows_tracebacks(
    broken: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SBTK_DEBUG", "1")
    broken(ZeroDivisionError("by zero"))
    assert main(["broken"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_sigterm_gives_exit_code_143(name: str) -> None:
    code = (
        "import os, signal, sys, click\n"
        "from sbtk_cli import main as m\n"
        "@click.command()\n"
        "def command():\n"
        "    os.kill(os.getpid(), signal." + name + ")\n"
        "sys.modules['dying'] = type(m)('dying')\n"
        "sys.modules['dying'].command = command\n"
        "m.COMMANDS['dying'] = m.LazyCommand('dying', '')\n"
        "sys.exit(m.main(['dying']))\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert finished.returncode == 128 + signal.SIGTERM
    assert finished.stderr == "Terminated.\n"


def test_sighup_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["--version"]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.SIGHUP not in ending_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in ending_signals()


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    finished = subprocess.run(
        [sys.executable, "-m", "sbtk_cli", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert finished.returncode == 0
    assert finished.stderr == b""


def test_shell_completions_are_printed() -> None:
    environment = os.environ | {
        "_SBTK_COMPLETE": "bash_complete",
        "COMP_WORDS": "sbtk que",
        "COMP_CWORD": "1",
    }
    finished = subprocess.run(
        [sys.executable, "-m", "sbtk_cli"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "query" in finished.stdout


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("hnswlib", "hnsw"),
        ("onnxruntime", "cpu"),
        ("openvino", "openvino"),
        ("tensorrt", "tensorrt"),
        ("tensorrt_rtx", "tensorrt-rtx"),
        ("cuda", "tensorrt"),
        ("torch", "train"),
        ("nltk", "train"),
        ("skimage", "train"),
        ("onnx", "export"),
        ("matplotlib", "plot"),
        ("pillow_heif", "photos"),
        ("textual_image", "show"),
        ("starlette", "serve"),
        ("prometheus_client", "serve"),
        ("no_such_module", None),
    ],
)
def test_a_missing_module_names_its_extra(module: str, extra: str | None) -> None:
    assert _extra_of(module) == extra


@pytest.mark.parametrize(("own", "expected"), [(None, "4"), ("20", "20")])
def test_blas_threads_sleep_after_a_search_unless_a_variable_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, own: str | None, expected: str
) -> None:
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", own or "")
    if own is None:
        monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT")
    assert main(["--version"]) == 0
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == expected


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_is_not_an_error(closed: str) -> None:
    command = f'"$0" -m sbtk_cli models {closed}'
    finished = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "sbtk" not in finished.stderr
    assert ("sbtknet-sketchy" in finished.stdout) == (closed == "2>&-")


@pytest.mark.parametrize("start", [["-m", "sbtk_cli"], ["-c", "import sbtk_cli.main"]])
def test_a_system_without_posix_locks_gets_a_clear_error(tmp_path: Path, start: list[str]) -> None:
    """What Windows lacks is taken away before anything of sbtk is imported."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['fcntl'] = None")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *start],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ") and "Linux and macOS" in line and "WSL" in line
