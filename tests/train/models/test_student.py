from __future__ import annotations

import pytest
import torch

from sbtk_runtime.errors import BadConfig
from sbtk_train.models.backbone import Classifier
from sbtk_train.models.student import DsnStudent, SbtknetStudent, SpatialAttention, domains_of


@pytest.fixture(scope="module")
def student() -> SbtknetStudent:
    torch.manual_seed(0)
    return SbtknetStudent("resnet18", dim=24, classes=5).eval()


def test_outputs_have_their_shapes_and_embeddings_are_unit_rows(student: SbtknetStudent) -> None:
    with torch.inference_mode():
        output = student(torch.randn(3, 3, 64, 64))
    assert output.embedding.shape == (3, 24)
    assert output.class_logits.shape == (3, 5)
    assert output.soft_logits.shape == (3, 1000)
    torch.testing.assert_close(output.embedding.norm(dim=1), torch.ones(3))


def test_embedding_is_float32_and_unit_under_autocast(student: SbtknetStudent) -> None:
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        embedding = student.embed(images)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2), atol=1e-6, rtol=0)


def test_embed_equals_the_embedding_of_forward(student: SbtknetStudent) -> None:
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(student.embed(images), student(images).embedding)


def test_heads_start_from_the_classifier(student: SbtknetStudent) -> None:
    torch.manual_seed(1)
    own = SbtknetStudent("resnet18", dim=24, classes=5)
    classifier = Classifier(torch.randn(1000, 512), torch.randn(1000))
    own.start_from(classifier)
    feature = torch.randn(4, 512)
    torch.testing.assert_close(
        own.soft(feature), feature @ classifier.weight.T + classifier.bias, atol=1e-3, rtol=1e-4
    )
    # Rows are orthogonal directions in the classifier's row space.
    gram = own.embedding.weight @ own.embedding.weight.T
    off_diagonal = gram - torch.diag(gram.diagonal())
    assert float(off_diagonal.detach().abs().max()) < 1e-3
    assert float(own.embedding.bias.detach().abs().max()) == 0.0


def test_frozen_stages_neither_learn_nor_change_their_statistics() -> None:
    torch.manual_seed(0)
    student = SbtknetStudent("resnet18", dim=8, classes=3)
    student.freeze_until("layer3")
    student.train()
    before = {key: value.clone() for key, value in student.trunk.state_dict().items()}
    student(torch.randn(4, 3, 64, 64)).embedding.sum().backward()
    after = student.trunk.state_dict()
    frozen = [key for key in before if key.startswith(("conv1", "bn1", "layer1", "layer2"))]
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert not torch.equal(before["layer3.0.bn1.running_mean"], after["layer3.0.bn1.running_mean"])
    with_gradient = {name for name, p in student.trunk.named_parameters() if p.grad is not None}
    assert all(name.startswith(("layer3", "layer4")) for name in with_gradient)


def test_attention_adds_a_weighted_part_of_each_position() -> None:
    torch.manual_seed(0)
    attention = SpatialAttention(16)
    feature_map = torch.randn(2, 16, 3, 3)
    ratio = attention(feature_map) / feature_map - 1
    torch.testing.assert_close(ratio[:, 0], ratio[:, 5], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ratio[:, 0].sum((1, 2)), torch.ones(2), atol=1e-4, rtol=1e-3)
    assert SbtknetStudent("resnet18", 8, 3, attention=True).attention is not None


@pytest.fixture(scope="module")
def dsn_student() -> DsnStudent:
    torch.manual_seed(0)
    student = DsnStudent("resnet18", dim=12, classes=5).eval()
    for block in student.trunk.blocks():
        torch.nn.init.normal_(block.se.fc2.weight)
    return student


def test_outputs_are_linear_in_the_code_and_embeddings_are_unit_rows(
    dsn_student: DsnStudent,
) -> None:
    with torch.inference_mode():
        output = dsn_student(torch.randn(3, 3, 64, 64), domains_of("photo", 3))
        code = dsn_student.embedding(output.feature)
        torch.testing.assert_close(output.class_logits, dsn_student.identity(code))
        torch.testing.assert_close(output.soft_logits, dsn_student.soft(code))
        torch.testing.assert_close(output.embedding, code / code.norm(dim=1, keepdim=True))
    assert output.feature.shape == (3, 512)
    assert output.soft_logits.shape == (3, 1000)
    assert dsn_student.dim == 12


def test_the_domain_changes_the_embedding(dsn_student: DsnStudent) -> None:
    assert dsn_student.has_domain_input
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        sketches = dsn_student.embed(images, domains_of("sketch", 2))
        photos = dsn_student.embed(images, domains_of("photo", 2))
        mixed = dsn_student.embed(images, torch.tensor([0.0, 1.0]))
    assert not torch.allclose(sketches, photos, atol=1e-3)
    torch.testing.assert_close(mixed, torch.stack([sketches[0], photos[1]]))


def test_stages_in_two_parts_equal_the_trunk_with_the_domain(dsn_student: DsnStudent) -> None:
    images, domains = torch.randn(2, 3, 64, 64), torch.tensor([0.0, 1.0])
    with torch.inference_mode():
        early = dsn_student.feature_map(images, domains, end="layer3")
        torch.testing.assert_close(
            dsn_student.embed(early, domains, begin="layer3"), dsn_student.embed(images, domains)
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
