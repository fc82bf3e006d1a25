from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from sbtk_runtime.errors import BadConfig, BadData, BadModel
from sbtk_train.batches.augment import normalise
from sbtk_train.batches.sampler import BatchRng, BatchRngs
from sbtk_train.compute import Compute
from sbtk_train.config import DsnRecipe, Method, TrainConfig, make_recipe
from sbtk_train.data.image_set import ImageSet
from sbtk_train.models.backbone import build_cse_trunk, build_trunk, load_cse_trunk, load_trunk
from sbtk_train.models.student import StudentOutput
from sbtk_train.models.teacher import DsnTeacher
from sbtk_train.models.weights_file import read_weights
from sbtk_train.objectives.dsn import Distillation, DsnObjective, MemoryBank
from sbtk_train.objectives.objective import Examples
from sbtk_train.progress import StepDone
from sbtk_train.runs.checkpoint import load_run, load_state
from sbtk_train.runs.context import build_context
from sbtk_train.runs.run import train
from tests.tiny_data import quick_config

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

CPU = Compute(torch.device("cpu"), "fp32")
SKETCHES, PHOTOS, CLASSES, DIM = 4, 5, 3, 6
LABELS = torch.tensor([0, 1, 2, 0, 0, 1, 1, 2, 2])
DOMAINS = torch.tensor([0.0] * SKETCHES + [1.0] * PHOTOS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, narrow_resnet18: None) -> Path:
    """An ImageNet classifier of random weights, with norms as trained ones are."""
    torch.manual_seed(0)
    trunk, channels = build_trunk("resnet18")
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    head = {"fc.weight": torch.randn(1000, channels) / 10, "fc.bias": torch.randn(1000)}
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file({**trunk.state_dict(), **head}, path, {"backbone": "resnet18"})
    return path


@pytest.fixture(scope="module")
def teacher(narrow_resnet18: None) -> DsnTeacher:
    torch.manual_seed(0)
    trunk, channels = build_cse_trunk("resnet18")
    plain, _ = build_trunk("resnet18")
    head = {"fc.weight": torch.randn(1000, channels) / 10, "fc.bias": torch.randn(1000)}
    classifier = load_cse_trunk(trunk, {**plain.state_dict(), **head}, Path(), "resnet18")
    assert classifier is not None
    return DsnTeacher(trunk, classifier, CPU)


def some_data() -> ImageSet:
    return ImageSet(("a", "b", "c"), (), np.zeros(0, dtype=int), (), np.zeros(0, dtype=int))


def objective(teacher: DsnTeacher | None, **knobs: Any) -> DsnObjective:
    """Return DSN's objective with a semantic matrix of fixed entries."""
    knobs = {"kd": 2.0, "kdneg": 0.3, "kd_weight": 0.7, "memory_size": 2} | knobs
    made = make_recipe("dsn-sketchy", "dsn", **knobs)
    assert isinstance(made, DsnRecipe)
    rng = torch.Generator().manual_seed(9)
    semantic = torch.tensor([0.0, 0.25, 1.0])[torch.randint(3, (CLASSES, 1000), generator=rng)]
    distillation = None if teacher is None else Distillation(teacher, semantic)
    return DsnObjective(made, some_data(), 0, 512, CPU.device, distillation)


def step(views: int) -> tuple[StudentOutput, Examples]:
    rng = torch.Generator().manual_seed(4)
    count = views * (SKETCHES + PHOTOS)
    output = StudentOutput(
        functional.normalize(torch.randn(count, DIM, generator=rng), dim=1),
        torch.randn(count, CLASSES, generator=rng),
        torch.randn(count, 1000, generator=rng),
        torch.rand(count, 512, generator=rng),
    )
    inputs = torch.randn(count, 3, 32, 32, generator=rng)
    return output, Examples(inputs, "", LABELS, DOMAINS, SKETCHES)


def cross_entropy(logits: Tensor, target: list[float]) -> float:
    logs: list[float] = (logits.double() - logits.double().logsumexp(0)).tolist()
    return -sum(share * log for share, log in zip(target, logs, strict=True))


