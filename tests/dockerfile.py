"""Reads Dockerfiles, and says which files of a folder are sent to a build: for tests.

What is not understood is refused, so a new instruction cannot pass unread.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_WORDS = {"ARG", "FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "VOLUME"} | {"ENTRYPOINT", "CMD"}


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined; `rest` is all that follows the word."""

    word: str
    rest: str

    @property
    def form(self) -> list[str] | None:
        """The words of the JSON form, as in `CMD ["--help"]`; `None` for the shell form."""
        if not self.rest.startswith("["):
            return None
        words = json.loads(self.rest)
        assert isinstance(words, list)
        return [str(word) for word in words]


@dataclass(frozen=True)
class Stage:
    """What stands between one FROM and the next."""

    base: str
    name: str
    instructions: tuple[Instruction, ...]

    def rests(self, word: str) -> list[str]:
        """Return what follows each instruction of that word."""
        return [one.rest for one in self.instructions if one.word == word]


@dataclass(frozen=True)
class Dockerfile:
    """The arguments before the first FROM, with their defaults, and the stages."""

    arguments: dict[str, str]
    stages: tuple[Stage, ...]


def parse(text: str) -> Dockerfile:
    """Return what a Dockerfile says; raise ValueError for what is not understood here."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.word == "FROM":
            base, _, name = instruction.rest.partition(" AS ")
            stages.append(Stage(substituted(base, arguments), name or str(len(stages)), ()))
        elif stages:
            last = stages[-1]
            stages[-1] = Stage(last.base, last.name, (*last.instructions, instruction))
        elif instruction.word == "ARG":
            key, _, value = instruction.rest.partition("=")
            arguments[key] = value
        else:
            raise ValueError(f"{instruction.word} before the first FROM")
    return Dockerfile(arguments, tuple(stages))


def substituted(text: str, values: Mapping[str, str]) -> str:
    """Return `text` with each `${NAME}` replaced; raise KeyError for a name without a value."""
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


def sent_files(context: Path) -> set[str]:
    """Return the files, by their paths from `context`, that `.dockerignore` lets into a build."""
    rules = []
    for line in (context / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            is_kept = line.startswith("!")
            rules.append((re.compile(_pattern(line.removeprefix("!"))), is_kept))
    sent = set()
    for folder, folders, names in os.walk(context):
        above = Path(folder).relative_to(context)
        if above == Path():
            # Every rule that keeps something names it from the top, so the rest need not be seen.
            folders[:] = [name for name in folders if _is_sent(name, rules)]
        paths = [(above / name).as_posix() for name in names]
        sent |= {path for path in paths if _is_sent(path, rules)}
    return sent


def files_of(source: str, sent: set[str]) -> list[str]:
    """Return the files that COPY takes for `source`; raise ValueError when there is none."""
    files = sorted(path for path in sent if path == source or path.startswith(f"{source}/"))
    if not files:
        raise ValueError(f"COPY {source}: no such file is sent to the build")
    return files


def copy_words(rest: str) -> tuple[str, ...]:
    """Return of a COPY the stage that it names, if any, then the sources, and the target."""
    words = rest.split()
    stage = [word.removeprefix("--from=") for word in words if word.startswith("--from=")]
    plain = [word for word in words if not word.startswith("--")]
    if len(stage) + len(plain) != len(words):
        raise ValueError(f"COPY {rest}: an option that is not understood here")
    return (*stage, " ".join(plain[:-1]), plain[-1])


def settled(instruction: Instruction, given: Mapping[str, str]) -> str:
    """Return what follows the word, with the value that an ARG has in this build."""
    name, _, default = instruction.rest.partition("=")
    is_argument = instruction.word == "ARG"
    return f"{name}={given.get(name, default)}" if is_argument else instruction.rest


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, rest = line.partition(" ")
        if word not in _WORDS:
            raise ValueError(f"{word} is not understood here: {line}")
        found.append(Instruction(word, rest.strip()))
    return found


def _pattern(rule: str) -> str:
    """Return a regular expression for a path of `.dockerignore`."""
    parts = {"**/": "(?:.*/)?", "*": "[^/]*"}
    return "".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*)", rule))


def _is_sent(path: str, rules: Sequence[tuple[re.Pattern[str], bool]]) -> bool:
    """Whether the last rule that fits the path, or a folder above it, keeps it."""
    names = [path, *map(Path.as_posix, Path(path).parents)]
    fitting = [keeps for rule, keeps in rules if any(rule.fullmatch(name) for name in names)]
    return fitting[-1] if fitting else True
