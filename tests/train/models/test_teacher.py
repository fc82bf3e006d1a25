from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_runtime.preprocess import prepare
from sbtk_train.batches.augment import normalise
from sbtk_train.config import TrainConfig, make_recipe
from sbtk_train.data.class_names import read_imagenet_synsets
from sbtk_train.models.backbone import build_trunk
from sbtk_train.models.teacher import make_stand_in_label
from sbtk_train.models.weights_file import choose_backbone, find_weights
from sbtk_train.objectives.sbtknet import SbtknetObjective
from sbtk_train.runs.context import TrainingContext, build_context
from tests.tiny_data import polygon, quick_config, write_dataset, write_strokes

pytestmark = pytest.mark.usefixtures("narrow_resnet18")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, narrow_resnet18: None) -> Path:
    torch.manual_seed(0)
    trunk, channels = build_trunk("resnet18")
    head = {"fc.weight": torch.randn(1000, channels) / 10, "fc.bias": torch.zeros(1000)}
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file({**trunk.state_dict(), **head}, path, {"backbone": "resnet18"})
    return path


def config(data: Path, weights: Path | None, **changes: Any) -> TrainConfig:
    named = "" if weights is None else str(weights)
    return quick_config(data, make_recipe("sbtk"), **({"weights": named} | changes))


def labels_of(context: TrainingContext) -> Tensor:
    assert isinstance(context.objective, SbtknetObjective)
    assert context.objective.soft_labels is not None
    return context.objective.soft_labels


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_soft_labels_are_the_softmax_of_the_mean_logits_of_training_photos(
    tmp_path: Path, weights: Path
) -> None:
    data = write_dataset(tmp_path / "data")
    context = build_context(config(data, weights), lambda text: None)
    training = context.division.training
    assert labels_of(context).shape == (len(training.classes), 1000)
    torch.testing.assert_close(labels_of(context).sum(1), torch.ones(len(training.classes)))
    student = context.student.eval()
    logits = []
    for path, label in zip(training.photos, training.photo_labels, strict=True):
        if label == 1:
            pixels = torch.from_numpy(prepare(path.read_bytes(), "photo").pixels.copy())
            with torch.inference_mode():
                output = student(normalise(pixels.permute(2, 0, 1)[None]))
            logits.append(output.soft_logits[0])
    expected = functional.softmax(torch.stack(logits).mean(0), dim=0)
    torch.testing.assert_close(labels_of(context)[1], expected, atol=1e-5, rtol=1e-3)


def test_soft_labels_are_cached_by_what_they_are_made_from(tmp_path: Path, weights: Path) -> None:
    data = write_dataset(tmp_path / "data")
    messages: list[str] = []
    first = build_context(config(data, weights), messages.append)
    assert any("soft labels" in text for text in messages)
    messages.clear()
    again = build_context(config(data, weights), messages.append)
    assert not any("soft labels" in text for text in messages)
    assert again.knowledge_sha256 == first.knowledge_sha256
    changed = first.division.training.photos[0]
    changed.write_bytes(changed.read_bytes() + b"\0")
    other = build_context(config(data, weights), messages.append)
    assert other.knowledge_sha256 != first.knowledge_sha256


def test_a_damaged_cache_is_rebuilt(tmp_path: Path, weights: Path) -> None:
    data = write_dataset(tmp_path / "data")
    first = build_context(config(data, weights), lambda text: None)
    (file,) = (tmp_path / "cache" / "sbtk" / "soft-labels").iterdir()
    for damage in (b"", b"x" * 100, file.read_bytes()[:200]):
        file.write_bytes(damage)
        again = build_context(config(data, weights), lambda text: None)
        np.testing.assert_array_equal(labels_of(again).numpy(), labels_of(first).numpy())


def test_the_error_for_a_missing_teacher_says_what_to_give(tmp_path: Path, weights: Path) -> None:
    data = write_dataset(tmp_path / "data")
    with pytest.raises(BadConfig, match="teacher"):
        build_context(config(data, None), lambda text: None)
    tensors, headless = build_trunk("resnet18")[0].state_dict(), tmp_path / "headless.safetensors"
    save_file(tensors, headless)
    with pytest.raises(BadModel, match="classifier"):
        build_context(config(data, headless), lambda text: None)
    from_scratch = build_context(config(data, None, teacher=str(weights)), lambda text: None)
    assert len(labels_of(from_scratch)) == 4