def test_dsns_terms_equal_plain_loops(teacher: DsnTeacher) -> None:
    dsn = objective(teacher)
    output, examples = step(dsn.views)
    terms = dsn.terms(output, examples)
    assert list(terms) == ["identity", "knowledge", "contrastive", "memory"]
    count = SKETCHES + PHOTOS
    # Classification is of the first view alone, sketches and photos alike.
    identity = [
        cross_entropy(output.class_logits[row], [float(c == LABELS[row]) for c in range(CLASSES)])
        for row in range(count)
    ]
    assert float(terms["identity"]) == pytest.approx(sum(identity) / count, rel=1e-5)
    # Distillation is of the first view's photos.
    knowledge = []
    semantic = dsn._distillation.semantic if dsn._distillation else torch.empty(0)
    for row in range(SKETCHES, count):
        logits = teacher.logits(examples.inputs[row : row + 1], torch.ones(1))[0]
        target = functional.softmax(2.0 * logits + 0.3 * semantic[LABELS[row]], dim=0)
        knowledge.append(cross_entropy(output.soft_logits[row], target.tolist()))
    expected = 0.7 * sum(knowledge) / PHOTOS
    assert float(terms["knowledge"]) == pytest.approx(expected, rel=1e-4)
    # Contrast is of the second and third view.
    rows, labels = output.embedding[count:], LABELS.repeat(2)
    contrastive = []
    for anchor in range(2 * count):
        others = [other for other in range(2 * count) if other != anchor]
        powers = {o: math.exp(float(rows[anchor] @ rows[o]) / 0.07) for o in others}
        positives = [o for o in others if labels[o] == labels[anchor]]
        total = sum(powers.values())
        contrastive.append(-sum(math.log(powers[o] / total) for o in positives) / len(positives))
    expected = 0.1 * sum(contrastive) / (2 * count)
    assert float(terms["contrastive"]) == pytest.approx(expected, rel=1e-4)
    # The memory is of the first view: sketches are kept first, then photos are compared.
    bank = MemoryBank(CLASSES, 2, 512)
    sketches, photos = output.feature[:SKETCHES], output.feature[SKETCHES:count]
    bank.add(sketches, LABELS[:SKETCHES], photos, LABELS[SKETCHES:])
    expected = float(bank.loss(photos, LABELS[SKETCHES:]))
    assert float(terms["memory"]) == pytest.approx(expected)
    assert expected > 0


def test_sake_is_classification_and_distillation_of_one_view(teacher: DsnTeacher) -> None:
    sake = make_recipe("sake-sketchy", "sake")
    assert isinstance(sake, DsnRecipe)
    made = DsnObjective(
        sake, some_data(), 0, 512, CPU.device, Distillation(teacher, torch.zeros(CLASSES, 1000))
    )
    assert made.views == 1
    assert list(made.terms(*step(1))) == ["identity", "knowledge"]
    assert made.state() == {}


def test_disabled_losses_are_left_out() -> None:
    assert list(objective(None, memory="none").terms(*step(3))) == ["identity", "contrastive"]
    only = objective(None, memory="none", contrastive_weight=0.0)
    assert only.views == 1
    assert list(only.terms(*step(1))) == ["identity"]


@pytest.mark.parametrize(("memory", "teaches"), [("paper", True), ("released", False)])
def test_only_the_papers_memory_loss_has_gradients_for_photos(memory: str, teaches: bool) -> None:
    output, examples = step(3)
    output.feature.requires_grad_()
    output.class_logits.requires_grad_()
    dsn = objective(None, memory=memory)
    terms = dsn.terms(output, examples)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    gradient = output.feature.grad
    photos = slice(SKETCHES, SKETCHES + PHOTOS)
    assert (gradient is not None and bool(gradient[photos].abs().amax(1).all())) == teaches
    if gradient is not None:
        assert not gradient[:SKETCHES].any()
        assert not gradient[SKETCHES + PHOTOS :].any()


def test_the_memory_is_part_of_the_state_and_ends_with_the_epoch() -> None:
    dsn, resumed = objective(None), objective(None)
    output, examples = step(3)
    dsn.terms(output, examples)
    resumed.load_state(dsn.state())
    again = [float(one.terms(output, examples)["memory"]) for one in (dsn, resumed)]
    assert again[0] == again[1]
    assert bool(dsn.state()["counts"].any())
    dsn.start_epoch()
    assert not dsn.state()["counts"].any()


