"""ResNet trunks, their ImageNet weights, and the check that weights and layout fit.

ResNet50 has two layouts whose weights have the same names and shapes: `resnet50-v1` has a stage's
stride in the first 1x1 convolution (He et al. 2016, Caffe, Keras), `resnet50-v1.5` in the 3x3
convolution (torchvision). Loading one into the other raises no error but costs accuracy, so the
layout is named explicitly and checked by batch-norm statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torchvision import models

from sbtk_runtime.errors import BadConfig, BadModel

BACKBONES = ("resnet50-v1.5", "resnet50-v1", "resnet18")
IMAGENET_CLASSES = 1000

#: Prefixes that frameworks add to the names of a network's tensors.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "network.", "net.", "encoder.")
#: Keys of the network in checkpoints that also have an optimiser or other entries.
_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "network", "net")
_MAX_DEPTH = 4
_LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Classifier:
    """The ImageNet classifier of a weights file: `weight (1000, F)`, `bias (1000,)`, float32."""

    weight: torch.Tensor
    bias: torch.Tensor


def build_trunk(backbone: str) -> tuple[nn.Module, int]:
    """Return the convolutional stages up to the last feature map, and its channel count.

    The module's keys are torchvision's, without `fc`.

    Raises:
        BadConfig: unknown backbone.
    """
    if backbone == "resnet18":
        network = models.resnet18()
    elif backbone in ("resnet50-v1", "resnet50-v1.5"):
        network = models.resnet50()
        if backbone == "resnet50-v1":
            for stage in (network.layer2, network.layer3, network.layer4):
                stage[0].conv1.stride = (2, 2)
                stage[0].conv2.stride = (1, 1)
    else:
        raise BadConfig(f"unknown backbone {backbone!r}", ", ".join(BACKBONES))
    channels = network.fc.in_features
    trunk = nn.Sequential()
    for name, child in network.named_children():
        if name not in ("avgpool", "fc"):
            trunk.add_module(name, child)
    return trunk, channels


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
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


def _network(found: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the network in a file's contents, under their plain names."""
    if not isinstance(found, dict):
        raise BadModel(f"{path} contains a {type(found).__name__}", "a dictionary of tensors")
    for _ in range(_MAX_DEPTH):
        inner = next((found[key] for key in _NESTED if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    wrong = [key for key, value in found.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise BadModel(f"{path}: {wrong[0]!r} is not a tensor", "a dictionary of tensors")
    tensors: dict[str, torch.Tensor] = {}
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


def is_student(tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether the tensors are an sbtk student's, not a classifier's."""
    return "trunk.conv1.weight" in tensors and "embedding.weight" in tensors


def extract_classifier(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a student's trunk and ImageNet head under torchvision's names; others unchanged."""
    if not is_student(tensors):
        return tensors
    named = {
        key.removeprefix("trunk."): value
        for key, value in tensors.items()
        if key.startswith("trunk.")
    }
    weight, bias = tensors.get("soft.weight"), tensors.get("soft.bias")
    if weight is not None and bias is not None:
        if any(".se." in key for key in tensors):
            # DSN's heads take the code, so the classifier is the product of two layers.
            bias = bias + weight @ tensors["embedding.bias"]
            weight = weight @ tensors["embedding.weight"]
        named |= {"fc.weight": weight, "fc.bias": bias}
    return named


def load_trunk(trunk: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> Classifier | None:
    """Load a classifier network's tensors into `trunk`; return its ImageNet head, if any.

    Raises:
        BadModel: names or shapes do not fit; names the first that does not.
    """
    tensors = extract_classifier(tensors)
    own = trunk.state_dict()
    if any(".se." in key for key in tensors) and not any(".se." in key for key in own):
        raise BadModel(
            f"{path} is a model of DSN or SAKE, whose trunk has a domain input",
            "weights of a plain ResNet, or an SBTKNet model",
            "--method dsn or sake",
        )
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = sorted(set(own) - counters - set(tensors))
    foreign = sorted(set(tensors) - set(own) - {"fc.weight", "fc.bias"})
    foreign = [key for key in foreign if not key.endswith("num_batches_tracked")]
    if missing or foreign:
        raise BadModel(
            f"{path} does not fit the backbone: "
            + (f"{missing[0]!r} is missing" if missing else f"{foreign[0]!r} is unknown"),
            "weights with torchvision's names for this backbone",
            "choose the backbone with --backbone",
        )
    for key in sorted(set(own) - counters):
        if own[key].shape != tensors[key].shape:
            raise BadModel(
                f"{path}: {key} has shape {tuple(tensors[key].shape)}", f"{tuple(own[key].shape)}"
            )
    trunk.load_state_dict({key: tensors.get(key, own[key]) for key in own})
    weight, bias = tensors.get("fc.weight"), tensors.get("fc.bias")
    if weight is None or bias is None or weight.shape[0] != IMAGENET_CLASSES:
        return None
    return Classifier(weight, bias)


def measure_drift(trunk: nn.Module, photos: torch.Tensor) -> float:
    """Return the distance of photos' batch-norm input means from the trunk's running means.

    It is the mean over all batch-norm channels of the squared difference, in units of the running
    variance. Weights drift several times less in their own layout than in the wrong one.

    Args:
        trunk: a trunk with trained running statistics.
        photos: `(N, 3, 224, 224) float32`, ImageNet-normalised; 16 are enough.
    """
    drifts: list[torch.Tensor] = []

    def compare(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        assert module.running_mean is not None and module.running_var is not None
        means = inputs[0].float().mean((0, 2, 3))
        drift = (means - module.running_mean) ** 2 / (module.running_var + module.eps)
        drifts.append(drift.mean())

    with _hook_batch_norms(trunk, compare), torch.inference_mode():
        trunk(photos)
    return float(torch.stack(drifts).mean())


def choose_layout(
    backbone: str, tensors: dict[str, torch.Tensor], photos: torch.Tensor, path: Path
) -> tuple[str, dict[str, float]]:
    """Return the ResNet50 layout that the weights fit best, and each layout's drift.

    Other backbones are returned unchanged, without a drift.

    Args:
        backbone: the requested backbone.
        tensors: the weights.
        photos: `(N, 3, H, W) float32`, ImageNet-normalised, to measure the drift on.
        path: the weights file, for errors.
    """
    if not backbone.startswith("resnet50"):
        return backbone, {}
    drifts = {}
    for layout in ("resnet50-v1", "resnet50-v1.5"):
        trunk, _ = build_trunk(layout)
        load_trunk(trunk, tensors, path)
        drifts[layout] = measure_drift(trunk.eval(), photos)
    return min(drifts, key=lambda name: drifts[name]), drifts


@contextmanager
def _hook_batch_norms(trunk: nn.Module, hook: object) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(hook)  # type: ignore[arg-type]
        for module in trunk.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    was_training = trunk.training
    trunk.eval()
    try:
        yield
    finally:
        trunk.train(was_training)
        for handle in handles:
            handle.remove()
