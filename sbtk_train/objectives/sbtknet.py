"""SBTKNet's objective: a metric loss, and optional classification and knowledge losses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sbtk_runtime.errors import BadConfig
from sbtk_train.batches.augment import augment_photos, augment_sketches, normalise
from sbtk_train.batches.sampler import (
    Batch,
    BatchRngs,
    sample_class_balanced,
    sample_epoch,
    sample_quadruplets,
)
from sbtk_train.config import SbtknetRecipe
from sbtk_train.data.image_set import ImageSet
from sbtk_train.models.student import StudentOutput
from sbtk_train.models.teacher import cache_folder
from sbtk_train.objectives.losses import (
    batch_hard_loss,
    classification_loss,
    contrastive_loss,
    knowledge_loss,
    quadruplet_loss,
    triplet_loss,
)
from sbtk_train.objectives.objective import Examples

#: Largest difference between soft labels made on different devices.
_ROUNDING = 0.02


class SbtknetObjective:
    """The paper's three losses, each with weight 1.

    Args:
        recipe: the losses, and how to sample batches.
        data: the training images.
        seed: seed of the batches.
        soft_labels: `(C, 1000) float32` on the student's device; `None` without the knowledge loss.
    """

    views = 1

    def __init__(
        self, recipe: SbtknetRecipe, data: ImageSet, seed: int, soft_labels: Tensor | None
    ) -> None:
        self._recipe = recipe
        self._data = data
        self._seed = seed
        self.soft_labels = soft_labels

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield batches of quadruplets, or of classes with two images of each domain."""
        recipe, data, seed = self._recipe, self._data, self._seed

        def sample(epoch: int) -> Iterator[Batch]:
            if recipe.batches == "class-balanced":
                return sample_class_balanced(
                    data, recipe.quadruplets, seed, epoch, further=recipe.further
                )
            return sample_quadruplets(data, recipe.quadruplets, seed, epoch)

        return sample_epoch(sample, epoch, recipe.epoch_images, self.views)

    def views_of(self, sketches: Tensor, photos: Tensor, rng: BatchRngs) -> Tensor:
        """Return `(S + P, 3, H, W)` images, augmented if the recipe augments."""
        if self._recipe.augment:
            ink = augment_sketches(sketches, rng.sketches)
            return torch.cat([ink, augment_photos(photos, rng.photos)])
        return torch.cat([normalise(sketches), normalise(photos)])

    def start_epoch(self) -> None:
        """Do nothing; an epoch has no state."""

    def terms(self, output: StudentOutput, examples: Examples) -> dict[str, Tensor]:
        """Return `metric`, and `identity` and `knowledge` if they are enabled."""
        count, labels = examples.sketches, examples.labels
        terms = {
            "metric": metric_loss(
                output.embedding[:count],
                output.embedding[count:],
                labels[:count],
                labels[count:],
                self._recipe,
            )
        }
        if self._recipe.identity:
            terms["identity"] = classification_loss(output.class_logits, labels)
        if self.soft_labels is not None:
            terms["knowledge"] = knowledge_loss(output.soft_logits, self.soft_labels[labels])
        return terms

    def state(self) -> dict[str, Tensor]:
        """Return the soft labels, if any."""
        return {} if self.soft_labels is None else {"soft_labels": self.soft_labels.cpu()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore the soft labels.

        Raises:
            BadConfig: those made now, or cached, differ by more than rounding.
        """
        saved, own = tensors.get("soft_labels"), self.soft_labels
        if saved is None or own is None:
            return
        if saved.shape != own.shape or not torch.allclose(saved, own.cpu(), atol=_ROUNDING):
            raise BadConfig(
                "the soft labels differ from those that the run was started with",
                "the same teacher, and a cache as sbtk wrote it",
                f"remove {cache_folder() / 'soft-labels'}, and resume again",
            )
        self.soft_labels = saved.to(own.device)


def metric_loss(
    sketches: Tensor,
    photos: Tensor,
    sketch_labels: Tensor,
    photo_labels: Tensor,
    recipe: SbtknetRecipe,
) -> Tensor:
    """Return the recipe's metric loss of a batch's `(S, D)` sketches and `(P, D)` photos.

    In a batch of quadruplets the first half of the sketches are anchors, the first half of the
    photos positives, and the second halves negatives (`sampler.Batch`).
    """
    if recipe.metric == "contrastive":
        embeddings, labels = torch.cat([sketches, photos]), torch.cat([sketch_labels, photo_labels])
        return contrastive_loss(embeddings, labels, recipe.temperature)
    with_sketches = recipe.metric == "quadruplet"
    if recipe.batches == "class-balanced":
        return batch_hard_loss(
            sketches,
            sketch_labels,
            photos,
            photo_labels,
            recipe.margin,
            with_sketch_negatives=with_sketches,
        )
    half = len(sketches) // 2
    anchor, negative_sketch = sketches[:half], sketches[half:]
    positive, negative_photo = photos[:half], photos[half:]
    if with_sketches:
        return quadruplet_loss(anchor, positive, negative_photo, negative_sketch, recipe.margin)
    return triplet_loss(anchor, positive, negative_photo, recipe.margin)
