"""Which metric loss a recipe's batches are given to."""

from __future__ import annotations

import torch
from torch import Tensor

from sbtk_train.objectives.losses import (
    batch_hard_loss,
    contrastive_loss,
    quadruplet_loss,
    triplet_loss,
)
from sbtk_train.recipes import SbtknetRecipe


def metric_loss(
    sketches: Tensor,
    photos: Tensor,
    sketch_labels: Tensor,
    photo_labels: Tensor,
    recipe: SbtknetRecipe,
) -> Tensor:
    """Returns the recipe's metric loss of a batch's `(S, D)` sketches and `(P, D)` photos.

    In a batch of quadruplets the first half of the sketches are anchors and the second negatives,
    the first half of the photos positives and the second negatives (`sampler.Batch`).
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
