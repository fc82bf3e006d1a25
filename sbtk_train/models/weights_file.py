"""Weights files: where they are, what they contain, and their network layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_runtime.files import read_json_object
from sbtk_train.models.backbone import SE_RESNET50, has_cadene_names
from sbtk_train.progress import Notify

#: Prefixes that frameworks add to the names of a network's tensors.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "network.", "net.", "encoder.")
#: Keys of the network in checkpoints that also have an optimiser or other entries.
_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "network", "net")
_MAX_DEPTH = 4
_LFS = b"version https://git-lfs.github.com/spec/"
_STUDENT = "student.safetensors"
# Cadene's file has an underscore where our name has a hyphen.
_SE_STEMS = (SE_RESNET50, "se_resnet50")
_CACHED = {"resnet18": "resnet18", SE_RESNET50: "se_resnet50"}


def find_weights(name: str, backbone: str | None) -> Path:
    """Return the weights file of a name.

    Args:
        name: a file, a run folder or bundle for its student, or `imagenet` for weights in
            `SBTK_WEIGHTS` (a file, or a folder of files named after their backbone) or in torch's
            cache; sbtk downloads nothing.
        backbone: the backbone that `imagenet` weights must have; `None` for any ResNet50.

    Raises:
        BadConfig: there is no such file.
    """
    if name != "imagenet":
        path = Path(name)
        if path.is_dir():
            return _student_of(path)
        if not path.is_file():
            raise BadConfig(
                f"no weights file {name}", "a .safetensors or .pth file, a run folder or a bundle"
            )
        return path
    place = os.environ.get("SBTK_WEIGHTS")
    if place and Path(place).is_file():
        return Path(place)
    stems = (backbone or "resnet50-v1",) if backbone != SE_RESNET50 else _SE_STEMS
    if place and Path(place).is_dir():
        for path in sorted(Path(place).iterdir()):
            if path.suffix in (".safetensors", ".pth") and _is_named(path, stems):
                return path
    cached = Path(torch.hub.get_dir()) / "checkpoints"
    prefix = _CACHED.get(backbone or "", "resnet50")
    for path in sorted(cached.glob(f"{prefix}-*.pth")):
        return path
    raise BadConfig(
        "no ImageNet weights on this machine",
        f"{prefix}-*.pth in {cached}, or SBTK_WEIGHTS naming a file",
        "give --weights FILE, or --weights none to train from scratch",
    )


def _student_of(folder: Path) -> Path:
    path = folder / _STUDENT
    if path.is_file():
        return path
    if (folder / "manifest.json").is_file():
        found, step = (
            "a bundle without its student",
            "sbtk export without --slim, or its run folder",
        )
    elif (folder / "config.resolved.toml").is_file():
        found, step = "a run that has not saved a student yet", "wait for its first epoch"
    else:
        found, step = "not a run folder or a bundle", "--weights FILE"
    raise BadConfig(f"{folder} is {found}", f"{_STUDENT} in it", step)


def read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the float32 tensors of a .safetensors or weights-only .pth file, and its layout.

    Nested tensors (`{"model": ...}`, `{"state_dict": ...}`) are found, and the prefixes that
    frameworks add to their names are removed. The layout is that of the file's metadata
    (`backbone`), `None` if they do not name it.

    Raises:
        BadModel: the file is unreadable, not weights, not finite, or a pickle with other objects.
    """
    if not path.is_file():
        raise BadModel(f"no weights file {path}", "a .safetensors or .pth file")
    _refuse_stand_ins(path)
    layout: str | None = None
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                layout = (file.metadata() or {}).get("backbone")
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as problem:
        raise BadModel(f"{path} cannot be read as weights: {problem}") from problem
    except Exception as problem:  # torch raises pickle.UnpicklingError through C code
        raise BadModel(
            f"{path} contains more than tensors; it was not opened",
            "weights only",
            "save the model's state_dict as .safetensors",
        ) from problem
    return _network(tensors, path), layout


