from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sbtk_train.objectives.losses import (
    batch_hard_loss,
    classification_loss,
    distillation_loss,
    knowledge_loss,
    quadruplet_loss,
    triplet_loss,
    two_view_contrastive_loss,
)


def unit_rows(count: int, seed: int, dim: int = 8) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, dim, generator=draw), dim=1)


def distance(left: Tensor, right: Tensor) -> float:
    return float(sum((a - b) ** 2 for a, b in zip(left.tolist(), right.tolist(), strict=True)))


def test_triplet_and_quadruplet_equal_a_plain_loop() -> None:
    anchor, positive, photo, sketch = (unit_rows(9, seed) for seed in range(4))
    with_photo = [
        max(distance(a, p) - distance(a, n) + 0.2, 0)
        for a, p, n in zip(anchor, positive, photo, strict=True)
    ]
    with_sketch = [
        max(distance(a, p) - distance(a, n) + 0.2, 0)
        for a, p, n in zip(anchor, positive, sketch, strict=True)
    ]
    assert float(triplet_loss(anchor, positive, photo, 0.2)) == pytest.approx(
        sum(with_photo) / 9, abs=1e-5
    )
    assert float(quadruplet_loss(anchor, positive, photo, sketch, 0.2)) == pytest.approx(
        (sum(with_photo) + sum(with_sketch)) / 18, abs=1e-5
    )


def test_quadruplet_is_zero_once_negatives_are_far_by_the_margin() -> None:
    anchor = torch.tensor([[1.0, 0.0]])
    assert float(quadruplet_loss(anchor, anchor, -anchor, -anchor, 0.2)) == 0.0
    # Hand-worked: d+ = 4, d- = 0, so 4 - 0 + 0.2 for both negatives.
    assert float(quadruplet_loss(anchor, -anchor, anchor, anchor, 0.2)) == pytest.approx(4.2)


@pytest.mark.parametrize("with_sketches", [True, False])
def test_batch_hard_equals_a_plain_loop(with_sketches: bool) -> None:
    sketches, photos = unit_rows(8, 1), unit_rows(6, 2)
    sketch_labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    photo_labels = torch.tensor(
        [0, 0, 1, 1, 2, 2]
    )  # class 3 has no photo: its sketches are left out
    forward, back = [], []
    for s in range(8):
        positives = [p for p in range(6) if photo_labels[p] == sketch_labels[s]]
        if not positives:
            continue
        far = max(distance(sketches[s], photos[p]) for p in positives)
        near = min(distance(sketches[s], photos[p]) for p in range(6) if p not in positives)
        term = max(far - near + 0.3, 0)
        if with_sketches:
            near = min(
                distance(sketches[s], sketches[o])
                for o in range(8)
                if sketch_labels[o] != sketch_labels[s]
            )
            term = (term + max(far - near + 0.3, 0)) / 2
        forward.append(term)
    for p in range(6):
        mine = [s for s in range(8) if sketch_labels[s] == photo_labels[p]]
        far = max(distance(sketches[s], photos[p]) for s in mine)
        near = min(distance(sketches[s], photos[p]) for s in range(8) if s not in mine)
        back.append(max(far - near + 0.3, 0))
    expected = sum(forward) / len(forward) + 0.5 * sum(back) / len(back)
    found = batch_hard_loss(
        sketches, sketch_labels, photos, photo_labels, 0.3, with_sketch_negatives=with_sketches
    )
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_batch_hard_without_any_pair_is_zero_and_differentiable() -> None:
    sketches = unit_rows(2, 0).requires_grad_()
    labels = torch.tensor([0, 1])
    loss = batch_hard_loss(sketches, labels, unit_rows(2, 1), labels + 5, 0.2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0


def test_classification_and_knowledge_are_positive_cross_entropies() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    expected = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert float(classification_loss(logits, torch.tensor([0, 0]))) == pytest.approx(expected)
    one_hot = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert float(knowledge_loss(logits, one_hot)) == pytest.approx(expected)


def test_the_knowledge_loss_is_smallest_if_student_and_teacher_agree() -> None:
    soft = torch.tensor([[0.7, 0.2, 0.1]])
    agreeing = float(knowledge_loss(soft.log(), soft))
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert agreeing == pytest.approx(entropy, abs=1e-6)
    assert float(knowledge_loss(soft.flip(1).log(), soft)) > agreeing


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


def test_distillation_of_a_case_worked_by_hand() -> None:
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


def test_the_other_view_is_a_positive_even_in_a_class_of_one_image() -> None:
    rows = torch.eye(3)
    found = two_view_contrastive_loss(rows, rows, torch.tensor([0, 1, 2]), 1.0)
    # Its own other view has cosine 1, the four views of the two other images cosine 0.
    assert float(found) == pytest.approx(math.log(math.e + 4) - 1, abs=1e-5)
