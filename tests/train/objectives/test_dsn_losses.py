from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sbtk_train.objectives.dsn_losses import distillation_loss, two_view_contrastive_loss


def unit_rows(count: int, seed: int, dim: int = 6) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, dim, generator=draw), dim=1)


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def test_distillation_adds_the_scaled_semantic_row_to_the_teachers_scaled_logits() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 7, generator=draw) for _ in range(2))
    semantic = torch.tensor([0.0, 0.25, 1 / 3, 1.0])[torch.randint(4, (4, 7), generator=draw)]
    expected = []
    for row in range(4):
        pairs = zip(teacher[row].tolist(), semantic[row].tolist(), strict=True)
        target = softmax([2.0 * t + 0.3 * m for t, m in pairs])
        shares = softmax(student[row].tolist())
        expected.append(-sum(q * math.log(p) for q, p in zip(target, shares, strict=True)))
    found = distillation_loss(student, teacher, semantic, kd=2.0, kdneg=0.3)
    assert float(found) == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_distillation_by_hand() -> None:
    # The target's logits are (0, ln 3), so it is (1/4, 3/4); the student says (1/2, 1/2).
    found = distillation_loss(
        torch.zeros(1, 2),
        torch.tensor([[1.0, 1.0]]),
        torch.tensor([[0.0, math.log(3) / 0.3]]),
        kd=1.0,
        kdneg=0.3,
    )
    assert float(found) == pytest.approx(math.log(2))


def test_contrast_of_two_views_equals_a_plain_loop() -> None:
    first, second = unit_rows(5, 1), unit_rows(5, 2)
    labels = [0, 1, 0, 2, 1]
    rows = [*first.tolist(), *second.tolist()]
    classes = labels * 2
    terms = []
    for anchor in range(10):
        cosines = [sum(a * b for a, b in zip(rows[anchor], row, strict=True)) for row in rows]
        others = [other for other in range(10) if other != anchor]
        total = sum(math.exp(cosines[other] / 0.07) for other in others)
        positives = [other for other in others if classes[other] == classes[anchor]]
        logs = [math.log(math.exp(cosines[other] / 0.07) / total) for other in positives]
        terms.append(-sum(logs) / len(logs))
    found = two_view_contrastive_loss(first, second, torch.tensor(labels), 0.07)
    assert float(found) == pytest.approx(sum(terms) / 10, rel=1e-4)


def test_the_other_view_is_a_positive_even_of_a_class_that_is_there_once() -> None:
    rows = torch.eye(3)
    found = two_view_contrastive_loss(rows, rows, torch.tensor([0, 1, 2]), 1.0)
    # Its own other view has cosine 1, the four views of the two other images cosine 0.
    assert float(found) == pytest.approx(math.log(math.e + 4) - 1, abs=1e-5)
