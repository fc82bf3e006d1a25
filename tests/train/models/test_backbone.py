from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_train.models.backbone import (
    build_trunk,
    load_trunk,
    measure_drift,
    read_weights,
)


def stage_strides(backbone: str) -> list[tuple[int, int]]:
    trunk, _ = build_trunk(backbone)
    strides = []
    for stage in (2, 3, 4):
        first, second = (trunk.get_submodule(f"layer{stage}.0.conv{n}") for n in (1, 2))
        assert isinstance(first, torch.nn.Conv2d)
        assert isinstance(second, torch.nn.Conv2d)
        strides.append((first.stride[0], second.stride[0]))
    return strides


def test_the_two_layouts_differ_in_the_strided_convolution() -> None:
    assert stage_strides("resnet50-v1") == [(2, 1)] * 3
    assert stage_strides("resnet50-v1.5") == [(1, 2)] * 3


@pytest.mark.parametrize("backbone", ["resnet50-v1", "resnet50-v1.5", "resnet18"])
def test_the_feature_map_has_a_thirty_second_of_the_inputs_size(backbone: str) -> None:
    trunk, channels = build_trunk(backbone)
    with torch.inference_mode():
        feature_map = trunk.eval()(torch.zeros(1, 3, 64, 64))
    assert feature_map.shape == (1, channels, 2, 2)


def test_the_error_for_an_unknown_backbone_lists_the_known_ones() -> None:
    with pytest.raises(BadConfig, match=r"resnet50-v1\.5"):
        build_trunk("vgg16")


def resnet18_tensors() -> dict[str, torch.Tensor]:
    trunk, channels = build_trunk("resnet18")
    head = {"fc.weight": torch.randn(1000, channels), "fc.bias": torch.zeros(1000)}
    return {**trunk.state_dict(), **head}


def test_safetensors_and_pth_give_the_same_tensors(tmp_path: Path) -> None:
    tensors = resnet18_tensors()
    save_file(tensors, tmp_path / "w.safetensors", {"backbone": "resnet18"})
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "w.pth")
    first, layout = read_weights(tmp_path / "w.safetensors")
    second, none = read_weights(tmp_path / "w.pth")
    assert (layout, none) == ("resnet18", None)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_loading_fills_the_trunk_and_returns_the_classifier(tmp_path: Path) -> None:
    tensors = resnet18_tensors()
    trunk, _ = build_trunk("resnet18")
    classifier = load_trunk(trunk, tensors, tmp_path)
    assert classifier is not None
    assert torch.equal(classifier.weight, tensors["fc.weight"])
    assert torch.equal(trunk.state_dict()["conv1.weight"], tensors["conv1.weight"])
    del tensors["fc.weight"]
    assert load_trunk(trunk, tensors, tmp_path) is None


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    trunk, _ = build_trunk("resnet18")
    for change, name in (
        (lambda t: t.pop("layer3.0.conv1.weight"), "layer3.0.conv1.weight"),
        (lambda t: t.update({"layer9.weight": torch.zeros(1)}), "layer9.weight"),
        (lambda t: t.update({"conv1.weight": torch.zeros(1, 2)}), r"\(1, 2\)"),
    ):
        tensors = resnet18_tensors()
        change(tensors)  # type: ignore[no-untyped-call]
        with pytest.raises(BadModel, match=name):
            load_trunk(trunk, tensors, tmp_path)


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


def test_drift_is_zero_on_the_photos_of_the_statistics() -> None:
    torch.manual_seed(0)
    trunk, _ = build_trunk("resnet18")
    photos = torch.randn(16, 3, 64, 64)
    trunk.train()
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        trunk(photos)
    own = measure_drift(trunk, photos)
    other = measure_drift(trunk, photos * 3 + 2)
    # Not exactly zero: the statistics are of layers fed by batch statistics, not running ones.
    assert own < 1e-3
    assert other > 100 * own
