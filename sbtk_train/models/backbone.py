"""Trunks, their ImageNet weights, and the check that weights and layout fit.

ResNet50 has two layouts whose weights have the same names and shapes: `resnet50-v1` has a stage's
stride in the first 1x1 convolution (He et al. 2016, Caffe, Keras), `resnet50-v1.5` in the 3x3
convolution (torchvision). Loading one into the other raises no error but costs accuracy, so the
layout is named explicitly and checked by batch-norm statistics.

A CSE-ResNet (DSN, SAKE) is a ResNet whose blocks weight their channels by image and domain: each
has a conditional squeeze-and-excitation module on its residual branch, after the last batch norm
and before the skip is added (Wang et al. 2021, section 3.1; haowang1992/DSN `src/senet.py`).
Initially the domain has no effect: its weights are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from sbtk_runtime.errors import BadConfig, BadModel

BACKBONES = ("resnet50-v1.5", "resnet50-v1", "resnet18")
IMAGENET_CLASSES = 1000
#: The layout of Cadene's SE-ResNet50, whose weights DSN and SAKE start from: strides as in
#: `resnet50-v1`, and a 3x3 max-pool without padding whose output size is rounded up.
SE_RESNET50 = "se-resnet50"
REDUCTION = 16


@dataclass(frozen=True)
class Classifier:
    """The ImageNet classifier of a weights file: `weight (1000, F)`, `bias (1000,)`, float32."""

    weight: Tensor
    bias: Tensor


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


def is_student(tensors: dict[str, Tensor]) -> bool:
    """Return whether the tensors are an sbtk student's, not a classifier's."""
    return "trunk.conv1.weight" in tensors and "embedding.weight" in tensors


def extract_classifier(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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


def load_trunk(trunk: nn.Module, tensors: dict[str, Tensor], path: Path) -> Classifier | None:
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


def measure_drift(trunk: nn.Module, photos: Tensor) -> float:
    """Return the distance of photos' batch-norm input means from the trunk's running means.

    It is the mean over all batch-norm channels of the squared difference, in units of the running
    variance. Weights drift several times less in their own layout than in the wrong one.

    Args:
        trunk: a trunk with trained running statistics.
        photos: `(N, 3, 224, 224) float32`, ImageNet-normalised; 16 are enough.
    """
    drifts: list[Tensor] = []

    def compare(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        assert module.running_mean is not None and module.running_var is not None
        means = inputs[0].float().mean((0, 2, 3))
        drift = (means - module.running_mean) ** 2 / (module.running_var + module.eps)
        drifts.append(drift.mean())

    handles = [
        module.register_forward_pre_hook(compare)
        for module in trunk.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    was_training = trunk.training
    try:
        with torch.inference_mode():
            trunk.eval()(photos)
    finally:
        trunk.train(was_training)
        for handle in handles:
            handle.remove()
    return float(torch.stack(drifts).mean())


def choose_layout(
    backbone: str, tensors: dict[str, Tensor], photos: Tensor, path: Path
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


class ConditionalSE(nn.Module):
    """Channels weighted by their averages and the domain.

    `x * sigmoid(W2 [relu(W1 z + b1); d] + b2)`, where `z` is the global average of `x` and `d`
    the domain: 0 for a sketch, 1 for a photo.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // REDUCTION)
        self.fc2 = nn.Linear(channels // REDUCTION + 1, channels)
        with torch.no_grad():
            self.fc2.weight[:, -1] = 0.0

    def forward(self, values: Tensor, domains: Tensor) -> Tensor:
        """Return the weighted `values (N, C, h, w)` of images with `domains (N,)`."""
        if self.training:
            # The same averages, whose gradient is several times faster in channels_last on CPUs.
            averages = values.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1)
        else:
            averages = values.mean(dim=(2, 3))  # one node of an exported graph
        hidden = torch.relu(self.fc1(averages))
        hidden = torch.cat([hidden, domains.to(hidden.dtype).unsqueeze(1)], dim=1)
        shares = torch.sigmoid(self.fc2(hidden))
        return values * shares[:, :, None, None]


class CseBlock(nn.Module):
    """One of torchvision's residual blocks with a `ConditionalSE` named `se`; other names stay."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        for name, child in plain.named_children():
            self.add_module(name, child)
        self._depth = sum(name.startswith("conv") for name, _ in plain.named_children())
        self._is_resized = "downsample" in dict(plain.named_children())
        self.se = ConditionalSE(self.last_norm.num_features)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The batch norm whose output the channel weights apply to."""
        norm = self.get_submodule(f"bn{self._depth}")
        assert isinstance(norm, nn.BatchNorm2d)
        return norm

    def forward(self, values: Tensor, domains: Tensor) -> Tensor:
        """Return the block's output `(N, C, h, w)` for values `(N, c, H, W)` and domains `(N,)`."""
        relu = self.get_submodule("relu")
        residual = values
        for number in range(1, self._depth + 1):
            residual = self.get_submodule(f"conv{number}")(residual)
            residual = self.get_submodule(f"bn{number}")(residual)
            if number < self._depth:
                residual = relu(residual)
        skip = self.get_submodule("downsample")(values) if self._is_resized else values
        result: Tensor = relu(self.se(residual, domains) + skip)
        return result