def _refuse_stand_ins(path: Path) -> None:
    """Raise `BadModel` for files that are often saved instead of weights."""
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    expected = "the weights file itself"
    if start.startswith(_LFS):
        raise BadModel(
            f"{path} is a Git LFS pointer, not the file that it points to",
            expected,
            "git lfs pull, in the repository that it comes from",
        )
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        kind = "an XML document" if start.startswith(b"<?xml") else "an HTML page"
        raise BadModel(
            f"{path} is {kind}, not weights: probably a server's response instead of the file",
            expected,
            "download it again, with the link of the file, not of its page",
        )


def _network(found: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of the network in a file's contents, under their plain names."""
    if not isinstance(found, dict):
        raise BadModel(f"{path} contains a {type(found).__name__}", "a dictionary of tensors")
    for _ in range(_MAX_DEPTH):
        inner = next((found[key] for key in _NESTED if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    wrong = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if wrong:
        raise BadModel(f"{path}: {wrong[0]!r} is not a tensor", "a dictionary of tensors")
    tensors: dict[str, Tensor] = {}
    for key, value in found.items():
        plain = _plain_name(str(key))
        if plain in tensors:
            raise BadModel(
                f"{path} holds {plain!r} twice, once as {key!r}", "the tensors of one network"
            )
        tensors[plain] = value.float()
    bad = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if bad:
        raise BadModel(
            f"{path}: {bad[0]} holds NaN or infinity"
            + (f", and so do {len(bad) - 1} more" if len(bad) > 1 else ""),
            "finite numbers",
            "use a checkpoint from before training diverged",
        )
    return tensors


def _plain_name(key: str) -> str:
    while prefix := next((each for each in _PREFIXES if key.startswith(each)), None):
        key = key.removeprefix(prefix)
    return key


def read_student_dim(path: Path) -> int | None:
    """Return the length of the embedding of a student's file; `None` for other weights."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if not {"trunk.conv1.weight", "embedding.weight"} <= names:
                return None
            return int(file.get_slice("embedding.weight").get_shape()[0])
    except (SafetensorError, OSError):
        return None  # reported when the weights are read


def read_training_classes(path: Path) -> tuple[str, ...]:
    """Return a student's training classes, from its run folder; empty outside of one."""
    return _read_classes(path, "run.json", "identity_classes")


def read_unseen_classes(path: Path) -> tuple[str, ...]:
    """Return a student's unseen classes, from its bundle; empty outside of one."""
    return _read_classes(path, "manifest.json", "unseen_classes")


def _read_classes(path: Path, name: str, key: str) -> tuple[str, ...]:
    file = path.parent / name
    if not file.is_file():
        return ()
    found = read_json_object(file, BadConfig)
    training = found.get("training")
    names = (training if isinstance(training, dict) else found).get(key)
    return tuple(str(each) for each in names) if isinstance(names, list) else ()


def choose_backbone(weights: Path | None, requested: str | None, notify: Notify) -> str:
    """Return the requested backbone, else the weights file's; without weights, torchvision's.

    Raises:
        BadConfig: the weights file does not identify its backbone.
    """
    if requested:
        return requested
    if weights is None:
        return "resnet50-v1.5"
    tensors, layout = read_weights(weights)
    if layout:
        return layout
    if has_cadene_names(tensors):
        notify(f"backbone {SE_RESNET50}, by the names in {weights}")
        return SE_RESNET50
    for name in ("resnet50-v1.5", "resnet50-v1", "resnet18"):
        if weights.name.startswith(f"{name}-") or weights.stem == name:
            notify(f"backbone {name}, by the name of {weights}")
            return name
    raise BadConfig(
        f"{weights} does not name its layout",
        "--backbone resnet50-v1.5 (torchvision) or resnet50-v1 (Caffe, Keras)",
        "choose one; training warns at the start if the other fits better",
    )


def _is_named(path: Path, stems: tuple[str, ...]) -> bool:
    """Return whether a file is named after a layout; `resnet50-v1` does not match `-v1.5`."""
    rests = [path.stem.removeprefix(stem) for stem in stems if path.stem.startswith(stem)]
    return any(rest[:1] != "." for rest in rests)
