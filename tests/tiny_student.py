"""Students of some thousand weights, SBTKNet's and DSN's, data for them, and their run folders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from sbtk_export.images import ImageSubset
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import read_json_object, write_json_atomically
from sbtk_runtime.preprocess import KINDS, domains_of
from sbtk_train.batches.augment import normalise
from sbtk_train.config import TrainConfig, make_recipe, read_config
from sbtk_train.models.backbone import CseTrunk
from sbtk_train.models.student import DsnStudent, SbtknetStudent
from sbtk_train.runs.checkpoint import RECORD, TrainedRun, save_student

AnyStudent = TypeVar("AnyStudent", SbtknetStudent, DsnStudent)

TRAINING = ("bars", "columns", "hatching", "slope")
VALIDATION = ("ladder", "rain")
#: In the split SK-YE this class is unseen.
UNSEEN = "window"

# Direction in degrees and period in pixels of each class's stripes.
_STRIPES = {
    "bars": (0, 8),
    "columns": (90, 8),
    "hatching": (45, 6),
    "slope": (135, 12),
    "ladder": (0, 20),
    "rain": (90, 20),
    UNSEEN: (70, 10),
}
_STEM, _FEATURES = 16, 64


def write_textures(root: Path, training: int = 132, validation: int = 8, unseen: int = 4) -> Path:
    """Return `root/{sketch,photo}/<class>/*` with about so many images of each kind and sort."""
    for names, total in ((TRAINING, training), (VALIDATION, validation), ((UNSEEN,), unseen)):
        for name in names:
            for kind in ("sketch", "photo"):
                folder = root / kind / name
                folder.mkdir(parents=True)
                for number in range(total // len(names)):
                    _texture(name, number, kind).save(folder / f"{number}.png")
    return root


def fitted(
    student: AnyStudent, samples: Sequence[ImageSubset], shrinkage: float = 1e-4
) -> AnyStudent:
    """Return the student with an embedding that keeps the classes of the images apart.

    The embedding is the ridge regression of each class's own direction on the pooled feature; a
    few closed-form steps give rankings that survive rounding, as a trained student's do. More
    shrinkage helps where the trunk has many features for few images.
    """
    pixels = np.concatenate([part.pixels for part in samples])
    domains = np.concatenate([part.inputs.domains for part in samples])
    labels = np.concatenate([part.labels + 10 * number for number, part in enumerate(samples)])
    student.eval()
    with torch.inference_mode():
        batches = zip(
            torch.split(torch.from_numpy(pixels).permute(0, 3, 1, 2), 32),
            torch.split(torch.from_numpy(domains), 32),
            strict=True,
        )
        features = [student.feature(normalise(batch), of_them) for batch, of_them in batches]
        feature = torch.cat(features).double()
    _, classes = np.unique(labels, return_inverse=True)
    wanted = torch.eye(student.embedding.out_features, dtype=torch.float64)[
        torch.from_numpy(classes)
    ]
    with_one = torch.cat([feature, torch.ones(len(feature), 1)], dim=1)
    scale = float(with_one.square().mean())
    gram = with_one.T @ with_one + shrinkage * scale * len(feature) * torch.eye(with_one.shape[1])
    weights = torch.linalg.solve(gram, with_one.T @ wanted).float()
    with torch.no_grad():
        student.embedding.weight.copy_(weights[:-1].T)
        student.embedding.bias.copy_(weights[-1])
    return student


def tiny_student(dim: int = 16) -> SbtknetStudent:
    """Return a student of two convolutions, with batch norms as trained ones have them."""
    torch.manual_seed(0)
    student = SbtknetStudent("resnet18", dim, len(TRAINING))
    student.trunk = nn.Sequential(
        nn.Conv2d(3, 24, 9, stride=4, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(24, 48, 3, stride=2, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
    )
    for norm in student.trunk.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.1, 0.1)
            norm.running_mean = torch.empty_like(norm.weight).uniform_(-0.1, 0.1).detach()
    student.embedding = nn.Linear(48, dim)
    student.identity = nn.Linear(48, len(TRAINING))
    student.soft = nn.Linear(48, 1000)
    return student.eval()


def write_run(
    folder: Path, data: Path, student: SbtknetStudent, backbone: str = "resnet18"
) -> Path:
    """Return `folder` as `sbtk train` would leave it after training `student` on `data`."""
    folder.mkdir(parents=True)
    dim = student.embedding.out_features
    config = TrainConfig(str(data), "SK-YE", make_recipe("sbtk"), backbone=backbone, dim=dim)
    config.write(folder)
    save_student(folder, student.state_dict(), backbone)
    record = {
        "data": data.name,
        "data_sha256": "0" * 64,
        "split": {"name": "SK-YE", "sha256": "1" * 64},
        "identity_classes": list(TRAINING),
        "training_classes": list(TRAINING),
        "validation_classes": list(VALIDATION),
        "unseen_classes": [UNSEEN],
        "training_sketches": 120,
        "training_photos": 132,
        "weights": {"file": "resnet50-v1-imagenet-fp16.safetensors", "sha256": "2" * 64},
        "recipe": {"name": "sbtk", "epochs": 3},
        "epochs_done": 3,
        "seed": 5,
        "division_seed": 0,
        "best": {"epoch": 2.0, "validation_map": 0.5, "held_out_map": 0.75},
        "versions": {"torch": "2.12.0"},
    }
    write_json_atomically(folder / RECORD, record)
    return folder


def trained_run(folder: Path, student: SbtknetStudent) -> TrainedRun:
    """Return the run in `folder` with a student that no backbone's name describes."""
    record = read_json_object(folder / RECORD, BadConfig)
    return TrainedRun(folder, student, read_config(folder), record)