def test_weights_that_name_another_layout_are_refused(tmp_path: Path, weights: Path) -> None:
    data = write_dataset(tmp_path / "data")
    with pytest.raises(BadModel, match="resnet18"):
        build_context(config(data, weights, backbone="resnet50-v1"), lambda text: None)


def test_weights_are_looked_up_only_on_this_machine(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBTK_WEIGHTS", str(weights.parent))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    named = weights.parent / "resnet50-v1-imagenet.safetensors"
    named.touch()
    assert find_weights("imagenet", "resnet50-v1") == named
    assert find_weights(str(weights), None) == weights
    with pytest.raises(BadConfig, match="no ImageNet weights"):
        find_weights("imagenet", "resnet50-v1.5")
    monkeypatch.delenv("SBTK_WEIGHTS")
    with pytest.raises(BadConfig, match="SBTK_WEIGHTS"):
        find_weights("imagenet", None)
    with pytest.raises(BadConfig, match="nowhere"):
        find_weights("nowhere.pth", None)
    assert choose_backbone(weights, None, lambda text: None) == "resnet18"
    assert choose_backbone(None, None, lambda text: None) == "resnet50-v1.5"


def test_cadenes_weights_are_found_and_known_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "se_resnet50-ce0d4300.pth"
    torch.save({"layer0.conv1.weight": torch.zeros(1)}, named)
    monkeypatch.setenv("SBTK_WEIGHTS", str(tmp_path))
    assert find_weights("imagenet", "se-resnet50") == named
    assert choose_backbone(named, None, lambda text: None) == "se-resnet50"


def test_a_class_without_photos_gets_a_soft_label_of_its_imagenet_classes() -> None:
    weight = (
        torch.eye(1000, 40) + torch.randn(1000, 40, generator=torch.Generator().manual_seed(0)) / 9
    )
    synsets = read_imagenet_synsets()
    assert len(synsets) == len(set(synsets)) == 1000
    label = make_stand_in_label(weight, [synsets[3], synsets[7]])
    assert label.shape == (1000,)
    assert float(label.sum()) == pytest.approx(1)
    assert set(label.topk(2).indices.tolist()) == {3, 7}


def test_further_classes_have_soft_labels_of_photos_or_substitutes(
    tmp_path: Path, weights: Path
) -> None:
    data = write_dataset(tmp_path / "data")
    drawings = [(name, [polygon(5)]) for name in ("kite", "moon") for _ in "ab"]
    strokes = write_strokes(tmp_path / "s.npz", drawings)
    more = write_dataset(tmp_path / "more", ("kite",), sketches=0, photos=3) / "photo"
    synset = read_imagenet_synsets()[11]
    (tmp_path / "map.toml").write_text(f'[imagenet]\nmoon = ["{synset}"]\n')
    changes = {
        "more_sketches": (str(strokes),),
        "more_photos": (str(more),),
        "class_map": str(tmp_path / "map.toml"),
    }
    context = build_context(config(data, weights, **changes), lambda text: None)
    labels = labels_of(context)
    assert context.division.training.classes[-2:] == ("kite", "moon")
    assert labels.shape == (len(context.division.training.classes), 1000)
    torch.testing.assert_close(labels.sum(1), torch.ones(len(labels)))
    assert int(labels[-1].argmax()) == 11


def test_making_soft_labels_reports_progress(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbtk_train.models.teacher.PROGRESS_SECONDS", 0.0)
    data = write_dataset(tmp_path / "data", photos=18)
    messages: list[str] = []
    context = build_context(config(data, weights), messages.append)
    count = len(context.division.training.photos)
    progress = [text for text in messages if text.startswith("soft labels: ")]
    assert len(progress) == (count - 1) // 32 == 2
    assert progress[-1].startswith(f"soft labels: 64 of {count} photos, ")