def draws(seed: int, sketches: int, photos: int) -> BatchRngs:
    generator = torch.Generator().manual_seed(seed)
    return BatchRngs(BatchRng(generator, sketches), BatchRng(generator, photos))


def test_rows_are_ordered_by_view_with_sketches_first() -> None:
    rng = torch.Generator().manual_seed(1)
    sketches = torch.randint(0, 256, (2, 1, 16, 16), generator=rng).to(torch.uint8)
    photos = torch.randint(0, 256, (3, 3, 16, 16), generator=rng).to(torch.uint8)
    still = objective(None, augment=False)
    views = still.views_of(sketches, photos, draws(0, 2, 3)).view(3, 5, 3, 16, 16)
    torch.testing.assert_close(views[0, :2], normalise(sketches))
    torch.testing.assert_close(views[0, 2:], normalise(photos))
    for view in (1, 2):
        assert not torch.allclose(views[view], views[0], atol=0.05)
        # A view's histogram of a sketch is changed, its three channels stay one grey.
        unit = views[view, :2] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        unit += torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        torch.testing.assert_close(unit[:, 0], unit[:, 2], atol=1e-5, rtol=1e-4)
    moved = objective(None, augment=True).views_of(sketches, photos, draws(0, 2, 3))
    assert not torch.allclose(moved[:5], views[0], atol=0.05)


def test_the_teacher_is_the_plain_classifier_in_both_domains(weights: Path) -> None:
    tensors, _ = read_weights(weights)
    plain, _ = build_trunk("resnet18")
    head = load_trunk(plain, tensors, weights)
    trunk, _ = build_cse_trunk("resnet18")
    classifier = load_cse_trunk(trunk, tensors, weights, "resnet18")
    assert head is not None
    assert classifier is not None
    made = DsnTeacher(trunk, classifier, CPU)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        feature = plain.eval()(images).mean((2, 3))
    expected = feature @ head.weight.T + head.bias
    for domains in (torch.zeros(2), torch.ones(2)):
        found = made.logits(images, domains)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not found.requires_grad
    assert made.logits(images[:0], torch.ones(0)).shape == (0, 1000)


def tiny_config(
    data: Path,
    weights: Path | None,
    method: Method = "dsn",
    *,
    kd_weight: float = 1.0,
    **options: Any,
) -> TrainConfig:
    recipe = make_recipe(
        f"{method}-sketchy",
        method,
        kd_weight=kd_weight,
        semantic="none",
        batch_sketches=5,
        batch_photos=6,
        epochs=1,
        train_size_px=32,
        selection="validation-map",
    )
    values: dict[str, Any] = {"weights": "" if weights is None else str(weights)}
    values |= {"method": method, "validation_classes": 1}
    return quick_config(data, recipe, **(values | options))


