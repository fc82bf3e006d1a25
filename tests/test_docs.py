"""What the Markdown files say is so: links lead somewhere, and commands work as they stand.

README's commands are run, in their order, in a folder with the files that they name. Those that
take minutes, torch or a data set (`train`, `export`, `bench`, `data`), and the one that serves
until it is stopped, are parsed instead, by the very commands: an unknown option or a word too many
fails. Their own tests run them.

In `docs/` every block is run as a script, unless `<!-- not run: REASON -->` precedes it; then the
sbtk commands in it are parsed. Blocks that name the address of `sbtk serve` are run with a real
server on a free port, over the gallery that the blocks before have made.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from sbtk_cli.main import COMMANDS, sbtk
from sbtk_runtime.bundle import list_bundles
from tests.serve_process import serving
from tests.tiny import tiny_bundle, write_photos, write_sketch

ROOT = Path(__file__).parents[1]
PARSED_ONLY = {"train", "export", "bench", "data", "open", "serve"}

_SKIPPED_FOLDERS = {"runs", "bundles", "build", "dist", "node_modules", "shared"}
_ADDRESS = "127.0.0.1:8000"
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(
    r"(?:^<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
# The command by its name or its path, or as what a container of the image is given.
_COMMAND = re.compile(r"(?:^|\s|/bin/)sbtk(?::\w+)? ((?![.-])\w[^<>|\n]*)")
_NAMED_FILE = re.compile(r"\b(?:sbtk_\w+|cli/sbtk_cli)/[\w/]+\.py\b")
_RUN = 'sbtk() { "$PYTHON" -P -m sbtk_cli "$@"; }; set -o pipefail; '


def _documents() -> list[Path]:
    return [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(
            part in _SKIPPED_FOLDERS or part.startswith(".")
            for part in path.relative_to(ROOT).parts
        )
    ]


def _blocks(text: str, language: str) -> Iterator[str]:
    yield from (body for found, body in _FENCE.findall(text) if found == language)


def _shell_commands(text: str) -> list[str]:
    lines = [line for block in _blocks(text, "sh") for line in block.splitlines()]
    # Two blanks before a remark; within a command nothing in our documents looks like it.
    return [command for line in lines if (command := line.split("  #")[0].strip())]


class Block(NamedTuple):
    """A block of a guide; `reason` says why it is not run, and is empty when it is."""

    reason: str
    language: str
    body: str

    @property
    def commands(self) -> list[list[str]]:
        """The words after `sbtk` of each of its commands."""
        lines = self.body.replace("\\\n", " ").splitlines()
        found = [_COMMAND.search(line.split("  #")[0]) for line in lines]
        return [shlex.split(match[1]) for match in found if match is not None]


README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
GUIDES = {
    path.name: [
        Block(*found) for found in _BLOCK.findall(path.read_text()) if found[1] != "mermaid"
    ]
    for path in sorted((ROOT / "docs").glob("*.md"))
}
_WITH_COMMANDS = {name: blocks for name, blocks in GUIDES.items() if blocks}
guides = pytest.mark.parametrize("blocks", _WITH_COMMANDS.values(), ids=_WITH_COMMANDS)
SBTK_COMMANDS = [line for line in _shell_commands(README) if line.startswith("sbtk ")]


@pytest.mark.parametrize(
    "document", _documents(), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_relative_links_work(document: Path) -> None:
    text = _FENCE.sub("", document.read_text())
    broken = [link for link in _LINK.findall(text) if not _leads_somewhere(document, link)]
    assert not broken


def test_the_readme_opens_with_the_two_commands() -> None:
    first = next(_blocks(README, "sh"))
    assert [line.split("  #")[0].strip() for line in first.splitlines()] == [
        "make demo",
        "make test",
    ]
    assert README.index(first) < 200


def test_the_reference_lists_every_command_and_no_other() -> None:
    table = re.findall(r"^\| `sbtk (\w+)", REFERENCE, re.MULTILINE)
    assert sorted(table) == sorted(COMMANDS)
    assert {line.split()[1] for line in SBTK_COMMANDS} <= set(COMMANDS)


def test_the_reference_lists_the_exit_codes_of_the_help() -> None:
    table = re.findall(r"^\| (\d+) \|", REFERENCE, re.MULTILINE)
    said = re.search(r"Exit codes: (.+?)\.", " ".join((sbtk.epilog or "").split()))
    assert said is not None
    assert table == re.findall(r"\d+", said[1])


def test_the_reference_lists_the_variables_of_the_options() -> None:
    table = set(re.findall(r"^\| `([A-Z_]+)` \|", REFERENCE, re.MULTILINE))
    named = {name for command in _commands(sbtk) for name in _variables(command)}
    assert {"SBTK_GALLERY", "SBTK_DATA", "SBTK_TOKEN"} <= named <= table


def test_the_readme_gives_the_licence_wherever_it_introduces_the_model() -> None:
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL))
    for name in ("Install", "Results", "Licence"):
        assert "research use only" in " ".join(sections[name].split()), name


def test_make_targets_in_documents_exist() -> None:
    commands = [line for path in _documents() for line in _shell_commands(path.read_text())]
    targets = {line.split()[1] for line in commands if line.startswith("make ")}
    assert {"demo", "test", "check", "format"} <= targets
    help_text = _make("help")
    assert {line.split()[1] for line in help_text.splitlines()} >= targets


def test_extras_in_documents_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    named = {
        extra
        for path in _documents()
        for group in re.findall(r"(?:\.|sbtk)\[([a-z,-]+)\]", path.read_text())
        for extra in group.split(",")
    }
    table = set(re.findall(r"^\| `([\w-]+)` \|", REFERENCE, re.MULTILINE)) & extras
    assert named <= extras
    assert table == extras


def test_constraints_pin_exactly_what_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # onnxruntime-gpu lies beside the environment, without what it depends on.
    wanted = [*project["dependencies"], "onnxruntime-gpu"]
    installed = re.search(r'"\.\[([a-z,-]+,dev)\]"', (ROOT / "Makefile").read_text())
    assert installed is not None
    for extra in installed[1].split(","):
        wanted += project["optional-dependencies"][extra]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert set(pins) == {re.split(r"[<>=\[]", requirement)[0] for requirement in wanted}


@pytest.mark.slow
def test_the_readmes_commands_run(workspace: Path, model: str | None) -> None:
    ran = []
    for command in SBTK_COMMANDS:
        word = command.split()[1]
        if word in PARSED_ONLY or "bundles/mine" in command:
            continue
        done = _shell(command, workspace, model)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        ran.append(word)
    assert {"index", "query"} <= set(ran)
    assert (workspace / "gallery.sbtk" / "manifest.json").is_file()


def test_the_readmes_other_commands_are_parsed(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    parsed = [line for line in SBTK_COMMANDS if line.split()[1] in PARSED_ONLY]
    for command in parsed:
        _parse(shlex.split(command)[1:])
    assert {line.split()[1] for line in parsed} == PARSED_ONLY


def test_a_trained_bundle_works_as_the_readme_shows(workspace: Path) -> None:
    command = next(line for line in SBTK_COMMANDS if "--model bundles/mine" in line)
    tiny_bundle(workspace / "bundles" / "mine")
    done = _shell(command, workspace, None)
    assert done.returncode == 0, done.stderr


def test_the_readmes_python_runs(workspace: Path, model: str | None) -> None:
    (block,) = _blocks(README, "python")
    index = _shell("sbtk index photos/", workspace, model)
    assert index.returncode == 0, index.stderr
    program = block if model is None else block.replace("Embedder()", f"Embedder({model!r})")
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=workspace,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("name", GUIDES)
def test_the_readme_links_to_every_guide(name: str) -> None:
    assert f"](docs/{name})" in README


@pytest.mark.slow
@guides
def test_the_commands_of_guides_run(blocks: list[Block], workspace: Path) -> None:
    shutil.copytree(ROOT / "deploy", workspace / "deploy")
    to_run = [block for block in blocks if not block.reason]
    assert to_run
    with contextlib.ExitStack() as stack:
        address = ""
        for block in to_run:
            if _ADDRESS in block.body and not address:
                started = serving(workspace / "gallery.sbtk", log=workspace / "serve.log")
                served = stack.enter_context(started)
                served.wait_until_ready()
                address = served.origin.removeprefix("http://")
            done = _run_block(block, block.body.replace(_ADDRESS, address), workspace)
            assert done.returncode == 0, f"{block.body}\n{done.stdout}{done.stderr}"
            for name in re.findall(r"sbtk .*(?:--html|--export|-o) (\S+)", block.body):
                written = workspace / name
                assert list(written.iterdir()) if written.is_dir() else written.stat().st_size
    if shutil.which("curl") is None and any("curl " in block.body for block in to_run):
        pytest.skip("curl is not installed: all but its commands were run")


@guides
def test_the_other_commands_of_guides_are_parsed(
    blocks: list[Block], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    left = [block for block in blocks if block.reason]
    for words in (words for block in left for words in block.commands):
        _parse(words)
    text = "\n".join(block.body for block in left)
    files = re.findall(r"docker build -f (\S+)", text) + re.findall(r"-c (\S+\.txt)", text)
    assert not [name for name in files if not (ROOT / name).is_file()]


def test_the_deployment_guide_makes_a_repository_that_triton_can_load(workspace: Path) -> None:
    (block,) = [one for one in GUIDES["deploy.md"] if "mkdir -p models" in one.body]
    shutil.copytree(ROOT / "deploy", workspace / "deploy")
    script = f'python() {{ "$PYTHON" "$@"; }}; set -e\n{block.body}'
    command = ["bash", "-c", script]
    subprocess.run(command, cwd=workspace, env=_environment(), check=True)
    model = workspace / "models" / "sbtk"
    named = {
        name
        for path in model.rglob("*.pbtxt")
        for name in re.findall(r'^default_model_filename: "(.+)"$', path.read_text(), re.MULTILINE)
    }
    # The plan is what the guide goes on to build.
    assert {path.name for path in (model / "1").iterdir()} == named - {"model.plan"}
    assert (model / "config.pbtxt").is_file()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Return a folder with the files that README's commands name."""
    folder = tmp_path / "workspace"
    photos = write_photos(folder / "photos", 8)
    for name, photo in (("a.jpg", photos[0]), ("b.jpg", photos[2])):
        photo.rename(folder / "photos" / name)
    photo = write_photos(tmp_path / "other", 1, seed=5)[0]
    photo.rename(folder / "photo.jpg")
    write_sketch(folder / "sketch.png")
    (folder / "list.txt").write_text("photos/a.jpg\nphotos/b.jpg\n")
    for kind in ("sketch", "photo"):
        write_photos(folder / "DATA" / kind / "cat", 2)
    (folder / "resnet50.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> str | None:
    """Return `None` where a pretrained bundle comes with sbtk; a tiny one stands in for it."""
    return None if list_bundles() else str(tiny_bundle(tmp_path / "tiny"))


def _run_block(block: Block, body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    if block.language == "sh":
        # The one program in the guides that a machine may lack.
        curl = "" if shutil.which("curl") else "curl() { echo 'no curl: not run' >&2; }; "
        script = f'python() {{ "$PYTHON" -P "$@"; }}; set -e; {curl}{_RUN}\n{body}'
    else:
        assert block.language == "python", f"not run, and no reason is given:\n{block.body}"
        script = f'exec "$PYTHON" -P -c {shlex.quote(body)}'
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=_environment() | {"XDG_CACHE_HOME": str(folder / ".cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def _leads_somewhere(document: Path, link: str) -> bool:
    if re.match(r"^(https?|mailto):", link):
        return True
    name, _, anchor = link.partition("#")
    target = document.parent / name if name else document
    if not target.exists():
        return False
    return not anchor or anchor in _anchors(target)


def _anchors(document: Path) -> set[str]:
    text = _FENCE.sub("", document.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _commands(found)


def _variables(command: click.Command) -> Iterator[str]:
    for option in command.params:
        if isinstance(option.envvar, str):
            yield option.envvar


def _parse(words: list[str]) -> None:
    """Let the command that `words` name parse what follows, without running anything."""
    command: click.Command = sbtk
    name = "sbtk"
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"there is no command {name!r}"
        command = found
    command.make_context(name, words)


def _shell(command: str, folder: Path, model: str | None) -> subprocess.CompletedProcess[str]:
    if model is not None:
        # The model goes last, but before a redirection.
        words, bracket, source = command.partition(" <")
        command = f"{words} --model {shlex.quote(model)}{bracket}{source}"
    return subprocess.run(
        ["bash", "-c", _RUN + command],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def _environment() -> dict[str, str]:
    ours = {"SBTK_GALLERY", "SBTK_DATA", "SBTK_WEIGHTS"}
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    return kept | {"PYTHON": sys.executable}


def _make(target: str) -> str:
    command = ["make", "--no-print-directory", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_diagrams_name_files_that_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    diagrams = re.findall(r"^```mermaid\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    named = {name for diagram in diagrams for name in _NAMED_FILE.findall(diagram)}
    assert len(diagrams) == 4
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
