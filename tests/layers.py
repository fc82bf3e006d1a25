"""Follows Dockerfiles where no container engine is: for tests.

The root folder of this machine stands in for the base image, with this Python as its `python`.
Each stage is a layer of its own above it (overlayfs, in a mount namespace), so its commands run as
they stand, as root and at their absolute paths, and change nothing outside of that layer. That
needs root; `why_not` says whether it works here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.dockerfile import (
    Dockerfile,
    Instruction,
    copy_words,
    files_of,
    sent_files,
    settled,
    substituted,
)

_ROOT_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
#: How this machine reaches package indices; what a build would be told by its own arguments.
_NETWORK_VARIABLES = re.compile(
    r"^(PIP_(INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|CERT|TRUSTED_HOST|DEFAULT_TIMEOUT)"
    r"|SSL_CERT_FILE|\w+_proxy|\w+_PROXY)$"
)
_MOUNTS = """
set -eu
layer=$1 hidden=$2 volumes=$3 is_fixed=$4
shift 4
root=$layer/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$layer/upper,workdir=$layer/work" "$root"
for folder in dev proc sys; do mount --rbind "/$folder" "$root/$folder"; done
for folder in $hidden; do mount -t tmpfs -o mode=1777 tmpfs "$root$folder"; done
for volume in $volumes; do
    IFS=: read -r source target mode <<<"$volume"
    mkdir -p "$root$target"
    mount --bind "$source" "$root$target"
    mount -o "remount,bind,$mode" "$root$target"
done
if [ "$is_fixed" = yes ]; then mount -o remount,bind,ro "$root"; fi
exec chroot "$root" "$@"
"""


@dataclass
class Image:
    """A stage that was followed: its layer, and how its containers start."""

    layer: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _ROOT_PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    volumes: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def path(self, absolute: str) -> Path:
        """Return where a path of the image lies on this machine; only what the build made."""
        return self.layer / "upper" / absolute.lstrip("/")

    def run(
        self,
        *words: str,
        volumes: Mapping[str, tuple[Path, str]],
        stdin: bytes = b"",
    ) -> subprocess.CompletedProcess[bytes]:
        """Return what came of `docker run --read-only --tmpfs /tmp --network none --cap-drop ALL`.

        Args:
            words: what follows the image's name; by default its CMD.
            volumes: by mount point, a folder of this machine and `ro` or `rw`.
            stdin: the standard input.
        """
        home = {"HOME": _home(self.layer, self.user)}
        return _inside(
            self,
            [*self.entrypoint, *(words or self.command)],
            home | self.environment,
            volumes=volumes,
            is_fixed=True,
            stdin=stdin,
        )


def why_not(place: Path) -> str | None:
    """Return why Dockerfiles cannot be followed here, or `None` where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "following a Dockerfile needs Linux and root, for layers and other users"
    if missing := [name for name in ("unshare", "setpriv") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} of util-linux is not installed"
    layer = _new_image(place / "trial").layer
    options = f"lowerdir=/,upperdir={layer}/upper,workdir={layer}/work"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, f"{layer}/root"]
    done = subprocess.run(["unshare", "--mount", *mount], capture_output=True, check=False)
    return done.stderr.decode(errors="replace").strip() if done.returncode else None


