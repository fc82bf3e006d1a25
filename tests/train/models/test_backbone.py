from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_train.models.backbone import (
    SE_RESNET50,
    ConditionalSE,
    CseTrunk,
    build_cse_trunk,
    build_trunk,
    load_cse_trunk,
    load_trunk,
    measure_drift,
)


def stage_strides(backbone: str) -> list[tuple[int, int]]:
    trunk, _ = build_trunk(backbone)
    strides = []
    for stage in (2, 3, 4):
        first, second = (trunk.get_submodule(f"layer{stage}.0.conv{n}") for n in (1, 2))
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
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


def resnet18_tensors() -> dict[str, Tensor]:
    trunk, channels = build_trunk("resnet18")
    head = {"fc.weight": torch.randn(1000, channels), "fc.bias": torch.zeros(1000)}
    return {**trunk.state_dict(), **head}


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


def test_drift_is_zero_on_the_photos_of_the_statistics() -> None:
    torch.manual_seed(0)
    trunk, _ = build_trunk("resnet18")
    photos = torch.randn(16, 3, 64, 64)
    trunk.train()
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        trunk(photos)
    own = measure_drift(trunk, photos)
    other = measure_drift(trunk, photos * 3 + 2)
    # Not exactly zero: the statistics are of layers fed by batch statistics, not running ones.
    assert own < 1e-3
    assert other > 100 * own


SKETCH_AND_PHOTO = torch.tensor([0.0, 1.0])


