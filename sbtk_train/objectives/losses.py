"""The losses of SBTKNet, DSN and SAKE, one function each.

Equation numbers are SBTKNet's. Eq. 2 uses the negative sketch that its text defines, Eq. 4 and 5 a
single minus sign. Embeddings are unit rows, so squared distances are in [0, 4], and a margin of 0.2
means the same as in FaceNet.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """Return `(A, B)` squared Euclidean distances between unit rows `(A, D)` and `(B, D)`."""
    return 2.0 - 2.0 * left @ right.T


def triplet_loss(anchor: Tensor, positive: Tensor, negative_photo: Tensor, margin: float) -> Tensor:
    """Return Eq. 1: mean of `max(d+ - dp- + margin, 0)` over `(N, D)` unit rows."""
    to_positive = (anchor - positive).square().sum(1)
    to_photo = (anchor - negative_photo).square().sum(1)
    return functional.relu(to_positive - to_photo + margin).mean()


def quadruplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative_photo: Tensor,
    negative_sketch: Tensor,
    margin: float,
) -> Tensor:
    """Return Eq. 2, the domain-aware quadruplet loss over `(N, D)` unit rows.

    It is the mean of the triplet losses with a negative photo and with a negative sketch, since the
    anchor sketch must be closer to a photo of its class than to other classes in both domains.
    """
    with_photo = triplet_loss(anchor, positive, negative_photo, margin)
    with_sketch = triplet_loss(anchor, positive, negative_sketch, margin)
    return 0.5 * (with_photo + with_sketch)


def batch_hard_loss(
    sketches: Tensor,
    sketch_labels: Tensor,
    photos: Tensor,
    photo_labels: Tensor,
    margin: float,
    *,
    with_sketch_negatives: bool = True,
) -> Tensor:
    """Return Eq. 2 with the hardest examples of a batch instead of sampled ones.

    These are, for each sketch, the farthest photo of its class and the nearest photo and sketch of
    another class (Hermans et al. 2017). The same is added, with weight 0.5, for each photo and the
    sketches.

    Args:
        sketches: `(S, D)` unit rows.
        sketch_labels: `(S,) int64`.
        photos: `(P, D)` unit rows.
        photo_labels: `(P,) int64`.
        margin: of the squared distance.
        with_sketch_negatives: False for the triplet loss of Eq. 1.
    """
    across = squared_distances(sketches, photos)
    same = sketch_labels[:, None] == photo_labels[None, :]
    usable = same.any(1) & (~same).any(1)
    farthest = across.masked_fill(~same, -1.0).amax(1)
    nearest_photo = across.masked_fill(same, 5.0).amin(1)
    terms = functional.relu(farthest - nearest_photo + margin)
    if with_sketch_negatives:
        within = squared_distances(sketches, sketches)
        alike = sketch_labels[:, None] == sketch_labels[None, :]
        nearest_sketch = within.masked_fill(alike, 5.0).amin(1)
        terms = 0.5 * (terms + functional.relu(farthest - nearest_sketch + margin))
    back_usable = same.any(0) & (~same).any(0)
    back_farthest = across.masked_fill(~same, -1.0).amax(0)
    back_nearest = across.masked_fill(same, 5.0).amin(0)
    back = functional.relu(back_farthest - back_nearest + margin)
    return _mean_where(terms, usable) + 0.5 * _mean_where(back, back_usable)


def contrastive_loss(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, Eq. 2) over both domains.

    Every image is an anchor; its positives are all other images of its class, sketches and photos.
    Images without a positive are left out.

    Args:
        embeddings: `(N, D)` unit rows.
        labels: `(N,) int64`.
        temperature: divides the cosines.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels[None, :]) & ~own
    cosines = (embeddings @ embeddings.T / temperature).masked_fill(own, float("-inf"))
    log_shares = functional.log_softmax(cosines, dim=1).masked_fill(~positive, 0.0)
    count = positive.sum(1)
    return _mean_where(-log_shares.sum(1) / count.clamp(min=1), count > 0)


def classification_loss(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Return Eq. 4: mean cross-entropy of `(N, C)` logits with `(N,) int64` labels."""
    return functional.cross_entropy(class_logits, labels)


def knowledge_loss(soft_logits: Tensor, soft_labels: Tensor) -> Tensor:
    """Return Eq. 5: mean cross-entropy of `(N, 1000)` logits with soft labels that sum to one."""
    return -(soft_labels * functional.log_softmax(soft_logits, dim=1)).sum(1).mean()


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    if not bool(mask.any()):
        return values.sum() * 0.0
    return torch.masked_select(values, mask).mean()


def distillation_loss(
    soft_logits: Tensor, teacher_logits: Tensor, semantic_rows: Tensor, *, kd: float, kdneg: float
) -> Tensor:
    """Return the semantic-aware distillation loss of a batch's photos (Liu et al. 2019, SAKE).

    It is the mean over photos of the cross-entropy of `softmax(soft_logits)` with the target
    `softmax(kd * teacher_logits + kdneg * semantic_rows)`: WordNet raises ImageNet classes that are
    similar to the photo's class.

    Args:
        soft_logits: `(P, 1000)`, the student's logits of ImageNet classes.
        teacher_logits: `(P, 1000)`, the frozen classifier's for the same pixels, without gradient.
        semantic_rows: `(P, 1000)`, the semantic matrix's row of each photo's class.
        kd: factor of the teacher's logits; 1 in the papers.
        kdneg: factor of the semantic rows; 0.3 in the papers.
    """
    target = functional.softmax(kd * teacher_logits + kdneg * semantic_rows, dim=1)
    return knowledge_loss(soft_logits, target)


def two_view_contrastive_loss(
    first: Tensor, second: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Return the supervised contrastive loss over two views of a batch of both domains.

    Khosla et al. 2020, Eq. 2 ("out"). Every view is an anchor; its positives are the other view of
    the image and both views of every image of its class, sketch or photo. The mean over positives
    is outside the logarithm.

    Args:
        first: `(B, D)` unit rows, codes of each image's first view.
        second: `(B, D)` unit rows, codes of the second.
        labels: `(B,) int64`.
        temperature: divides the cosines; 0.07 in DSN.
    """
    return contrastive_loss(torch.cat([first, second]), torch.cat([labels, labels]), temperature)