class CseStage(nn.ModuleList):
    """The blocks of a stage, which take the domain."""

    def forward(self, values: Tensor, domains: Tensor) -> Tensor:
        """Return the last block's output `(N, F, h, w)`; `domains (N,)`: 0 sketch, 1 photo."""
        for block in self:
            values = block(values, domains)
        return values


class CseTrunk(nn.Module):
    """The stages `conv1` to `layer4` of a CSE-ResNet; `layer1` to `layer4` are `CseStage`s."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        for name, child in plain.named_children():
            if name.startswith("layer"):
                child = CseStage(CseBlock(block) for block in child.children())
            self.add_module(name, child)

    def forward(self, values: Tensor, domains: Tensor, begin: str = "") -> Tensor:
        """Return the feature map `(N, F, h, w)` of images, or of feature maps at `begin`."""
        is_within = not begin
        for name, stage in self.named_children():
            is_within = is_within or name == begin
            if is_within:
                values = run_stage(stage, values, domains)
        return values

    def blocks(self) -> list[CseBlock]:
        """Return all blocks, first to last."""
        return [block for block in self.modules() if isinstance(block, CseBlock)]


def run_stage(stage: nn.Module, values: Tensor, domains: Tensor) -> Tensor:
    """Return the stage's output for `values (N, C, H, W)`; CSE stages get `domains (N,)` too."""
    result: Tensor = stage(values, domains) if isinstance(stage, CseStage) else stage(values)
    return result


def build_cse_trunk(backbone: str) -> tuple[CseTrunk, int]:
    """Return a CSE-ResNet up to its last feature map, and its channel count.

    Args:
        backbone: `se-resnet50`, or one of `BACKBONES` to be given CSE blocks.

    Raises:
        BadConfig: unknown backbone.
    """
    plain, channels = build_trunk("resnet50-v1" if backbone == SE_RESNET50 else backbone)
    trunk = CseTrunk(plain)
    if backbone == SE_RESNET50:
        trunk.add_module("maxpool", nn.MaxPool2d(3, stride=2, ceil_mode=True))
    return trunk, channels


def load_cse_trunk(
    trunk: CseTrunk, tensors: dict[str, Tensor], path: Path, backbone: str
) -> Classifier | None:
    """Load ImageNet weights into `trunk`; return their classifier, if they have one.

    For `se-resnet50` the file must be Cadene's. For another backbone it must be a plain ResNet's,
    and the CSE modules are initialised so that the trunk computes the same as the plain one: all
    channel weights are 1/2 (the sigmoid of 0, where it learns fastest) and the batch norms before
    them are doubled.

    Raises:
        BadModel: names or shapes do not fit; names the first that does not.
    """
    if is_student(tensors):
        tensors = extract_classifier(tensors)
        if any(".se." in key for key in tensors):  # of DSN or SAKE
            return load_trunk(trunk, tensors, path)
    is_cadene = has_cadene_names(tensors)
    if is_cadene != (backbone == SE_RESNET50):
        found = "SE-ResNet50 weights" if is_cadene else "no SE-ResNet50 weights"
        raise BadModel(
            f"{path} contains {found}, but the backbone is {backbone}",
            f"se_resnet50-*.pth of Cadene's for {SE_RESNET50}, a plain ResNet's file for others",
            f"--backbone {SE_RESNET50}" if is_cadene else "--backbone resnet50-v1 or -v1.5",
        )
    if is_cadene:
        return load_trunk(trunk, rename_cadene_tensors(tensors), path)
    own = {key: value for key, value in trunk.state_dict().items() if ".se." in key}
    classifier = load_trunk(trunk, {**tensors, **own}, path)
    _start_at_identity(trunk)
    return classifier


def has_cadene_names(tensors: dict[str, Tensor]) -> bool:
    """Return whether the tensors have the names of Cadene's SE-ResNets, not torchvision's."""
    return "last_linear.weight" in tensors or "layer0.conv1.weight" in tensors


def rename_cadene_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of Cadene's `se_resnet50` under `CseTrunk`'s names.

    Its channel weights are 1x1 convolutions `se_module.fc1` and `fc2`; they become matrices, and
    `fc2` gets a last column of zeros for the domain.
    """
    renamed = {}
    for key, value in tensors.items():
        name = key.removeprefix("layer0.").replace(".se_module.", ".se.")
        name = name.replace("last_linear.", "fc.")
        if ".se." in name and name.endswith("weight"):
            value = value.flatten(1)
            if ".fc2." in name:
                value = torch.cat([value, value.new_zeros(len(value), 1)], dim=1)
        renamed[name] = value
    return renamed


@torch.no_grad()
def _start_at_identity(trunk: CseTrunk) -> None:
    # The same in every run, so that runs of all seeds can share feature maps of frozen stages.
    generator = torch.Generator().manual_seed(0)
    for block in trunk.blocks():
        bound = block.se.fc1.in_features**-0.5
        block.se.fc1.weight.uniform_(-bound, bound, generator=generator)
        block.se.fc1.bias.uniform_(-bound, bound, generator=generator)
        block.se.fc2.weight.zero_()
        block.se.fc2.bias.zero_()
        norm = block.last_norm
        norm.weight.mul_(2.0)
        norm.bias.mul_(2.0)
