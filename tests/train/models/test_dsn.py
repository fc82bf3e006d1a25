from __future__ import annotations

import pytest
import torch

from sbtk_runtime.errors import BadConfig
from sbtk_train.models.backbone import Classifier
from sbtk_train.models.dsn import DsnStudent
from sbtk_train.models.student import domains_of


@pytest.fixture(scope="module")
def student() -> DsnStudent:
    torch.manual_seed(0)
    student = DsnStudent("resnet18", dim=12, classes=5).eval()
    for block in student.trunk.blocks():
        torch.nn.init.normal_(block.se.fc2.weight)
    return student


def test_outputs_are_linear_in_the_code_and_embeddings_are_unit_rows(student: DsnStudent) -> None:
    with torch.inference_mode():
        output = student(torch.randn(3, 3, 64, 64), domains_of("photo", 3))
        code = student.embedding(output.feature)
        torch.testing.assert_close(output.class_logits, student.identity(code))
        torch.testing.assert_close(output.soft_logits, student.soft(code))
        torch.testing.assert_close(output.embedding, code / code.norm(dim=1, keepdim=True))
    assert output.feature.shape == (3, 512)
    assert output.soft_logits.shape == (3, 1000)
    assert student.dim == 12


def test_the_domain_changes_the_embedding(student: DsnStudent) -> None:
    assert student.has_domain_input
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        sketches = student.embed(images, domains_of("sketch", 2))
        photos = student.embed(images, domains_of("photo", 2))
        mixed = student.embed(images, torch.tensor([0.0, 1.0]))
    assert not torch.allclose(sketches, photos, atol=1e-3)
    torch.testing.assert_close(mixed, torch.stack([sketches[0], photos[1]]))


def test_stages_in_two_parts_equal_the_trunk_with_the_domain(student: DsnStudent) -> None:
    images, domains = torch.randn(2, 3, 64, 64), torch.tensor([0.0, 1.0])
    with torch.inference_mode():
        early = student.feature_map(images, domains, end="layer3")
        torch.testing.assert_close(
            student.embed(early, domains, begin="layer3"), student.embed(images, domains)
        )


def test_frozen_stages_keep_their_channel_weights() -> None:
    torch.manual_seed(0)
    student = DsnStudent("resnet18", dim=8, classes=3)
    student.freeze_until("layer4")
    student.train()
    output = student(torch.randn(4, 3, 64, 64), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    output.embedding.sum().backward()
    learning = {name for name, p in student.trunk.named_parameters() if p.grad is not None}
    assert "layer4.1.se.fc2.weight" in learning
    assert all(name.startswith("layer4") for name in learning)


def test_code_and_head_start_as_the_best_approximation_of_the_classifier() -> None:
    torch.manual_seed(1)
    classifier = Classifier(torch.randn(1000, 512), torch.randn(1000))
    student = DsnStudent("resnet18", dim=40, classes=3)
    bias = student.soft.bias.detach().clone()
    student.start_from(classifier)
    product = (student.soft.weight @ student.embedding.weight).detach()
    left, values, right = torch.linalg.svd(classifier.weight, full_matrices=False)
    torch.testing.assert_close(
        product, left[:, :40] * values[:40] @ right[:40], atol=1e-3, rtol=1e-3
    )
    # U_k has orthonormal columns, so the singular values are in the code's weight.
    gram = (student.soft.weight.T @ student.soft.weight).detach()
    torch.testing.assert_close(gram, torch.eye(40), atol=1e-4, rtol=0)
    assert torch.equal(student.soft.bias.detach(), bias)

    whole = DsnStudent("resnet18", dim=512, classes=3)
    whole.start_from(classifier)
    product = (whole.soft.weight @ whole.embedding.weight).detach()
    torch.testing.assert_close(product, classifier.weight, atol=1e-3, rtol=1e-3)


def test_a_code_longer_than_the_classifiers_rank_is_refused_with_both_numbers() -> None:
    torch.manual_seed(1)
    low_rank = torch.randn(1000, 20) @ torch.randn(20, 512)
    student = DsnStudent("resnet18", dim=21, classes=3)
    with pytest.raises(BadConfig, match=r"--dim 21(.|\n)*at most 20"):
        student.start_from(Classifier(low_rank, torch.zeros(1000)))
    DsnStudent("resnet18", dim=20, classes=3).start_from(Classifier(low_rank, torch.zeros(1000)))