def with_lively_norms(network: nn.Module) -> nn.Module:
    """Give batch norms weights and statistics as training leaves them."""
    draw = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.weight.data, 0.5, 1.0),
                (module.bias.data, -0.2, 0.2),
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
            ):
                assert values is not None
                values.uniform_(low, high, generator=draw)
    return network.eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_averages_channels_as_evaluation_does(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    module = ConditionalSE(32)
    with torch.no_grad():
        module.fc2.weight[:, -1].normal_()
    found = []
    for mode in (True, False):
        values = torch.randn(2, 32, 3, 5, generator=torch.Generator().manual_seed(1))
        values = values.contiguous(memory_format=layout).requires_grad_()
        module.zero_grad()
        result = module.train(mode)(values, SKETCH_AND_PHOTO)
        result.square().sum().backward()
        assert values.grad is not None
        gradients = [parameter.grad for parameter in module.parameters()]
        found.append([result.detach(), values.grad, *gradients])
    torch.testing.assert_close(*found)


def test_the_module_weights_channels_by_their_averages_and_the_domain() -> None:
    torch.manual_seed(0)
    module = ConditionalSE(32)
    assert module.fc1.weight.shape == (2, 32)
    assert module.fc2.weight.shape == (32, 3)
    torch.testing.assert_close(module.fc2.weight[:, 2], torch.zeros(32))
    with torch.no_grad():
        module.fc2.weight[:, 2] = torch.randn(32)
    module.requires_grad_(False)
    values = torch.randn(2, 32, 3, 5)
    found = module(values, SKETCH_AND_PHOTO)
    for row, domain in enumerate((0.0, 1.0)):
        averages = torch.tensor([values[row, c].mean() for c in range(32)])
        hidden = [
            max(float(module.fc1.weight[h] @ averages + module.fc1.bias[h]), 0.0) for h in range(2)
        ]
        for channel in range(32):
            score = float(module.fc2.bias[channel] + module.fc2.weight[channel, 2] * domain)
            score += sum(float(module.fc2.weight[channel, h]) * hidden[h] for h in range(2))
            share = 1 / (1 + 2.718281828459045**-score)
            torch.testing.assert_close(found[row, channel], values[row, channel] * share)


def test_all_sixteen_bottlenecks_have_a_module_with_reduction_sixteen() -> None:
    for backbone in (SE_RESNET50, "resnet50-v1", "resnet50-v1.5"):
        trunk, channels = build_cse_trunk(backbone)
        widths = [block.se.fc2.out_features for block in trunk.blocks()]
        assert widths == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
        assert [block.se.fc1.out_features * 16 for block in trunk.blocks()] == widths
        assert channels == 2048


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50-v1", "resnet50-v1.5"])
def test_from_plain_weights_it_starts_as_the_plain_trunk(backbone: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = with_lively_norms(build_trunk(backbone)[0])
    trunk, channels = build_cse_trunk(backbone)
    head = {"fc.weight": torch.randn(1000, channels), "fc.bias": torch.zeros(1000)}
    classifier = load_cse_trunk(trunk, {**plain.state_dict(), **head}, tmp_path, backbone)
    assert classifier is not None
    assert torch.equal(classifier.weight, head["fc.weight"])
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(trunk.eval()(images, SKETCH_AND_PHOTO), plain(images))


def test_stages_from_plain_weights_are_the_same_in_every_run(tmp_path: Path) -> None:
    plain = dict(build_trunk("resnet18")[0].state_dict())
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        trunk, _ = build_cse_trunk("resnet18")
        load_cse_trunk(trunk, plain, tmp_path, "resnet18")
        states.append(trunk.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert float(states[0]["layer1.0.se.fc1.weight"].abs().max()) > 0


def test_the_domain_has_a_gradient_from_the_first_step_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = with_lively_norms(build_trunk("resnet18")[0])
    trunk, _ = build_cse_trunk("resnet18")
    load_cse_trunk(trunk, dict(plain.state_dict()), tmp_path, "resnet18")
    images = torch.randn(1, 3, 64, 64).expand(2, -1, -1, -1)
    before = trunk.eval()(images, SKETCH_AND_PHOTO)
    assert torch.equal(before[0], before[1])
    before[1].square().sum().backward()
    for block in trunk.blocks():
        gradient = block.se.fc2.weight.grad
        assert gradient is not None
        assert float(gradient[:, -1].abs().max()) > 0
        with torch.no_grad():
            block.se.fc2.weight -= 1e-3 * gradient
    after = trunk(images, SKETCH_AND_PHOTO)
    assert not torch.allclose(after[0], after[1])


def test_stages_can_be_run_from_a_given_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk, _ = build_cse_trunk("resnet18")
    trunk.eval()
    images = torch.randn(2, 3, 64, 64)
    values = images
    with torch.inference_mode():
        for name, stage in trunk.named_children():
            if name == "layer3":
                break
            values = (
                stage(values, SKETCH_AND_PHOTO) if name in ("layer1", "layer2") else stage(values)
            )
        found = trunk(values, SKETCH_AND_PHOTO, begin="layer3")
        torch.testing.assert_close(found, trunk(images, SKETCH_AND_PHOTO))


def cadene_tensors(trunk: CseTrunk) -> dict[str, Tensor]:
    """Return the trunk's tensors under the names and shapes of Cadene's file, with a head."""
    tensors = {"last_linear.weight": torch.randn(1000, 2048), "last_linear.bias": torch.zeros(1000)}
    for key, value in trunk.state_dict().items():
        name = f"layer0.{key}" if key.startswith(("conv1", "bn1")) else key
        if ".se.fc2.weight" in name:
            value = value[:, :-1]
        if ".se." in name and name.endswith("weight"):
            value = value[:, :, None, None]
        tensors[name.replace(".se.", ".se_module.")] = value.clone()
    return tensors


def caffe_se_resnet50(tensors: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return the feature map of SE-ResNet50 as its authors lay it out, from Cadene's tensors."""

    def normed(values: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(values, mean, var, weight, bias)

    values = functional.conv2d(images, tensors["layer0.conv1.weight"], stride=2, padding=3)
    values = functional.relu(normed(values, "layer0.bn1"))
    values = functional.max_pool2d(values, 3, stride=2, ceil_mode=True)
    for stage, depth in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for number in range(depth):
            block = f"layer{stage}.{number}"
            stride = 2 if stage > 1 and number == 0 else 1
            out = functional.conv2d(values, tensors[f"{block}.conv1.weight"], stride=stride)
            out = functional.relu(normed(out, f"{block}.bn1"))
            out = functional.conv2d(out, tensors[f"{block}.conv2.weight"], padding=1)
            out = functional.relu(normed(out, f"{block}.bn2"))
            out = normed(functional.conv2d(out, tensors[f"{block}.conv3.weight"]), f"{block}.bn3")
            shares = functional.adaptive_avg_pool2d(out, 1)
            for layer, activation in (("fc1", functional.relu), ("fc2", torch.sigmoid)):
                weight, bias = (
                    tensors[f"{block}.se_module.{layer}.{part}"] for part in ("weight", "bias")
                )
                shares = activation(functional.conv2d(shares, weight, bias))
            if number == 0:
                values = functional.conv2d(
                    values, tensors[f"{block}.downsample.0.weight"], stride=stride
                )
                values = normed(values, f"{block}.downsample.1")
            values = functional.relu(out * shares + values)
    return values


def test_cadenes_se_resnet50_is_read_in_its_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, _ = build_cse_trunk(SE_RESNET50)
    with_lively_norms(source)
    tensors = cadene_tensors(source)
    trunk, _ = build_cse_trunk(SE_RESNET50)
    classifier = load_cse_trunk(trunk, tensors, tmp_path, SE_RESNET50)
    assert classifier is not None
    assert torch.equal(classifier.weight, tensors["last_linear.weight"])
    images = torch.randn(2, 3, 60, 60)
    with torch.inference_mode():
        found = trunk.eval()(images, SKETCH_AND_PHOTO)
        expected = caffe_se_resnet50(tensors, images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for block in trunk.blocks():
        assert float(block.se.fc2.weight[:, -1].detach().abs().max()) == 0.0


def test_mismatched_weights_and_backbones_are_refused(tmp_path: Path) -> None:
    plain = dict(build_trunk("resnet18")[0].state_dict())
    with pytest.raises(BadModel, match="se_resnet50"):
        load_cse_trunk(build_cse_trunk(SE_RESNET50)[0], plain, tmp_path, SE_RESNET50)
    cadene = {"last_linear.weight": torch.zeros(1000, 512)}
    with pytest.raises(BadModel, match="--backbone se-resnet50"):
        load_cse_trunk(build_cse_trunk("resnet18")[0], cadene, tmp_path, "resnet18")
    del plain["layer2.0.conv1.weight"]
    with pytest.raises(BadModel, match=r"layer2\.0\.conv1\.weight"):
        load_cse_trunk(build_cse_trunk("resnet18")[0], plain, tmp_path, "resnet18")
    with pytest.raises(BadConfig, match="resnet18"):
        build_cse_trunk("alexnet")
