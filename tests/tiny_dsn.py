"""A DSN student of some thousand weights: a stem, two stages with channel weights, a short code."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from sbtk_export.images import ImageSubset
from sbtk_runtime.preprocess import KINDS, domains_of
from sbtk_train.batches.augment import normalise
from sbtk_train.models.cse_resnet import CseTrunk
from sbtk_train.models.dsn import DsnStudent
from tests.tiny_student import TRAINING

_STEM, _FEATURES = 16, 64


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
