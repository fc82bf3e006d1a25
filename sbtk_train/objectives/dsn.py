"""DSN's objective (Wang et al. 2021), and SAKE's: DSN's without contrastive term and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_train.batches.augment import (
    make_contrastive_view,
    move_images,
    normalise_unit,
    scale_to_unit,
)
from sbtk_train.batches.sampler import Batch, BatchRngs, sample_epoch, sample_shuffled
from sbtk_train.compute import Compute
from sbtk_train.config import DsnRecipe, TrainConfig
from sbtk_train.data.image_set import ImageSet
from sbtk_train.models.backbone import (
    IMAGENET_CLASSES,
    SE_RESNET50,
    build_cse_trunk,
    has_cadene_names,
    load_cse_trunk,
)
from sbtk_train.models.student import DsnStudent, Student, StudentOutput
from sbtk_train.models.teacher import DsnTeacher, require_classifier
from sbtk_train.models.weights_file import read_weights
from sbtk_train.objectives.losses import (
    classification_loss,
    distillation_loss,
    two_view_contrastive_loss,
)
from sbtk_train.objectives.objective import Examples
from sbtk_train.objectives.semantic import build_semantic_matrix
from sbtk_train.progress import Notify


@dataclass(frozen=True)
class Distillation:
    """The teacher and the semantic matrix to distil photos from.

    Attributes:
        teacher: the frozen classifier.
        semantic: `(C, 1000) float32`, the semantic matrix, on the device; zeros without WordNet.
    """

    teacher: DsnTeacher
    semantic: Tensor


class DsnObjective:
    """Classification of all images, distillation of photos, contrastive term and memory.

    Args:
        recipe: weights of the losses, and sizes of batches.
        data: the training images.
        seed: seed of the batches.
        features: length of a pooled feature.
        device: the student's device.
        distillation: `None` to leave it out.
    """

    def __init__(
        self,
        recipe: DsnRecipe,
        data: ImageSet,
        seed: int,
        features: int,
        device: torch.device,
        distillation: Distillation | None,
    ) -> None:
        self._recipe = recipe
        self._data = data
        self._seed = seed
        self._distillation = distillation
        self.views = 3 if recipe.contrastive_weight else 1
        self._memory: MemoryBank | None = None
        if recipe.memory != "none":
            self._memory = MemoryBank(len(data.classes), recipe.memory_size, features, device)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield shuffled sketches and photos."""
        recipe = self._recipe

        def sample(epoch: int) -> Iterator[Batch]:
            return sample_shuffled(
                self._data,
                recipe.batch_sketches,
                recipe.batch_photos,
                self._seed,
                epoch,
                drop_last=recipe.drop_last,
            )

        return sample_epoch(sample, epoch, recipe.epoch_images, self.views)

    def views_of(self, sketches: Tensor, photos: Tensor, rng: BatchRngs) -> Tensor:
        """Return `(V * (S + P), 3, H, W)`: a plain view and, for the contrastive term, two more.

        Args:
            sketches: `(S, 1, H, W) uint8`.
            photos: `(P, 3, H, W) uint8`.
            rng: the random numbers of the batch.
        """
        kinds = []
        for pixels, draws in ((sketches, rng.sketches), (photos, rng.photos)):
            is_moved = self._recipe.augment
            kinds.append((move_images(pixels, draws) if is_moved else scale_to_unit(pixels), draws))
        views = [normalise_unit(images) for images, _ in kinds]
        for _ in range(self.views - 1):
            views += [make_contrastive_view(images, draws) for images, draws in kinds]
        return torch.cat(views)

    def start_epoch(self) -> None:
        """Empty the memory."""
        if self._memory is not None:
            self._memory.clear()

    def terms(self, output: StudentOutput, examples: Examples) -> dict[str, Tensor]:
        """Return the enabled ones of `identity`, `knowledge`, `contrastive` and `memory`.

        The first view is classified, distilled and put into the memory; the two others are for the
        contrastive term.
        """
        recipe, labels = self._recipe, examples.labels
        count, photos = len(labels), slice(examples.sketches, len(labels))
        terms = {"identity": classification_loss(output.class_logits[:count], labels)}
        if self._distillation is not None:
            loss = distillation_loss(
                output.soft_logits[photos],
                self._teacher_logits(self._distillation.teacher, examples)[photos],
                self._distillation.semantic[labels[photos]],
                kd=recipe.kd,
                kdneg=recipe.kdneg,
            )
            terms["knowledge"] = recipe.kd_weight * loss
        if self.views == 3:
            first, second = output.embedding[count:].chunk(2)
            loss = two_view_contrastive_loss(first, second, labels, recipe.temperature)
            terms["contrastive"] = recipe.contrastive_weight * loss
        if self._memory is not None:
            loss = self._memory_loss(self._memory, output.feature[:count], examples)
            terms["memory"] = recipe.memory_weight * loss
        return terms

    def state(self) -> dict[str, Tensor]:
        """Return the memory."""
        return {} if self._memory is None else self._memory.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore the memory.

        Raises:
            BadConfig: it has other classes or another size.
        """
        if self._memory is not None:
            self._memory.load_state(tensors)

    def _teacher_logits(self, teacher: DsnTeacher, examples: Examples) -> Tensor:
        """Return `(S + P, 1000)`; zeros for sketches, which are not distilled."""
        inputs, domains = examples.first_view(), examples.own_domains()
        is_photo = domains > 0
        own = teacher.logits(inputs[is_photo], domains[is_photo], examples.begin)
        rows = own.new_zeros(len(domains), own.shape[1])
        rows[is_photo] = own
        return examples.all_gather(rows)

    def _memory_loss(self, memory: MemoryBank, features: Tensor, examples: Examples) -> Tensor:
        count, labels = examples.sketches, examples.labels
        memory.add(features[:count], labels[:count], features[count:], labels[count:])
        with_gradient = self._recipe.memory == "paper"
        return memory.loss(features[count:], labels[count:], with_gradient=with_gradient)


class MemoryBank:
    """Up to `size` sketch features for each class (Wang et al. 2021); cleared in each epoch.

    Args:
        classes: number of training classes.
        size: entries per class; 10 in DSN.
        features: length of a feature; 2048 for a ResNet50.
        device: device of the features.
    """

    def __init__(
        self, classes: int, size: int, features: int, device: torch.device | str = "cpu"
    ) -> None:
        self._entries = torch.zeros(classes, size, features, device=device)
        self._counts = [0] * classes

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of entries of each class."""
        return tuple(self._counts)

    def entries(self, label: int) -> Tensor:
        """Return the stored features of a class, `(counts[label], F) float32`."""
        return self._entries[label, : self._counts[label]]

    @torch.no_grad()
    def add(
        self, sketches: Tensor, sketch_labels: Tensor, photos: Tensor, photo_labels: Tensor
    ) -> None:
        """Add a batch's sketch features, in their order.

        If a class's entries are full, a sketch replaces the entry that is farthest, by cosine, from
        the mean of the class's photo features in the batch, if the sketch is closer to that mean.
        Without a photo of the class in the batch nothing is replaced.

        Args:
            sketches: `(S, F)` features; their gradient is not kept.
            sketch_labels: `(S,) int64`.
            photos: `(P, F)` features.
            photo_labels: `(P,) int64`.

        Raises:
            BadData: a label is not one of the bank's classes.
        """
        labels = self._checked(sketch_labels)
        self._checked(photo_labels)
        present = set(photo_labels.tolist())
        for sketch, label in zip(sketches.float(), labels, strict=True):
            count = self._counts[label]
            if count < self._entries.shape[1]:
                self._entries[label, count] = sketch
                self._counts[label] = count + 1
            elif label in present:
                middle = photos[photo_labels == label].float().mean(0)
                self._replace_farthest(label, sketch, middle)

    def loss(self, photos: Tensor, labels: Tensor, *, with_gradient: bool = True) -> Tensor:
        """Return 1 minus the mean cosine between photos and the mean entry of their class.

        Photos of classes without entries are left out; without any other photos the loss is 0.

        Args:
            photos: `(P, F)` features.
            labels: `(P,) int64`.
            with_gradient: False for a loss without effect, as in the authors' code.

        Raises:
            BadData: a label is not one of the bank's classes.
        """
        rows = [row for row, label in enumerate(self._checked(labels)) if self._counts[label]]
        photos = photos.float() if with_gradient else photos.detach().float()
        if not rows:
            return photos.sum() * 0.0
        # Empty slots are zeros, and a cosine does not depend on length: the sum serves as the mean.
        prototypes = self._entries[labels[rows]].sum(1)
        return 1.0 - functional.cosine_similarity(photos[rows], prototypes).mean()

    def clear(self) -> None:
        """Empty the bank."""
        self._entries.zero_()
        self._counts = [0] * len(self._counts)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the bank's entries and counts."""
        return {"entries": self._entries.cpu().clone(), "counts": torch.tensor(self._counts)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            BadConfig: it is from a bank with other classes, another size or other features.
        """
        found = tensors["entries"].shape if "entries" in tensors else None
        if found != self._entries.shape or len(tensors["counts"]) != len(self._counts):
            raise BadConfig(
                f"the saved memory bank has shape {None if found is None else tuple(found)}",
                f"{tuple(self._entries.shape)}: classes, entries, length of a feature",
                "resume with the same classes and --memory-size, or start a new run",
            )
        self._entries.copy_(tensors["entries"])
        self._counts = [int(count) for count in tensors["counts"]]

    def _replace_farthest(self, label: int, sketch: Tensor, middle: Tensor) -> None:
        slots = self._entries[label]
        cosines = functional.cosine_similarity(slots, middle[None])
        farthest = cosines.argmin()[None]
        is_nearer = functional.cosine_similarity(sketch, middle, dim=0) > cosines[farthest]
        # Without a branch, which would wait for the GPU.
        slots[farthest] = torch.where(is_nearer[:, None], sketch[None], slots[farthest])

    def _checked(self, labels: Tensor) -> list[int]:
        values: list[int] = labels.tolist()
        for label in values:
            if not 0 <= label < len(self._counts):
                raise BadData(
                    f"class number {label} in a memory bank of {len(self._counts)} classes",
                    f"0 to {len(self._counts) - 1}, the training classes",
                    "train on the classes that the run was started with",
                )
        return values


def build_dsn_objective(
    config: TrainConfig, training: ImageSet, student: Student, compute: Compute, notify: Notify
) -> tuple[DsnObjective, str]:
    """Return the objective, and the SHA-256 of its semantic matrix (empty without one).

    Raises:
        BadConfig: there is nothing to distil from, or it does not fit cached feature maps.
        BadModel: the teacher's weights do not fit or have no ImageNet head.
        MissingExtra: the semantic matrix must be built, and WordNet is not installed.
    """
    recipe = config.recipe
    assert isinstance(recipe, DsnRecipe)
    assert isinstance(student, DsnStudent)
    distillation, digest = None, ""
    if recipe.kd_weight:
        teacher = _teacher(config, compute)
        semantic, digest = _semantic(recipe, training, notify)
        distillation = Distillation(teacher, semantic.to(compute.device))
    if config.feature_folder and recipe.augment:
        notify(
            "cached feature maps are of images augmented as for SBTKNet, "
            f"not with {config.method}'s moves and views"
        )
    features = student.embedding.in_features
    objective = DsnObjective(recipe, training, config.seed, features, compute.device, distillation)
    return objective, digest


def _teacher(config: TrainConfig, compute: Compute) -> DsnTeacher:
    if not (config.weights or config.teacher):
        raise BadConfig(
            f"{config.method} distils from an ImageNet classifier, and no weights are given",
            "--weights FILE or --teacher FILE",
            "or --kd-weight 0",
        )
    if config.feature_folder and config.teacher not in ("", config.weights):
        raise BadConfig(
            f"--feature-maps caches stages of {config.weights or 'a student without weights'}, but "
            f"the teacher is {config.teacher}",
            "one file for both, since the teacher continues from the student's frozen stages",
            "leave out --teacher or --feature-maps",
        )
    path = Path(config.teacher or config.weights)
    tensors, layout = read_weights(path)
    backbone = SE_RESNET50 if has_cadene_names(tensors) else layout or config.backbone
    trunk, _ = build_cse_trunk(backbone)
    classifier = require_classifier(
        load_cse_trunk(trunk, tensors, path, backbone),
        path,
        f"{config.method} distils from",
        "--kd-weight 0",
    )
    return DsnTeacher(trunk, classifier, compute)


def _semantic(recipe: DsnRecipe, training: ImageSet, notify: Notify) -> tuple[Tensor, str]:
    if recipe.semantic == "none":
        return torch.zeros(len(training.classes), IMAGENET_CLASSES), ""
    matrix, digest = build_semantic_matrix(training, notify)
    return torch.from_numpy(matrix), digest
