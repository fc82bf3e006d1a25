from __future__ import annotations

import pytest
import torch

from sbtk_train.models.backbone import Classifier
from sbtk_train.models.sbtknet import SbtknetStudent, SpatialAttention


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
