"""DSN's objective, and SAKE's, which is DSN's without contrast and memory (Wang et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sbtk_train.batches.augment import unit_images
from sbtk_train.batches.draws import BatchDraws
from sbtk_train.batches.dsn_batches import shuffled_batches
from sbtk_train.batches.dsn_views import contrastive_view, moved_images, plain_view
from sbtk_train.batches.sampler import Batch
from sbtk_train.data import ImageSet
from sbtk_train.objectives.dsn_losses import distillation_loss, two_view_contrastive_loss
from sbtk_train.objectives.losses import classification_loss
from sbtk_train.objectives.memory_bank import MemoryBank
from sbtk_train.objectives.objective import Examples
from sbtk_train.recipes import DsnRecipe
from sbtk_train.students.dsn_teacher import DsnTeacher
from sbtk_train.students.student import StudentOutput


@dataclass(frozen=True)
class Distillation:
    """What photos are distilled with.

    Attributes:
        teacher: the frozen classifier.
        semantic: `(C, 1000) float32`, the semantic matrix, on the device; zeros without WordNet.
    """

    teacher: DsnTeacher
    semantic: Tensor


class DsnObjective:
    """Classification of all images, distillation of photos, contrast of views, and the memory.

    Args:
        recipe: weights of the losses, and how batches are made.
        data: the training images.
        seed: of the batches.
        features: length of a pooled feature.
        device: where the student is.
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
        """Yields shuffled sketches and photos."""
        recipe = self._recipe
        return shuffled_batches(
            self._data,
            recipe.batch_sketches,
            recipe.batch_photos,
            self._seed,
            epoch,
            drop_last=recipe.drop_last,
        )

    def views_of(self, sketches: Tensor, photos: Tensor, draw: BatchDraws) -> Tensor:
        """Returns the plain view and, for the contrast, two more of the same moved images.

        Args:
            sketches: `(S, 1, H, W) uint8`.
            photos: `(P, 3, H, W) uint8`.
            draw: the random numbers of the batch.
        """
        kinds = []
        for pixels, draws in ((sketches, draw.sketches), (photos, draw.photos)):
            is_moved = self._recipe.augment
            kinds.append((moved_images(pixels, draws) if is_moved else unit_images(pixels), draws))
        views = [plain_view(images) for images, _ in kinds]
        for _ in range(self.views - 1):
            views += [contrastive_view(images, draws) for images, draws in kinds]
        return torch.cat(views)

    def start_epoch(self) -> None:
        """Empties the memory."""
        if self._memory is not None:
            self._memory.forget()

    def terms(self, output: StudentOutput, examples: Examples) -> dict[str, Tensor]:
        """Returns `identity`, `knowledge`, `contrastive` and `memory`, those that are switched on.

        The first view is classified, distilled and remembered, the two others are contrasted.
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
        """Returns the memory."""
        return {} if self._memory is None else self._memory.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes back the memory.

        Raises:
            BadConfig: it is of other classes or of another size.
        """
        if self._memory is not None:
            self._memory.load_state(tensors)

    def _teacher_logits(self, teacher: DsnTeacher, examples: Examples) -> Tensor:
        """Returns `(S + P, 1000)`; zeros for sketches, which have no part in distillation."""
        inputs, domains = examples.first_view(), examples.own_domains()
        is_photo = domains > 0
        own = teacher.logits(inputs[is_photo], domains[is_photo], examples.begin)
        rows = own.new_zeros(len(domains), own.shape[1])
        rows[is_photo] = own
        return examples.joined(rows)

    def _memory_loss(self, memory: MemoryBank, features: Tensor, examples: Examples) -> Tensor:
        count, labels = examples.sketches, examples.labels
        memory.add(features[:count], labels[:count], features[count:], labels[count:])
        with_gradient = self._recipe.memory == "paper"
        return memory.loss(features[count:], labels[count:], with_gradient=with_gradient)