class Builder:
    """Builds images; a stage that was built before is taken as it is, as engines do.

    Attributes:
        left_out: RUN lines with apt-get that failed, where this machine has no Debian to ask.
    """

    def __init__(self, context: Path, place: Path) -> None:
        """Build from the files in `context` that are sent, with layers in the folder `place`."""
        self.left_out: list[str] = []
        self._context = context
        self._sent = sent_files(context)
        self._place = place
        self._built: dict[tuple[str, ...], Image] = {}

    def build(self, dockerfile: Dockerfile, given: Mapping[str, str]) -> Image:
        """Return the image of the last stage; `given` are values of `--build-arg`."""
        images: dict[str, Image] = {}
        key: tuple[str, ...] = ()
        for stage in dockerfile.stages:
            lines = (f"{one.word} {settled(one, given)}" for one in stage.instructions)
            key = (*key, f"FROM {stage.base}", *lines)
            if key not in self._built:
                image = images[stage.name] = _new_image(self._place / str(len(self._built)))
                _step(image, ["/bin/sh", "-c", _base_python()], {})
                for instruction in stage.instructions:
                    self._follow(instruction, image, images, given)
                self._built[key] = image
            images[stage.name] = self._built[key]
        return images[dockerfile.stages[-1].name]

    def _follow(
        self,
        instruction: Instruction,
        image: Image,
        images: Mapping[str, Image],
        given: Mapping[str, str],
    ) -> None:
        rest = instruction.rest
        words = instruction.form or [rest]
        match instruction.word:
            case "ARG":
                name, _, value = settled(instruction, given).partition("=")
                image.arguments[name] = value
            case "ENV":
                pairs = shlex.split(substituted(rest, image.environment | image.arguments))
                image.environment |= {
                    name: value for name, _, value in (pair.partition("=") for pair in pairs)
                }
            case "WORKDIR":
                image.workdir = rest
                image.path(rest).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(rest, image, images)
            case "RUN":
                self._run(instruction, image)
            case "USER":
                image.user = rest
            case "VOLUME":
                image.volumes += words
            case "ENTRYPOINT":
                image.entrypoint = words
            case "CMD":
                image.command = words

    def _run(self, instruction: Instruction, image: Image) -> None:
        words = instruction.form or ["/bin/sh", "-c", instruction.rest]
        try:
            _step(image, words, _network() | image.arguments)
        except RuntimeError:
            if not instruction.rest.startswith("apt-get "):
                raise
            self.left_out.append(instruction.rest)

    def _copy(self, rest: str, image: Image, images: Mapping[str, Image]) -> None:
        *stages, sources, target = copy_words(rest)
        into = image.path(os.path.join(image.workdir, target))  # noqa: PTH118 - may be absolute
        for source in sources.split():
            if stages:
                origin = images[stages[0]].path(source)
                # Nothing rewrites what a stage has installed, so a second name is copy enough.
                shutil.copytree(
                    origin, into, symlinks=True, dirs_exist_ok=True, copy_function=os.link
                )
                continue
            for path in files_of(source, self._sent):
                copied = into / path if path == source else into / Path(path).relative_to(source)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self._context / path, copied)


def _step(image: Image, words: Sequence[str], more: Mapping[str, str]) -> None:
    """Run one command in the image; raise RuntimeError with its output when it fails."""
    home = {"HOME": _home(image.layer, image.user)}
    done = _inside(image, words, home | image.environment | dict(more))
    if done.returncode != 0:
        output = (done.stdout + done.stderr).decode(errors="replace")
        raise RuntimeError(f"{shlex.join(words)} ended with {done.returncode}:\n{output}")


def _inside(
    image: Image,
    words: Sequence[str],
    environment: Mapping[str, str],
    *,
    volumes: Mapping[str, tuple[Path, str]] | None = None,
    is_fixed: bool = False,
    stdin: bytes = b"",
) -> subprocess.CompletedProcess[bytes]:
    """Run a command in the image's root with exactly that environment.

    Where `is_fixed` it has no network and no capabilities, and its root is read-only.
    """
    user, _, group = image.user.partition(":")
    identity = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    if is_fixed:
        identity += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    mounts = [f"{source}:{target}:{mode}" for target, (source, mode) in (volumes or {}).items()]
    pairs = [f"{key}={value}" for key, value in environment.items()]
    enter = ["unshare", "--mount", *(["--net"] if is_fixed else []), "bash", "-c", _MOUNTS, "-"]
    place = [str(image.layer), " ".join(_hidden()), " ".join(mounts), "yes" if is_fixed else "no"]
    inner = ["env", "-i", f"--chdir={image.workdir}", *pairs, *words]
    return subprocess.run(
        [*enter, *place, *identity, *inner], input=stdin, capture_output=True, check=False
    )


def _new_image(layer: Path) -> Image:
    for name in ("upper", "work", "root"):
        (layer / name).mkdir(parents=True)
    # A layer's own folder is what `/` becomes; pytest's folders are closed to others.
    (layer / "upper").chmod(0o755)
    return Image(layer)


def _base_python() -> str:
    """Return a script that gives a layer this Python, open to every user, as `python`.

    A link would not do: an environment made through it looks for its library beside the link.
    """
    python = _python()
    closed = " ".join(shlex.quote(str(folder)) for folder in python.parents)
    script = shlex.quote(f'#!/bin/sh\nexec {shlex.quote(str(python))} "$@"\n')
    place = "/usr/local/bin/python"
    return f"chmod o+x {closed} && printf %s {script} >{place} && chmod 755 {place}"


def _python() -> Path:
    return Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")


def _hidden() -> list[str]:
    """Return folders of this machine that no image has: the checkout and temporary files."""
    # The inner one first: once /tmp is hidden, nothing below it can be.
    folders = [str(Path(__file__).parents[1]), "/tmp"]
    return [folder for folder in folders if not _python().is_relative_to(folder)]


def _network() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if _NETWORK_VARIABLES.match(key)}


def _home(layer: Path, user: str) -> str:
    """Return the home of a user by number, as the image's own /etc/passwd has it."""
    passwd = layer / "upper" / "etc" / "passwd"
    for line in (passwd if passwd.exists() else Path("/etc/passwd")).read_text().splitlines():
        fields = line.split(":")
        if fields[2] == user.partition(":")[0]:
            return fields[5]
    return "/"