class _Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_and_resumed_run_of_dsn_equals_an_uninterrupted_one(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    train(tiny_config(data, weights), whole, lambda event: None)
    monkeypatch.setattr("sbtk_train.runs.loop._REPORT_SECONDS", 0.0)
    steps = 0

    def killed_later(event: object) -> None:
        nonlocal steps
        steps += isinstance(event, StepDone)
        if steps == 3:
            raise _Killed

    with pytest.raises(_Killed):
        train(tiny_config(data, weights, checkpoint_minutes=0.0), broken, killed_later)
    train(tiny_config(data, weights), broken, lambda event: None, resume=True)
    first, first_position = load_state(whole)
    second, second_position = load_state(broken)
    assert first_position == second_position
    assert {"objective.entries", "objective.counts"} < first.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    figures = first_position.history[-1]
    assert {"identity", "knowledge", "contrastive", "memory"} < figures.keys()
    loaded = load_run(whole).student
    with torch.inference_mode():
        rows = loaded.embed(torch.zeros(1, 3, 64, 64), torch.ones(1))
    assert loaded.has_domain_input
    assert rows.shape == (1, 8)


def test_unusable_teachers_are_named(data: Path, weights: Path, tmp_path: Path) -> None:
    def gathered(file: Path | None, **options: Any) -> None:
        build_context(tiny_config(data, file, **options), lambda text: None)

    with pytest.raises(BadConfig, match="--kd-weight 0"):
        gathered(None)
    gathered(None, kd_weight=0.0)
    headless = tmp_path / "headless.safetensors"
    save_file(build_trunk("resnet18")[0].state_dict(), headless)
    with pytest.raises(BadModel, match="classifier"):
        gathered(headless)
    gathered(None, teacher=str(weights))
    maps: dict[str, Any]
    maps = {"feature_folder": str(tmp_path / "maps"), "freeze_until": "layer4"}
    gathered(weights, **maps)
    with pytest.raises(BadConfig, match="frozen stages"):
        gathered(None, teacher=str(weights), **maps)
    with pytest.raises(BadConfig, match=r"--dim 129(.|\n)*at most 128"):
        gathered(weights, dim=129)


def test_sake_trains_on_stored_feature_maps(data: Path, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    maps: dict[str, Any]
    maps = {"feature_folder": str(tmp_path / "maps"), "freeze_until": "layer4"}
    config = tiny_config(data, weights, "sake", **maps)
    messages: list[object] = []
    record = train(config, folder, messages.append)
    assert math.isfinite(record["best"]["knowledge"])
    assert any("not with sake's moves and views" in str(text) for text in messages)
    assert "memory" not in record["best"]


def cosine(left: Tensor, right: Tensor) -> float:
    return float(functional.cosine_similarity(left, right, dim=0))


class PlainBank:
    """The rule, one sketch after the other, with lists."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: dict[int, list[Tensor]] = {}

    def add(
        self, sketches: Tensor, sketch_labels: list[int], photos: Tensor, photo_labels: list[int]
    ) -> None:
        for sketch, label in zip(sketches, sketch_labels, strict=True):
            kept = self.kept.setdefault(label, [])
            if len(kept) < self.size:
                kept.append(sketch)
                continue
            mine = [p for p, other in zip(photos, photo_labels, strict=True) if other == label]
            if not mine:
                continue
            middle = torch.stack(mine).mean(0)
            scores = [cosine(entry, middle) for entry in kept]
            if cosine(sketch, middle) > min(scores):
                kept[scores.index(min(scores))] = sketch

    def loss(self, photos: Tensor, labels: list[int]) -> float:
        cosines = [
            cosine(photo, torch.stack(self.kept[label]).mean(0))
            for photo, label in zip(photos, labels, strict=True)
            if self.kept.get(label)
        ]
        return 1 - sum(cosines) / len(cosines) if cosines else 0.0


def batches(count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(9, 5, generator=rng) + 0.5,
            torch.randint(0, 4, (9,), generator=rng),
            torch.randn(6, 5, generator=rng) + 0.5,
            torch.randint(0, 5, (6,), generator=rng),
        )
        for _ in range(count)
    ]


def test_entries_and_loss_equal_a_plain_loop_over_many_batches() -> None:
    bank, plain = MemoryBank(5, 3, 5), PlainBank(3)
    replaced = 0
    for sketches, sketch_labels, photos, photo_labels in batches(12):
        before = [bank.entries(label).clone() for label in range(5)]
        bank.add(sketches, sketch_labels, photos, photo_labels)
        plain.add(sketches, sketch_labels.tolist(), photos, photo_labels.tolist())
        for label in range(5):
            kept = plain.kept.get(label, [])
            expected = torch.stack(kept) if kept else torch.zeros(0, 5)
            torch.testing.assert_close(bank.entries(label), expected)
            is_full = len(before[label]) == 3
            replaced += is_full and not torch.equal(before[label], bank.entries(label))
        found = float(bank.loss(photos, photo_labels))
        assert found == pytest.approx(plain.loss(photos, photo_labels.tolist()), abs=1e-5)
    assert bank.counts == (3, 3, 3, 3, 0)
    assert replaced > 5


def full_bank() -> MemoryBank:
    """Class 0 holds the directions east and north, class 1 holds two of its own."""
    bank = MemoryBank(2, 2, 2)
    east_north = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    bank.add(
        torch.cat([east_north, -east_north]),
        torch.tensor([0, 0, 1, 1]),
        torch.zeros(0, 2),
        torch.zeros(0, dtype=torch.int64),
    )
    return bank


def test_the_farthest_entry_of_the_class_is_replaced() -> None:
    bank = full_bank()
    other = bank.entries(1).clone()
    # The class's photos look north-north-east; east (1, 0) is the farther of the two entries.
    photos = torch.tensor([[1.0, 3.0], [1.0, 5.0]])
    sketch = torch.tensor([[2.0, 3.0]])
    bank.add(sketch, torch.tensor([0]), photos, torch.tensor([0, 0]))
    torch.testing.assert_close(bank.entries(0), torch.tensor([[2.0, 3.0], [0.0, 1.0]]))
    # The released code's mistake: slot 0 taken for class 0, all of whose entries it overwrote.
    torch.testing.assert_close(bank.entries(1), other)


def test_nothing_is_replaced_by_a_farther_sketch_or_without_photos_of_the_class() -> None:
    for sketch, photo_label in (([-1.0, 0.0], 0), ([2.0, 3.0], 1)):
        bank = full_bank()
        before = bank.entries(0).clone()
        photos = torch.tensor([[1.0, 3.0]])
        bank.add(torch.tensor([sketch]), torch.tensor([0]), photos, torch.tensor([photo_label]))
        torch.testing.assert_close(bank.entries(0), before)


def test_the_papers_loss_has_gradients_for_photos_and_the_released_one_none() -> None:
    bank = full_bank()
    photos = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 1])
    loss = bank.loss(photos, labels)
    # Prototypes (1, 1)/2 and (-1, -1)/2: both cosines are cos 45 degrees.
    assert float(loss.detach()) == pytest.approx(1 - 0.5**0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert photos.grad is not None
    # A step against the gradient turns each photo to its prototype.
    assert photos.grad[0, 1] < 0 < photos.grad[1, 1]
    released = bank.loss(photos, labels, with_gradient=False)
    assert float(released) == float(loss.detach())
    assert not released.requires_grad


def test_stored_sketches_have_no_gradient() -> None:
    bank = MemoryBank(1, 2, 2)
    sketches = torch.tensor([[1.0, 0.0]], requires_grad=True)
    label = torch.tensor([0])
    bank.add(sketches, label, sketches, label)
    assert not bank.entries(0).requires_grad


def test_photos_of_classes_without_entries_are_skipped() -> None:
    bank = MemoryBank(3, 2, 2)
    photos = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    nothing = bank.loss(photos, torch.tensor([0, 1]))
    assert float(nothing.detach()) == 0.0
    nothing.backward()  # type: ignore[no-untyped-call]
    bank.add(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), photos[:0], torch.tensor([]).long())
    assert float(bank.loss(photos, torch.tensor([0, 1])).detach()) == pytest.approx(0.0)
    assert float(bank.loss(photos, torch.tensor([1, 0])).detach()) == pytest.approx(1.0)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_outside_the_bank_is_refused(label: int) -> None:
    bank = MemoryBank(3, 2, 2)
    good, bad, rows = torch.tensor([0]), torch.tensor([label]), torch.ones(1, 2)
    for call in (
        lambda: bank.add(rows, bad, rows, good),
        lambda: bank.add(rows, good, rows, bad),
        lambda: bank.loss(rows, bad),
    ):
        with pytest.raises(BadData, match=rf"class number {label} in a memory bank of 3 classes"):
            call()
    assert bank.counts == (0, 0, 0)


def test_the_bank_is_saved_restored_and_reset() -> None:
    bank = full_bank()
    state = bank.state()
    restored = MemoryBank(2, 2, 2)
    restored.load_state(state)
    bank.clear()
    assert bank.counts == (0, 0)
    photos, labels = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([0, 1])
    assert float(bank.loss(photos, labels)) == 0.0
    assert restored.counts == (2, 2)
    assert float(restored.loss(photos, labels)) == float(full_bank().loss(photos, labels))
    with pytest.raises(BadConfig, match=r"\(2, 2, 2\)(.|\n)*\(3, 2, 2\)"):
        MemoryBank(3, 2, 2).load_state(state)
    with pytest.raises(BadConfig, match="memory bank"):
        MemoryBank(2, 2, 2).load_state({})