def tiny_dsn_student(dim: int = 64) -> DsnStudent:
    """Return a student whose channel weights depend on the image and on its domain.

    Its second stage begins with a 1x1 convolution of stride 2, as those of ResNet50-v1 do.
    """
    torch.manual_seed(0)
    first = BasicBlock(_STEM, _STEM)
    skip = nn.Sequential(nn.Conv2d(_STEM, _FEATURES, 1, 2, bias=False), nn.BatchNorm2d(_FEATURES))
    second = Bottleneck(_STEM, _FEATURES // 4, stride=2, downsample=skip)
    second.conv1.stride, second.conv2.stride = (2, 2), (1, 1)
    plain = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, _STEM, 9, stride=8, bias=False),
            bn1=nn.BatchNorm2d(_STEM),
            relu=nn.ReLU(),
            maxpool=nn.MaxPool2d(3, 2),
            layer1=nn.Sequential(first),
            layer2=nn.Sequential(second),
        )
    )
    student = DsnStudent("resnet18", dim, len(TRAINING))
    student.trunk = CseTrunk(plain)
    student.embedding = nn.Linear(_FEATURES, dim)
    for module in student.trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            module.running_mean = torch.empty_like(module.weight).uniform_(-0.1, 0.1).detach()
    for block in student.trunk.blocks():
        nn.init.normal_(block.se.fc2.weight)
        with torch.no_grad():
            block.se.fc2.weight[:, -1] *= 4
    return student.eval()


def telling(student: DsnStudent, samples: ImageSubset) -> DsnStudent:
    """Return the student with an embedding whose last number tells sketches from photos.

    Else a kind that is not told, or told wrongly, would hardly be seen in the embeddings.
    """
    images = normalise(torch.from_numpy(samples.pixels[:64]).permute(0, 3, 1, 2))
    with torch.inference_mode():
        sketch, photo = (
            student.feature(images, torch.from_numpy(domains_of(kind, len(images)))).mean(dim=0)
            for kind in KINDS
        )
        apart = photo - sketch
        weight = 1.5 * apart / apart.square().sum()
    with torch.no_grad():
        student.embedding.weight[-1] = weight
        student.embedding.bias[-1] = -(sketch + photo) @ weight / 2
    return student


def _texture(name: str, number: int, kind: str) -> Image.Image:
    random = np.random.default_rng([sorted(_STRIPES).index(name), number, int(kind == "sketch")])
    degrees, period = _STRIPES[name]
    angle = np.deg2rad(degrees + random.uniform(-4, 4))
    rows, columns = np.mgrid[0:96, 0:96]
    phase = (rows * np.cos(angle) + columns * np.sin(angle)) / period + random.uniform()
    stripes = phase % 1 < random.uniform(0.3, 0.4)
    if kind == "sketch":
        return Image.fromarray(np.where(stripes, 0, 255).astype(np.uint8))
    dark, light = random.integers(0, 80, 3), random.integers(170, 256, 3)
    return Image.fromarray(np.where(stripes[:, :, None], dark, light).astype(np.uint8))
