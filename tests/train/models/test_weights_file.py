"""Weights files of sbtk and from elsewhere, and files that are not weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_train.models.backbone import extract_classifier, is_student, load_trunk
from sbtk_train.models.student import DsnStudent, SbtknetStudent
from sbtk_train.models.weights_file import (
    find_weights,
    read_student_dim,
    read_training_classes,
    read_unseen_classes,
    read_weights,
)
from tests.train.models.test_backbone import resnet18_tensors


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return resnet18_tensors()


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def test_safetensors_and_pth_give_the_same_tensors(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "w.safetensors", {"backbone": "resnet18"})
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "w.pth")
    first, layout = read_weights(tmp_path / "w.safetensors")
    second, none = read_weights(tmp_path / "w.pth")
    assert (layout, none) == ("resnet18", None)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: prefixed(t, "_orig_mod."),
        lambda t: prefixed(t, "module._orig_mod."),
        lambda t: {"model": t, "optimizer": {"state": {}}, "epoch": 3},
        lambda t: {"state_dict": prefixed(t, "model.")},
        lambda t: {"state_dict": {"model": prefixed(t, "module.")}},
        lambda t: {
            (key if key.startswith("fc.") else f"backbone.{key}"): value for key, value in t.items()
        },
    ],
)
def test_prefixes_and_nested_tensors_are_found(
    tensors: dict[str, Tensor], tmp_path: Path, wrap: Any
) -> None:
    torch.save(wrap(tensors), tmp_path / "w.pth")
    found, _ = read_weights(tmp_path / "w.pth")
    assert found.keys() == tensors.keys()
    assert torch.equal(found["conv1.weight"], tensors["conv1.weight"])


def test_two_networks_in_one_file_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({**tensors, **prefixed(tensors, "module.")}, tmp_path / "w.pth")
    with pytest.raises(BadModel, match="twice"):
        read_weights(tmp_path / "w.pth")


class _Payload:
    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self._sentinel,))


def test_a_pickle_payload_is_refused_and_not_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    torch.save({"conv1.weight": _Payload(sentinel)}, tmp_path / "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Payload(sentinel)))
    for name in ("torch.pth", "plain.pth"):
        with pytest.raises(BadModel):
            read_weights(tmp_path / name)
    assert not sentinel.exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x00" * 64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_weights_are_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadModel):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"<html>", "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    ],
)
def test_unusable_files_are_named(
    tmp_path: Path, suffix: str, content: bytes, sentence: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadModel, match=sentence):
        read_weights(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_not_finite_are_refused(
    tensors: dict[str, Tensor], tmp_path: Path, suffix: str, value: float
) -> None:
    broken = {key: each.clone() for key, each in tensors.items()}
    broken["layer3.0.conv1.weight"][0, 0, 0, 0] = value
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(broken, path)
    with pytest.raises(BadModel, match=r"layer3\.0\.conv1\.weight holds NaN or infinity"):
        read_weights(path)


def test_an_own_student_can_be_a_classifier(tmp_path: Path) -> None:
    student = SbtknetStudent("resnet18", 16, 3)
    save_file(student.state_dict(), tmp_path / "student.safetensors", {"backbone": "resnet18"})
    tensors, layout = read_weights(tmp_path / "student.safetensors")
    assert layout == "resnet18"
    assert is_student(tensors)
    assert read_student_dim(tmp_path / "student.safetensors") == 16
    other = SbtknetStudent("resnet18", 16, 5)
    other.load_student(tensors, tmp_path, same_classes=False)
    assert torch.equal(other.embedding.weight, student.embedding.weight)
    assert other.identity.out_features == 5
    classifier = load_trunk(other.trunk, tensors, tmp_path)
    assert classifier is not None
    assert torch.equal(classifier.weight, student.soft.weight)
    with pytest.raises(BadModel, match="length 16, but this run's has 8") as caught:
        SbtknetStudent("resnet18", 8, 5).load_student(tensors, tmp_path, same_classes=False)
    assert caught.value.next_step == "--dim 16"
    attentive = SbtknetStudent("resnet18", 16, 3, attention=True)
    with pytest.raises(BadModel, match="attention"):
        attentive.load_student(tensors, tmp_path, same_classes=True)
    with pytest.raises(BadModel, match="first difference"):
        SbtknetStudent("resnet50-v1", 16, 3).load_student(tensors, tmp_path, same_classes=True)


def test_a_dsn_student_is_fine_tuned_by_dsn_only(tmp_path: Path) -> None:
    student = DsnStudent("resnet18", 8, 3)
    tensors = student.state_dict()
    other = DsnStudent("resnet18", 8, 3)
    other.load_student(tensors, tmp_path, same_classes=True)
    images, domains = torch.randn(2, 3, 64, 64), torch.tensor([0.0, 1.0])
    with torch.inference_mode():
        feature = student.eval().feature(images, domains)
        expected = student(images, domains).soft_logits
        assert torch.equal(other.eval().embed(images, domains), student.embed(images, domains))
    head = extract_classifier(tensors)
    found = feature @ head["fc.weight"].T + head["fc.bias"]
    assert torch.allclose(found, expected, atol=1e-4)
    classifier = DsnStudent("resnet18", 8, 3).load_weights(tensors, tmp_path)
    assert classifier is not None
    with pytest.raises(BadModel, match="DSN or SAKE"):
        SbtknetStudent("resnet18", 8, 3).load_weights(tensors, tmp_path)


def test_a_run_folder_stands_for_its_student(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="not a run folder or a bundle"):
        find_weights(str(tmp_path), None)
    (tmp_path / "manifest.json").write_text('{"training": {"unseen_classes": ["ant", "bee"]}}')
    with pytest.raises(BadConfig, match="bundle without its student"):
        find_weights(str(tmp_path), None)
    (tmp_path / "student.safetensors").touch()
    assert find_weights(str(tmp_path), None) == tmp_path / "student.safetensors"
    assert read_unseen_classes(tmp_path / "student.safetensors") == ("ant", "bee")
    assert read_training_classes(tmp_path / "student.safetensors") == ()
    (tmp_path / "run.json").write_text('{"identity_classes": ["cow"]}')
    assert read_training_classes(tmp_path / "student.safetensors") == ("cow",)
